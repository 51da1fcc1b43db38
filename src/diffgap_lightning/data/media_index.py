"""Finding downloaded clips on disk: a folder's media by file stem, and the names that downloaders commonly give.

For a clip of YouTube video `y` from s to e seconds (or ms milliseconds), these stems are tried in order, each also with
the letter `Y` before it, as AudioSet tools write:

    y_s    y_s_e    y_ms_ms    y_ssssss (six digits)    y_s.000_e.000    y_ms    <the row's own number>    y

All but the last say which part of the video they hold. A file named `y` alone may be the whole video: see
`Media.maybe_cut`. Where several files match, the earlier stem wins, then the earlier extension, then the earlier path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffgap_lightning.data.media import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS, Media

_ORDER = {extension: i for i, extension in enumerate((*AUDIO_EXTENSIONS, *VIDEO_EXTENSIONS))}


class MediaIndex:
    """The media files below a folder, by stem.

    Args:
        folder: Searched with its subfolders; links are followed.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of media")
        self._files: dict[str, list[str]] = {}
        for path in _walk(self.folder):
            stem, _, extension = os.path.basename(path).rpartition(".")
            if extension.lower() in _ORDER:
                self._files.setdefault(stem, []).append(path)
        for paths in self._files.values():
            paths.sort(key=lambda p: (_ORDER[p.rpartition(".")[2].lower()], p))

    def __len__(self) -> int:
        """Number of files."""
        return sum(len(paths) for paths in self._files.values())

    def find(self, stems: Iterable[str], extensions: tuple[str, ...]) -> Path | None:
        """The first file with one of the stems and one of the extensions."""
        for stem in stems:
            for path in self._files.get(stem, ()):
                if path.rpartition(".")[2].lower() in extensions:
                    return Path(path)
        return None

    def find_clip(
        self, youtube_id: str, start: float, duration: float, number: str = ""
    ) -> tuple[Media | None, Media | None]:
        """`(audio, video)` of a YouTube clip; a container serves as audio where there is no audio file.

        Args:
            youtube_id: 11 characters.
            start: In s.
            duration: In s.
            number: The row's own number, where the catalog has one.
        """
        cut = list(_cut_stems(youtube_id, start, duration, number))
        whole = [youtube_id, f"Y{youtube_id}"]
        found = []
        for extensions in ((*AUDIO_EXTENSIONS, *VIDEO_EXTENSIONS), VIDEO_EXTENSIONS):
            media = None
            if path := self.find(cut, extensions):
                media = Media(path, duration=duration)
            elif path := self.find(whole, extensions):
                media = Media(path, start=start, duration=duration, maybe_cut=True)
            found.append(media)
        return found[0], found[1]


def _cut_stems(youtube_id: str, start: float, duration: float, number: str) -> Iterator[str]:
    """Stems that name one clip of a video; see the module's text."""
    end = start + duration
    s, e = f"{start:g}", f"{end:g}"
    stems = [f"_{s}", f"_{s}_{e}", f"_{start * 1000:.0f}_{end * 1000:.0f}", f"_{int(start):06d}"]
    stems += [f"_{start:.3f}_{end:.3f}", f"_{start * 1000:.0f}"]
    for stem in stems:
        yield youtube_id + stem
        yield f"Y{youtube_id}{stem}"
    if number:
        yield number


def _walk(folder: Path) -> Iterator[str]:
    """Every file below a folder, each real folder once however many links lead to it."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(root, name) for name in files)
