"""Captions of clips from a file: CSV or TSV with a header, JSONL, a JSON object `{clip: caption}`, or a run's folder.

The clip is named by its key in the folder or by its file name (`rain`, `rain.wav`, `a/rain.wav`). A clip may have
several captions, in several rows or as a list. The folder of a `diffgap generate` run holds its prompts itself.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffgap_lightning.evaluation.clip_folder import SUFFIXES

CLIP_FIELDS = ("file", "name", "id", "key", "clip")
CAPTION_FIELDS = ("caption", "text", "prompt")


def read_captions(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Captions by clip.

    Raises:
        FileNotFoundError: no such file.
        ValueError: malformed; the message names the file and what is wrong.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted((path / "records").glob("*.json"))
        pairs: Iterable[tuple[str, Any]] = (_fields(_json(f.read_bytes(), f), f) for f in files)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of captions")
    elif path.suffix.lower() in (".csv", ".tsv"):
        pairs = _table(path)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = path.read_bytes().splitlines()
        pairs = (
            _fields(_json(line, f"{path}, line {n}"), f"{path}, line {n}") for n, line in enumerate(lines, 1) if line
        )
    elif path.suffix.lower() == ".json":
        content = _json(path.read_bytes(), path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: got a {type(content).__name__}, expected an object {{clip: caption}}")
        pairs = content.items()
    else:
        raise ValueError(f"{path}: expected captions as .csv, .tsv, .json or .jsonl, or the folder of a generate run")
    captions: dict[str, list[str]] = {}
    for clip, value in pairs:
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}: clip {clip!r}: got caption {value!r}, expected text")
        captions.setdefault(clip_key(clip), []).extend(text.strip() for text in texts)
    if not captions:
        raise ValueError(f"{path}: holds no captions")
    return captions


def clip_key(name: str) -> str:
    """`a/rain.wav` -> `a/rain`; a dot that does not begin a media suffix stays."""
    stem, suffix = os.path.splitext(name.removeprefix("./"))
    return stem if suffix.lower() in SUFFIXES else f"{stem}{suffix}"


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # not read_text, which would change line ends inside of quotes
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); convert it") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: another number of columns than the header; quote commas")
            yield _fields(row, where)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _fields(row: Any, where: object) -> tuple[str, Any]:
    """The clip and the caption of one row."""
    found = []
    for what, names in (("clip", CLIP_FIELDS), ("caption", CAPTION_FIELDS)):
        values = [row[name] for name in names if isinstance(row, dict) and row.get(name)]
        if not values:
            raise ValueError(f"{where}: no {what}; expected a field called {', '.join(names[:-1])} or {names[-1]}")
        found.append(values[0])
    return str(found[0]), found[1]


def _json(text: bytes, where: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
