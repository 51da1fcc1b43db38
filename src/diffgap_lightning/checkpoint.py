"""A checkpoint folder: `config.json` (what to build) beside `model.safetensors` (tensors). Nothing in it is code.

The folder is written to a temporary name and renamed into place, so a reader sees the whole of it or none.
`config.json` carries a schema version, the kind of object and the SHA-256 of the tensor file; `load_folder` checks all
three before it hands anything out, and constructs nothing: the class that called it decides what the values mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffgap_lightning.atomic import replace_folder

SCHEMA_VERSION = 1
CONFIG_NAME = "config.json"
TENSORS_NAME = "model.safetensors"


def save_folder(
    folder: str | os.PathLike[str], kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write a checkpoint folder atomically, replacing an older checkpoint of the same name.

    Args:
        folder: Where to write. An existing checkpoint there is replaced; any other existing folder must be empty.
        kind: What the folder holds, e.g. `"DiffGAPRefiner"`; `load_folder` refuses another kind.
        config: JSON-able values.
        tensors: Named tensors; they are stored on the CPU, bit for bit.

    Returns:
        The folder's path.

    Raises:
        ValueError: the folder exists and holds something else than a checkpoint.
        OSError: it cannot be written; an older checkpoint is unchanged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder}: exists, is not empty and holds no {CONFIG_NAME}; choose an empty or new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        try:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, work / TENSORS_NAME)
        except SafetensorError as error:  # its name for "disk full" and the like
            raise OSError(f"{folder}: could not be written ({error}); what was there before is unchanged") from error
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "sha256": _sha256(work / TENSORS_NAME),
            "config": dict(config),
        }
        (work / CONFIG_NAME).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        work.chmod(0o755)
        replace_folder(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def load_folder(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint folder; nothing in it is executed.

    Returns:
        `(config, tensors)` as given to `save_folder`.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: not a checkpoint, another kind, a newer schema, a truncated or altered tensor file.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found; expected a folder written by save_pretrained")
    record = _read_record(folder / CONFIG_NAME)
    version = record["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION or version < 1:
        raise ValueError(
            f"{folder / CONFIG_NAME}: schema_version {version!r}, this version reads 1 to {SCHEMA_VERSION}; "
            "upgrade diffgap-lightning to load it"
        )
    if record["kind"] != kind:
        raise ValueError(f"{folder}: holds a {record['kind']}, expected a {kind}; load it with that class")
    digest = _sha256(folder / TENSORS_NAME)
    if digest != record["sha256"]:
        raise ValueError(
            f"{folder / TENSORS_NAME}: SHA-256 {digest[:12]}... differs from the {str(record['sha256'])[:12]}... in "
            f"{CONFIG_NAME}; the file was altered or truncated: copy or train it again"
        )
    try:
        tensors = load_file(folder / TENSORS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS_NAME}: not a readable safetensors file ({error})") from error
    return record["config"], tensors


def checkpoint_kind(folder: str | os.PathLike[str]) -> str:
    """The kind of object that a checkpoint folder holds, from its `config.json`."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected a folder written by save_pretrained")
    return str(_read_record(path)["kind"])


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and nesting without end
        raise ValueError(f"{path}: not valid JSON ({error}); the file was altered or truncated") from error
    missing = {"schema_version", "kind", "sha256", "config"} - set(record if isinstance(record, dict) else ())
    if missing or not isinstance(record["config"], dict):
        raise ValueError(f"{path}: not a diffgap-lightning checkpoint: lacks {', '.join(sorted(missing)) or 'config'}")
    return record


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
