"""Weight files of the audio classifiers, by the key names of the public checkpoints: local files, tensors alone.

Nothing is downloaded and nothing in a file is executed. The widths of the layers come from the file, so that pruned
and tiny versions load too.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a `torch.save` file, there also those under `"model"` or `"state_dict"`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a pickle that needs more than tensors, numbers and arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    try:
        with _numpy_allowed():
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: holds more than tensors and would run code when loaded ({reason[:160]}); if you trust its "
            "source, load it with torch.load(..., weights_only=False) once and save its tensors alone"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable PyTorch file ({str(error)[:160]}); copy it again") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: holds no state_dict of tensors, got {type(content).__name__}")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


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


def _numpy_allowed() -> AbstractContextManager[Any]:
    """Let the restricted unpickler build arrays and numbers: training scripts save their sampler's order beside it."""
    if not hasattr(torch.serialization, "safe_globals"):  # before PyTorch 2.5
        return nullcontext()
    newer = int(np.__version__.split(".")[0]) >= 2
    multiarray = import_module("numpy._core.multiarray" if newer else "numpy.core.multiarray")
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u4", "u8", "?")]
    functions = [multiarray.scalar, multiarray._reconstruct]
    older = [(f, f"numpy.core.multiarray.{f.__name__}") for f in functions] if newer else []
    return torch.serialization.safe_globals([*functions, *older, np.ndarray, np.dtype, *kinds])
