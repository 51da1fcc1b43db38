"""What watches a refiner's training."""

from diffgap_lightning.training.callbacks.embedding_map import EmbeddingMap

__all__ = ["EmbeddingMap"]
