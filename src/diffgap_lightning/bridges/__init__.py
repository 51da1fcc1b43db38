"""The closed-form and regression rivals behind the refiner's own interface: what a sceptical user compares with."""

from __future__ import annotations

import os
from collections.abc import Callable

from diffgap_lightning.bridges.base import Bridge
from diffgap_lightning.bridges.cca import CCABridge
from diffgap_lightning.bridges.maps import ProcrustesBridge, RestoredRidgeBridge, RidgeBridge
from diffgap_lightning.bridges.mixture import MixtureBridge
from diffgap_lightning.bridges.mlp import MLPBridge
from diffgap_lightning.bridges.shift import CentreBridge, IdentityBridge
from diffgap_lightning.checkpoint import checkpoint_kind

__all__ = [
    "Bridge",
    "CCABridge",
    "CentreBridge",
    "IdentityBridge",
    "MLPBridge",
    "MixtureBridge",
    "ProcrustesBridge",
    "RestoredRidgeBridge",
    "RidgeBridge",
    "default_bridges",
    "load_bridge",
]

_KINDS: dict[str, type[Bridge]] = {
    kind.__name__: kind
    for kind in (
        IdentityBridge,
        CentreBridge,
        RidgeBridge,
        RestoredRidgeBridge,
        ProcrustesBridge,
        CCABridge,
        MixtureBridge,
        MLPBridge,
    )
}


def default_bridges() -> dict[str, Callable[[], Bridge]]:
    """The comparison table's rows: name -> what makes the unfitted bridge."""
    return {
        "raw": IdentityBridge,
        "centre": CentreBridge,
        "ridge": RidgeBridge,
        "restored": RestoredRidgeBridge,
        "procrustes": ProcrustesBridge,
        "cca": CCABridge,
        "mlp": MLPBridge,
    }


def load_bridge(folder: str | os.PathLike[str]) -> Bridge:
    """Read any bridge that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it holds something else than a bridge, or does not load.
    """
    kind = checkpoint_kind(folder)
    if kind not in _KINDS:
        raise ValueError(f"{folder}: holds a {kind}, expected one of {', '.join(_KINDS)}")
    return _KINDS[kind].from_pretrained(folder)
