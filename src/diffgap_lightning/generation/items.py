"""What sound is made for: texts, the lines of a text file, videos, the videos of a folder.

An item's key is a readable slug and eight hexadecimal digits of a hash of its content (the text, or the video's bytes;
its name too, where equal videos have different names that give one slug). It names the item's files and seeds its
noise, so a list may be extended or reordered and the finished items stay valid.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffgap_lightning.data.media import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS

TEXT_EXTENSIONS = ("txt",)
_SLUG_LENGTH = 48


@dataclass(frozen=True)
class Item:
    """One text or one video.

    Attributes:
        kind: Which of the two.
        text: The prompt, or the video's file name.
        path: The video; None for a text.
        key: Unique among the items; see the module's text.
    """

    kind: Literal["text", "video"]
    text: str
    path: Path | None
    key: str


def text_item(text: str) -> Item:
    """The item of a prompt; spaces at its ends do not count."""
    text = " ".join(text.split())
    return Item("text", text, None, _key(text, hashlib.sha256(text.encode())))


def video_item(path: Path) -> Item:
    """The item of a video file.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    shown = os.fsencode(path.name).decode("utf-8", "backslashreplace")  # a name need not be text
    return Item("video", shown, path, _key(path.stem, digest))


def read_items(inputs: Sequence[str]) -> list[Item]:
    """Items of the command line's inputs, in order, each once.

    Args:
        inputs: Each a folder (its videos, with subfolders, sorted), a video file, a `.txt` file (one prompt a line;
            empty lines and lines that start with `#` are left out), or else a prompt.

    Raises:
        FileNotFoundError: what looks like a file or a folder and does not exist.
        ValueError: an empty prompt, text file or folder, or a file of another kind.
    """
    items = [item for given in inputs for item in _items_of(given)]
    texts: dict[str, set[str]] = {}
    for item in items:
        texts.setdefault(item.key, set()).add(item.text)
    items = [item if len(texts[item.key]) == 1 else _distinct(item) for item in items]
    unique = {item.key: item for item in items}
    return list(unique.values())


def _items_of(given: str) -> Iterable[Item]:
    if not given.strip():
        raise ValueError("got an empty prompt, expected text, a .txt file, a video or a folder of videos")
    path = Path(given)
    suffix = path.suffix[1:].lower()
    if _exists(path, "dir"):
        videos = sorted(p for p in path.rglob("*") if p.suffix[1:].lower() in VIDEO_EXTENSIONS and p.is_file())
        if not videos:
            raise ValueError(f"{given}: no videos in this folder ({', '.join(VIDEO_EXTENSIONS)})")
        return [video_item(video) for video in videos]
    if _exists(path, "file"):
        if suffix in VIDEO_EXTENSIONS:
            return [video_item(path)]
        if suffix in TEXT_EXTENSIONS:
            return _lines(path)
        raise ValueError(f"{given}: got a file of kind {suffix or 'unknown'!r}, expected a .txt file or a video")
    if suffix in (*VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS, *TEXT_EXTENSIONS) or given.endswith("/"):
        raise FileNotFoundError(f"{given}: no such file or folder")
    return [text_item(given)]


def _lines(path: Path) -> list[Item]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it, expected one a line")
    return [text_item(prompt) for prompt in prompts]


def _distinct(item: Item) -> Item:
    """An item whose key depends on its name too."""
    return replace(item, key=_key(item.text, hashlib.sha256(f"{item.key} {item.text}".encode())))


def _exists(path: Path, kind: str) -> bool:
    try:
        return path.is_dir() if kind == "dir" else path.is_file()
    except (OSError, ValueError):  # a prompt may be too long for a file name
        return False


def _key(name: str, digest: hashlib._Hash) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_SLUG_LENGTH].rstrip("-")
    return f"{slug or 'item'}-{digest.hexdigest()[:8]}"
