"""Callbacks that put a refiner into another LightningModule: frozen, or trained together with it."""

from __future__ import annotations

from diffgap_lightning.integrations.lightning.finetune_refiner import FinetuneRefiner
from diffgap_lightning.integrations.lightning.refine_conditioning import RefineConditioning

__all__ = ["FinetuneRefiner", "RefineConditioning"]
