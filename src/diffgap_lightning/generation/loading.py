"""Generators by name: a local folder first, the hub's cache second, the network only if it is asked for.

A folder's `model_index.json` says which pipeline it holds; only the supported ones are built, and no code of a
repository is run. From the hub only safetensors files are taken, and a download needs a revision, so that the same
command makes the same sounds next year.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from diffgap_lightning.encoders.hub import local_folder
from diffgap_lightning.encoders.optional import need
from diffgap_lightning.integrations.diffusers_generator import PIPELINES, DiffusersGenerator
from diffgap_lightning.integrations.generator import EmbeddingGenerator

Backend = Literal["diffusers", "audioldm"]
_INDEX = "model_index.json"
_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")


def load_generator(
    model: str,
    backend: Backend = "diffusers",
    *,
    revision: str | None = None,
    download: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> EmbeddingGenerator:
    """Load a generator.

    Args:
        model: `diffusers`: a folder that `save_pretrained` wrote, or a hub id such as `cvssp/audioldm-s-full-v2`.
            `audioldm`: a checkpoint file of that package.
        backend: Which package runs it.
        revision: Commit of a hub id.
        download: Fetch a hub id that is not in the cache; needs `revision`.
        device: `"auto"` takes the first GPU if there is one.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`; `"auto"` is float16 on a GPU, float32 otherwise.

    Raises:
        ValueError: an unknown backend, dtype or device, a model of another kind, a download without a revision.
        FileNotFoundError: no such folder, file or cached model.
        ImportError: the backend's extra is not installed.
    """
    place = choose_device(device)
    kind = _dtype(dtype, place)
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(Backend))}")
    if backend == "audioldm":
        from diffgap_lightning.integrations.audioldm_generator import load_audioldm_generator

        if revision or download:
            raise ValueError("audioldm: takes a checkpoint file, no revision and no download")
        return load_audioldm_generator(model, place)
    return _load_diffusers(model, revision, download, place, kind)


def _load_diffusers(
    model: str, revision: str | None, download: bool, device: torch.device, dtype: torch.dtype
) -> EmbeddingGenerator:
    diffusers: Any = need("diffusers", "diffusers")
    if download and not revision:
        raise ValueError(f"{model}: a download needs a revision, a commit of the model's repository")
    local = Path(model).expanduser().is_dir()
    folder = local_folder(model, [_INDEX], extra="diffusers", revision=revision, download=download, patterns=_PATTERNS)
    name = _pipeline_class(folder)
    try:
        with _quiet(diffusers):
            pipeline = getattr(diffusers, name).from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=None if local else True
            )
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{model}: cannot be loaded as {name} ({' '.join(str(error).split())[:300]})") from error
    pipeline.set_progress_bar_config(disable=True)
    return DiffusersGenerator(pipeline.to(device), name=folder.name if local else model)


@contextmanager
def _quiet(diffusers: Any) -> Iterator[None]:
    """Leave out bars and remarks about old names; what is wrong with the files is an exception."""
    transformers: Any = need("transformers", "diffusers")
    levels = [(package.utils.logging, package.utils.logging.get_verbosity()) for package in (diffusers, transformers)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logging, _ in levels:
                logging.disable_progress_bar()
                logging.set_verbosity_error()
            yield
    finally:
        for logging, level in levels:
            logging.set_verbosity(level)
            logging.enable_progress_bar()


def _pipeline_class(folder: Path) -> str:
    """The class of a folder's pipeline, if it is a supported one."""
    try:
        name = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _INDEX}: not the index of a pipeline ({error})") from error
    if name not in PIPELINES:
        raise ValueError(f"{folder}: holds a {name}, expected {', '.join(PIPELINES)}")
    return name


def choose_device(device: str) -> torch.device:
    """`"auto"` or a device's name.

    Raises:
        ValueError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected auto, cpu, cuda, cuda:1, ...") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but PyTorch sees no GPU here")
    return chosen


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in known:
        raise ValueError(f"dtype: got {name!r}, expected auto, {', '.join(known)}")
    return known[name]
