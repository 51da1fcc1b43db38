"""Where the files of an `open_clip` model are: a folder, the hub's cache, or open_clip's own cache of tags.

Without weights open_clip builds a random network and only logs it; here weights are found on disk or it is an error,
which says what to fetch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from diffgap_lightning.encoders.hub import ALLOW, cached_file, check_reachable, how_to_fetch, local_folder
from diffgap_lightning.encoders.optional import need

EXTRA = "open-clip"
HUB, FOLDER = "hf-hub:", "local-dir:"
_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def find_model(
    open_clip: Any, model: str, pretrained: str | None, weights: str | None, download: bool
) -> tuple[str, str | None, Path | None]:
    """What to call open_clip with: `(model name, pretrained, weight file of a tag)`.

    Raises:
        FileNotFoundError: the weights are not on disk.
        ValueError: an unknown architecture or tag.
    """
    if model.startswith(HUB) or "/" in model or Path(model).is_dir():
        source = model.removeprefix(HUB).removeprefix(FOLDER)
        return f"{FOLDER}{local_folder(source, (_CONFIG, _WEIGHTS), extra=EXTRA, download=download)}", None, None
    if model not in open_clip.list_models():
        raise ValueError(f"model: open_clip has no {model!r}; open_clip.list_models() lists them, or give a folder")
    if pretrained is None:
        raise ValueError("pretrained: give a tag of open_clip or a weight file; a random network embeds nothing")
    if Path(pretrained).expanduser().is_file():
        return model, str(Path(pretrained).expanduser()), None
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        raise ValueError(
            f"pretrained: {pretrained!r} is no file, and the tags of {model} are {', '.join(tags) or 'none'}"
        )
    if weights is not None:
        if not Path(weights).expanduser().is_file():
            raise FileNotFoundError(f"weights: no file {weights}")
        return model, pretrained, Path(weights).expanduser()
    return model, pretrained, find_tag(open_clip, open_clip.get_pretrained_cfg(model, pretrained), download)


def find_tag(open_clip: Any, entry: dict[str, Any], download: bool) -> Path:
    """The weight file of a tag, in the hub cache or open_clip's own.

    Raises:
        FileNotFoundError: it is in neither; the message says what to fetch.
    """
    repository, name = os.path.split(entry.get("hf_hub", ""))
    for file in (name,) if name else _WEIGHTS:
        if repository and (path := cached_file(repository, file, EXTRA)):
            return path
    url = entry.get("url", "")
    cache = Path("~/.cache/clip").expanduser()  # where open_clip keeps what does not come from the hub
    if url and (cache / os.path.basename(url)).is_file():
        return cache / os.path.basename(url)
    if download:
        check_reachable(EXTRA)
        return Path(open_clip.download_pretrained(entry))
    where = f"run `hf download {repository}`" if repository else f"fetch {url} into {cache}"
    raise FileNotFoundError(
        f"weights of this tag are neither in the hub cache nor in {cache}: {where} where there is a network and copy "
        f"it, give the file as weights, or {ALLOW}"
    )


@contextmanager
def offline_unless(download: bool) -> Iterator[None]:
    """Keep open_clip from asking the hub, where it would retry for minutes."""
    hub: Any = need("huggingface_hub", EXTRA)
    with mock.patch.object(hub.constants, "HF_HUB_OFFLINE", hub.constants.HF_HUB_OFFLINE or not download):
        yield


def text_tower_missing(open_clip: Any, model: str) -> str:
    """The message for a model whose text tower is configured on the hub."""
    text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    names = dict.fromkeys(text[key] for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key))
    return f"{model}: its text tower needs {' and '.join(names) or 'files'} in the hub cache; " + "; ".join(
        how_to_fetch(name) for name in names
    )
