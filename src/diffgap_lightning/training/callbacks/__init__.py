"""What watches a refiner's training."""

from diffgap_lightning.training.callbacks.average_weights import AverageWeights
from diffgap_lightning.training.callbacks.embedding_map import EmbeddingMap
from diffgap_lightning.training.callbacks.give_back import GiveBackValidation
from diffgap_lightning.training.callbacks.save_last import SaveLast
from diffgap_lightning.training.callbacks.save_refiner import SaveRefiner

__all__ = ["AverageWeights", "EmbeddingMap", "GiveBackValidation", "SaveLast", "SaveRefiner"]
