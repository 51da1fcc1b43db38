"""Weight files without code, and the digest that identifies weights.

A `.safetensors` file holds tensors alone. A `.pt` file is a pickle, which `torch_files.py` reads without running it.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffgap_lightning.torch_files import HoldsCodeError, first_sentence, read_torch_file


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file by name; of a training checkpoint, those under `state_dict` or `model`.

    Args:
        path: `.safetensors`, or whatever `torch.save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a pickle that needs more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    content = _load(path)
    state = content
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state = content[key]
            break
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no state_dict of tensors, got {type(state).__name__}")
    return without_prefix(state)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what a package raises over a model's files into one error.

    Raises:
        ValueError: the files are damaged, of another model, or would run code.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name}: holds more than tensors ({first_sentence(error)}); get it as safetensors") from error
    except (RuntimeError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"{name}: cannot be loaded ({first_sentence(error) or type(error).__name__}); its files are damaged or of "
            "another model: copy them again"
        ) from error


def without_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Names without the prefix that a distributed wrapper puts before every one of them."""
    if state and all(key.startswith(prefix) for key in state):
        return {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def _load(path: Path) -> Any:
    try:
        return read_torch_file(path)
    except HoldsCodeError as error:
        raise ValueError(
            f"{error} and would run code when loaded; if you trust "
            "its source, convert it once: python -c \"import torch; s = torch.load('IN.pt', map_location='cpu', "
            "weights_only=False); torch.save(s.get('state_dict', s), 'OUT.pt')\""
        ) from error


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the same for the same weights in any file.

    Integers do not count: they are index tables, which some versions of a package store and others compute.
    """
    digest = hashlib.sha256()
    for key in sorted(key for key, value in state.items() if value.is_floating_point()):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
