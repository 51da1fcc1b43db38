"""Weight files of the audio classifiers, by the key names of the public checkpoints.

Nothing is downloaded and nothing in a file is executed (see `encoders/weights.py`). The widths of the layers come from
the file, so that pruned and tiny versions load too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn


def fill(network: nn.Module, state: Mapping[str, Tensor], path: object, ignore: Iterable[str] = ()) -> None:
    """Load a state whose keys must be the network's own, except those that begin with one of `ignore`.

    Raises:
        ValueError: missing, unknown or misshapen tensors; the message names the first.
    """
    prefixes = tuple(ignore)
    kept = {key: value for key, value in state.items() if not key.startswith(prefixes)} if prefixes else dict(state)
    own = network.state_dict()
    lacking = [k for k in own if k not in kept and not k.endswith("num_batches_tracked")]
    unknown = [k for k in kept if k not in own]
    other = [k for k in own if k in kept and own[k].shape != kept[k].shape]
    for keys, text in ((lacking, "lacks"), (unknown, "has unknown"), (other, "has other shapes of")):
        if keys:
            kind = type(network).__name__
            raise ValueError(f"{path}: not weights of {kind}: {text} {len(keys)} tensors, first {keys[0]}")
    network.load_state_dict(kept, strict=False)


def need_key(state: Mapping[str, Tensor], key: str, ndim: int, path: object, network: str) -> Tensor:
    """The tensor under a key, of so many dimensions; from it the widths are read."""
    value = state.get(key)
    if value is None or value.ndim != ndim:
        got = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(f"{path}: not weights of {network}: {key}: {got}; first keys: {', '.join(list(state)[:3])}")
    return value


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Digest that identifies a weight file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
