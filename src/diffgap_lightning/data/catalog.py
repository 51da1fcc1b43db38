"""Catalogs: which clips a corpus has, and where the media and captions of each lie.

    audiocaps   audiocap_id,youtube_id,start_time,caption            header; 10 s clips; one row a caption
    vggsound    youtube_id,start_seconds,label,split                 no header; 10 s clips
    csv         id[,audio][,video][,text][,split][,start][,end]      header, any order, further columns ignored
    jsonl       the same fields as JSON objects; text may be a list

Rows with one id are one clip with several texts. The official formats name no files: `MediaIndex` finds them in a
folder. A clip whose media are not there stays in the catalog (`Catalog.missing` lists it). A malformed row raises
`ValueError` with file, line and field.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffgap_lightning.data.catalog_rows import Where, csv_objects, csv_rows, jsonl_objects
from diffgap_lightning.data.media import Media
from diffgap_lightning.data.media_index import MediaIndex

FORMATS = ("audiocaps", "vggsound", "csv", "jsonl")
CLIP_SECONDS = 10.0  # of AudioCaps and VGGSound
_AUDIOCAPS = ("audiocap_id", "youtube_id", "start_time", "caption")
_MEDIA_FIELDS = ("audio", "video", "text")
_SPLITS = {"valid": "val", "validation": "val", "dev": "val", "training": "train", "testing": "test"}


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip of a corpus.

    Args:
        id: Unique in its catalog; equal ids make positive pairs later.
        texts: Captions or the label; may be empty.
        audio: Where its sound lies; None if nothing was found.
        video: Where its frames lie; None if nothing was found.
        split: `"train"`, `"val"`, `"test"` or another name; None if the catalog does not say.
    """

    id: str
    texts: tuple[str, ...] = ()
    audio: Media | None = None
    video: Media | None = None
    split: str | None = None


@dataclass(frozen=True)
class Catalog:
    """The clips of a catalog file, in the file's order."""

    path: Path
    clips: list[Clip]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.clips)

    @property
    def splits(self) -> dict[str | None, int]:
        """Split -> number of clips."""
        counts: dict[str | None, int] = {}
        for clip in self.clips:
            counts[clip.split] = counts.get(clip.split, 0) + 1
        return counts

    def select(self, split: str) -> Catalog:
        """The clips of one split.

        Raises:
            ValueError: the catalog has no such split.
        """
        name = _SPLITS.get(split, split)
        if name not in self.splits:
            found = ", ".join(f"{k} ({v})" for k, v in self.splits.items() if k) or "none: it has no split column"
            raise ValueError(f"{self.path}: no clips of split {split!r}; it has {found}")
        return Catalog(self.path, [clip for clip in self.clips if clip.split == name])

    def missing(self, modality: str) -> list[Clip]:
        """The clips without a file (or text) of a modality."""
        return [clip for clip in self.clips if not _has(clip, modality)]


