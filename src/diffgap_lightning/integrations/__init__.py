"""Refiners in other people's generators: `attach` (see `attach.py`) and the Lightning callbacks (`lightning/`).

This package imports no generator's package: it recognises a generator by the name of its class.
"""

from __future__ import annotations

from diffgap_lightning.integrations.attach import Attachment, attach
from diffgap_lightning.integrations.conditioner import Conditioner, Refines

__all__ = ["Attachment", "Conditioner", "Refines", "attach"]
