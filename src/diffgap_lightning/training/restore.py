"""Lightning checkpoints that may come from a stranger: read as data, and kept from pointing elsewhere.

Lightning's own `load_from_checkpoint` takes a module's settings from the checkpoint, class paths included, and so
imports what the file names. Here settings come from the caller alone. And a `ModelCheckpoint` that goes on from a
checkpoint takes over its list of older files, which it deletes when better ones appear: names that leave its own folder
are dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffgap_lightning.torch_files import HoldsCodeError, read_torch_file

_FILES = ("kth_best_model_path", "last_model_path")


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a `.ckpt` file; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no checkpoint, or more than tensors and plain values.
    """
    try:
        content = read_torch_file(Path(path), map_location)
    except HoldsCodeError as error:
        raise ValueError(f"{error}, and is not read; ask for the refiner's folder instead") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{path}: no checkpoint: lacks a state_dict; give a file that `diffgap fit` wrote")
    return content


def confine_files(checkpoint: Mapping[str, Any]) -> None:
    """Drop from the states of `ModelCheckpoint` callbacks, in place, every file outside the callback's folder."""
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if not isinstance(state, dict) or "best_k_models" not in state:
            continue
        folder = state.get("dirpath")
        kept = state["best_k_models"] if isinstance(state["best_k_models"], Mapping) else {}
        state["best_k_models"] = {path: score for path, score in kept.items() if _inside(path, folder)}
        for name in _FILES:
            if not _inside(state.get(name), folder):
                state[name] = ""


def _inside(path: Any, folder: Any) -> bool:
    """Whether a path, with `..` worked out, lies in a folder."""
    if not isinstance(path, str) or not isinstance(folder, str) or not path or "\0" in path + folder:
        return False
    root = os.path.abspath(folder)
    return os.path.abspath(path) != root and os.path.commonpath([os.path.abspath(path), root]) == root
