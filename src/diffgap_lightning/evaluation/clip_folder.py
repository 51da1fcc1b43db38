"""Folders of clips as features: files are matched by name, what cannot be used is counted against a budget and named.

A clip's key is its path within the folder without the suffix, so `generated/a/rain.wav` is the pair of
`reference/a/rain.flac`. Files that are not audio or video (pages, pictures, records) and hidden ones are not clips,
and a video beside a sound of the same name gives way to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.media import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS, Media, MediaError
from diffgap_lightning.evaluation.features import FeatureExtractor, Features

SUFFIXES = {f".{extension}" for extension in (*AUDIO_EXTENSIONS, *VIDEO_EXTENSIONS)}
_BATCH = 16  # clips in memory at a time, and as many decoded ahead
Progress = Callable[[Iterable[list[str]], str], Iterable[list[str]]]


@dataclass(frozen=True)
class ClipFolder:
    """The clips of one folder.

    Attributes:
        path: Of the folder.
        clips: Key -> file, sorted by key.
    """

    path: Path
    clips: Mapping[str, Path]

    @staticmethod
    def open(path: str | os.PathLike[str]) -> ClipFolder:
        """List a folder and its subfolders.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: fewer than two clips, or two of one key.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of clips")
        clips: dict[str, Path] = {}
        for file in sorted(folder.rglob("*")):
            inner = file.relative_to(folder)
            if file.suffix.lower() not in SUFFIXES or not file.is_file() or any(p.startswith(".") for p in inner.parts):
                continue
            key = inner.with_suffix("").as_posix()
            pair = sorted((clips.get(key, file), file), key=_is_video)
            if key in clips and _is_video(pair[0]) == _is_video(pair[1]):
                raise ValueError(f"{folder}: {clips[key].name} and {file.name} are both clip {key!r}; keep one of them")
            clips[key] = pair[0]
        if len(clips) < 2:
            raise ValueError(
                f"{folder}: holds {len(clips)} clip{'s' * (len(clips) != 1)}, expected at least 2: the metrics compare "
                f"distributions, and one clip has no spread ({', '.join(sorted(s[1:] for s in SUFFIXES))} are read)"
            )
        return ClipFolder(folder, dict(sorted(clips.items())))


class Extracted(NamedTuple):
    """Of one folder: keys of the usable clips, their features in this order, and file -> why it cannot be used."""

    keys: list[str]
    features: Features
    failures: dict[str, str]


def extract(
    folder: ClipFolder, extractor: FeatureExtractor, error_budget: float = 0.0, progress: Progress | None = None
) -> Extracted:
    """Features of the folder's clips.

    Args:
        folder: What to read.
        extractor: What to extract.
        error_budget: The share of the clips that may be unreadable or too short.
        progress: Wraps the batches of keys, with a text.

    Raises:
        ValueError: more failed than the budget allows, or fewer than two clips are left.
    """
    if not 0 <= error_budget <= 1:
        raise ValueError(f"error_budget: got {error_budget}, expected a share of the clips from 0 to 1")
    parts: list[Features] = []
    keys: list[str] = []
    failures: dict[str, str] = {}
    for results in _decoded(folder, extractor, progress):
        failures |= {str(folder.clips[key]): result for key, result in results.items() if isinstance(result, str)}
        if len(failures) > error_budget * len(folder.clips):
            raise ValueError(
                f"{folder.path}: at least {len(failures)} of {len(folder.clips)} clips cannot be used, error_budget "
                f"allows {error_budget:.0%}: {some([f'{file} ({why})' for file, why in failures.items()])}; repair or "
                "remove them, or allow more"
            )
        clips = {key: result for key, result in results.items() if not isinstance(result, str)}
        if clips:
            keys += clips
            parts.append(extractor(list(clips.values())))
    if len(keys) < 2:
        raise ValueError(f"{folder.path}: {len(keys)} usable clips, expected at least 2")
    return Extracted(keys, Features.join(parts), failures)


def _decoded(
    folder: ClipFolder, extractor: FeatureExtractor, progress: Progress | None
) -> Iterator[dict[str, Tensor | str]]:
    """Batches of key -> waveform or reason; the next one is decoded while the network works on this one."""
    keys = list(folder.clips)
    batches = [keys[k : k + _BATCH] for k in range(0, len(keys), _BATCH)]
    told = progress(batches, f"{folder.path.name}: {extractor.name}") if progress else batches
    with ThreadPoolExecutor(max_workers=2) as pool:

        def ahead(batch: Sequence[str]) -> dict[str, Future[Tensor | str]]:
            return {key: pool.submit(_decode, folder.clips[key], extractor) for key in batch}

        waiting = ahead(batches[0])
        for number, _ in enumerate(told, 1):
            results, waiting = waiting, ahead(batches[number]) if number < len(batches) else {}
            yield {key: future.result() for key, future in results.items()}


def _decode(file: Path, extractor: FeatureExtractor) -> Tensor | str:
    """The whole clip at the extractor's rate, or why it cannot be used."""
    try:
        (_, waveform), *_ = audio_windows(Media(file), extractor.sample_rate, first_only=True)
    except MediaError as error:
        return str(error)
    seconds = len(waveform) / extractor.sample_rate
    if seconds < extractor.min_seconds:
        return f"{seconds:.2f} s, {extractor.name} needs {extractor.min_seconds:g} s"
    return waveform


def _is_video(file: Path) -> bool:
    return file.suffix.lower()[1:] in VIDEO_EXTENSIONS


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