def read_catalog(
    path: str | os.PathLike[str], media: str | os.PathLike[str] | None = None, format: str = "auto"
) -> Catalog:
    """Read a catalog.

    Args:
        path: The CSV or JSONL file.
        media: The folder of downloaded media. The official formats search it; the generic ones take their paths
            relative to it (by default relative to the catalog's folder).
        format: One of `FORMATS`, or `"auto"` to tell by suffix and first line.

    Raises:
        FileNotFoundError: the catalog or the folder does not exist.
        ValueError: malformed; one line naming file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such catalog")
    kind = _detect(path) if format == "auto" else format
    if kind not in FORMATS:
        raise ValueError(f"{path}: unknown catalog format {kind!r}; expected auto, {', '.join(FORMATS)}")
    if kind in ("csv", "jsonl"):
        base = Path(media) if media is not None else path.parent
        if not base.is_dir():
            raise FileNotFoundError(f"{base}: no such folder of media")
        rows = csv_objects(path, ("id",), _MEDIA_FIELDS) if kind == "csv" else jsonl_objects(path)
        clips: _Rows = (_generic_clip(where, row, base) for where, row in rows)
    else:
        index = MediaIndex(media) if media is not None else None
        clips = _audiocaps(path, index) if kind == "audiocaps" else _vggsound(path, index)
    merged = _merge(clips, strict=kind in ("csv", "jsonl"))
    if not merged:
        raise ValueError(f"{path}: no rows; the catalog is empty")
    return Catalog(path, merged)


_Rows = Iterator[tuple[Where, Clip]]


def _audiocaps(path: Path, index: MediaIndex | None) -> _Rows:
    for where, row in csv_objects(path, required=_AUDIOCAPS):
        number = where.word("audiocap_id", row["audiocap_id"])
        caption = where.word("caption", row["caption"])
        yield where, _youtube_clip(where, row["youtube_id"], "start_time", row["start_time"], caption, index, number)


def _vggsound(path: Path, index: MediaIndex | None) -> _Rows:
    for where, row in csv_rows(path):
        if len(row) != 4:
            raise where.error("split", f"got {len(row)} columns, expected youtube_id,start_seconds,label,split")
        clip = _youtube_clip(where, row[0], "start_seconds", row[1], where.word("label", row[2]), index)
        yield where, replace(clip, split=_split(where.word("split", row[3])))


def _youtube_clip(
    where: Where, youtube_id: str, start_field: str, start: str, text: str, index: MediaIndex | None, number: str = ""
) -> Clip:
    name = where.word("youtube_id", youtube_id)
    if "/" in name or "\\" in name or name.startswith("."):
        raise where.error("youtube_id", f"got {name!r}, expected a YouTube id (letters, digits, - and _)")
    begin = where.seconds(start_field, start)
    audio, video = (None, None) if index is None else index.find_clip(name, begin, CLIP_SECONDS, number)
    return Clip(f"{name}_{begin:g}", (text,), audio, video)


def _generic_clip(where: Where, row: dict[str, Any], base: Path) -> tuple[Where, Clip]:
    texts = row.get("text") or ()
    texts = (texts,) if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple):
        raise where.error("text", f"got {row['text']!r}, expected a string or a list of strings")
    begin = where.seconds("start", row["start"]) if row.get("start") not in (None, "") else 0.0
    duration = None
    if row.get("end") not in (None, ""):
        duration = where.seconds("end", row["end"]) - begin
        if duration <= 0:
            raise where.error("end", f"got {row['end']!r}, expected more than the start, {begin:g} s")
    media = {}
    for field in ("audio", "video"):
        if row.get(field):
            media[field] = Media(_file(where, field, row[field], base), start=begin, duration=duration)
    clip = Clip(
        where.word("id", row.get("id")),
        tuple(where.word("text", text) for text in texts),
        split=_split(where.word("split", row["split"])) if row.get("split") else None,
        **media,
    )
    if not (clip.audio or clip.video or clip.texts):
        raise where.error("audio, video, text", "all empty; a clip needs at least one of them")
    return where, clip


def _file(where: Where, field: str, value: object, base: Path) -> Path:
    """The file that a row names, exactly; spaces around a name are left out where they are no part of one."""
    if isinstance(value, str) and os.path.exists(base / value):
        return base / value
    return base / where.word(field, value)


def _merge(rows: _Rows, strict: bool) -> list[Clip]:
    """One clip an id: rows with the same id add their texts; if `strict` they must agree on everything else."""
    clips: dict[str, Clip] = {}
    for where, clip in rows:
        before = clips.get(clip.id)
        if before is None:
            clips[clip.id] = clip
            continue
        for field in ("audio", "video", "split"):
            old, new = getattr(before, field), getattr(clip, field)
            if strict and None not in (old, new) and old != new:
                found = getattr(new, "source", new)
                raise where.error(field, f"got {str(found)!r}, an earlier row of id {clip.id!r} has another")
        clips[clip.id] = replace(
            before,
            texts=before.texts + clip.texts,
            audio=before.audio or clip.audio,
            video=before.video or clip.video,
            split=before.split or clip.split,
        )
    return list(clips.values())


def _has(clip: Clip, modality: str) -> bool:
    if modality == "text":
        return bool(clip.texts)
    media = clip.audio if modality == "audio" else clip.video
    return media is not None and (isinstance(media.source, bytes) or os.path.isfile(media.source))


def _split(name: str) -> str:
    return _SPLITS.get(name.lower(), name.lower())


def _detect(path: Path) -> str:
    """The format, by suffix and first line."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "jsonl"
    _, first = next(csv_rows(path), (None, []))
    if {"youtube_id", "caption"} <= set(first):
        return "audiocaps"
    if "id" in first:
        return "csv"
    if len(first) == 4 and first[1].strip().replace(".", "", 1).isdigit():
        return "vggsound"
    raise ValueError(
        f"{path}, line 1: cannot tell the catalog's format from {','.join(first)[:80]!r}; expected the header of "
        f"AudioCaps ({','.join(_AUDIOCAPS)}), one with id, or VGGSound rows; or give the format"
    )
