"""A generation run on disk.

    out/index.html                  the page
    out/run.json                    what decides the sounds: generator, refiner, settings; a later run must agree
    out/plain/KEY.wav (.mp4)        without the refiner (a video: `regression/`, the posterior mean alone)
    out/refined/KEY.wav (.mp4)      with it; of several candidates the best
    out/original/KEY.wav (.mp4)     a video with its own soundtrack
    out/candidates/VERSION/         the other candidates, KEY.2.wav being the second best
    out/spectrograms/               pictures
    out/records/KEY.json            the item's record, written last: it means "finished"

The folders of wavs are what `diffgap evaluate` takes. Every file is written under a temporary name and renamed, so a
run that is stopped leaves whole items and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffgap_lightning.atomic import check_writable, replacing
from diffgap_lightning.embedding.parts import check_same_run

RUN_NAME, PAGE_NAME = "run.json", "index.html"
_FOLDERS = ("plain", "regression", "refined", "original", "candidates", "spectrograms", "records")

Record = dict[str, Any]


class RunFolder:
    """The folder of a run.

    Args:
        path: Where it lies.
        run: What decides the sounds, JSON-able.
    """

    def __init__(self, path: str | os.PathLike[str], run: dict[str, Any]) -> None:
        self.path = Path(path)
        self.run: dict[str, Any] = json.loads(json.dumps(run))

    def check(self, overwrite: bool = False) -> None:
        """Refuse a folder that is not this run's to write; a run that finished nothing does not hold its folder.

        Args:
            overwrite: Another run's folder is.

        Raises:
            ValueError: the folder holds another run, or something else.
            OSError: it cannot be written to.
        """
        marker = self.path / RUN_NAME
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: exists and is not a folder; use another --out")
        if marker.is_file():
            if not overwrite and any((self.path / "records").glob("*.json")):
                check_same_run(marker, self.run)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path}: is not empty and holds no {RUN_NAME}; use an empty or new folder as --out")
        check_writable(self.path)

    def prepare(self, overwrite: bool = False) -> None:
        """Make the folder, or take over one of the same run; `overwrite` deletes what a run wrote there before."""
        self.check(overwrite)
        if overwrite:
            for name in _FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.write_text(RUN_NAME, json.dumps(self.run, indent=2, ensure_ascii=False))
        for left in self.path.rglob(".*.tmp"):  # of a run that was killed
            left.unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """The path of a file by its name in a record."""
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically."""
        with replacing(self.path / name) as work:
            work.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # JSON reads it back
        return self.path / name

    def write_record(self, record: Record) -> None:
        """Declare an item finished."""
        self.write_text(f"records/{record['key']}.json", json.dumps(record, indent=1, ensure_ascii=False))

    def record(self, key: str) -> Record | None:
        """The record of a finished item; None if it has none, or if one of its files is gone."""
        try:
            record = json.loads((self.path / "records" / f"{key}.json").read_text(encoding="utf-8"))
            whole = all(self.file(name).is_file() for name in files_of(record))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if whole else None


def files_of(record: Record) -> list[str]:
    """Names of all files that a record speaks of."""
    parts = [part for version in record["versions"] for part in (version, *version.get("candidates", ()))]
    return [part[kind] for part in parts for kind in ("audio", "video", "picture") if part.get(kind)]
