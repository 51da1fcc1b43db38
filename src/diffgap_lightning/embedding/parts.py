"""Finished parts on disk, beside the shards that they will become.

    out.parts/run.json             what is embedded, how and by which encoder; a later run must agree
    out.parts/part-0000012.npz     the rows of part 12, an embedding table (absent if all its clips were skipped)
    out.parts/part-0000012.json    its record: counts and what was skipped; written last, so it means "finished"

Every file is written under a temporary name and renamed, so a killed run leaves whole parts and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgap_lightning.atomic import check_replaceable, check_writable, replacing
from diffgap_lightning.data.manifest import MANIFEST_NAME
from diffgap_lightning.data.raw_shards import Skip
from diffgap_lightning.data.table import EmbeddingTable

RUN_NAME = "run.json"
PARTS = ".parts"


def is_finished(out: Path) -> bool:
    """Whether a folder holds all of a run's shards."""
    return (out / MANIFEST_NAME).is_file() and not out.with_name(out.name + PARTS).is_dir()


def check_out(out: Path, overwrite: bool = False) -> None:
    """Refuse a place that shards, or the parts beside them, cannot be written to, unless nothing is to be written.

    Raises:
        OSError: one sentence that names it.
    """
    if overwrite or not is_finished(out):
        check_replaceable(out, folder=True)
        check_writable(out.with_name(out.name + PARTS))


@dataclass
class PartRecord:
    """What became of one part."""

    part: int
    embedded: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    skipped: list[Skip] = field(default_factory=list)

    def to_json(self) -> str:
        """One object."""
        return json.dumps(
            {
                "part": self.part,
                "embedded": self.embedded,
                "rows": self.rows,
                "skipped": [list(s) for s in self.skipped],
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> PartRecord:
        """The inverse of `to_json`."""
        record = json.loads(text)
        return cls(record["part"], record["embedded"], record["rows"], [Skip(*s) for s in record["skipped"]])


class PartStore:
    """The folder of finished parts.

    Args:
        folder: Where it lies.
        run: What identifies the run, JSON-able.
        parts: How many parts there will be.
    """

    def __init__(self, folder: str | os.PathLike[str], run: dict[str, Any], parts: int) -> None:
        self.folder, self.parts = Path(folder), parts
        self.run: dict[str, Any] = json.loads(json.dumps(run))

    def check(self) -> None:
        """Refuse to go on with parts of another run.

        Raises:
            ValueError: with the settings that differ.
        """
        path = self.folder / RUN_NAME
        if path.is_file():
            check_same_run(path, self.run)

    def prepare(self, fresh: bool = False) -> None:
        """Make the folder, or take it over from a run that was killed; `fresh` forgets what is finished."""
        if fresh:
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        write_text(self.folder / RUN_NAME, json.dumps(self.run, indent=2, ensure_ascii=False))

    def unfinished(self) -> list[int]:
        """The parts without a record."""
        return [part for part in range(self.parts) if not self._record_path(part).is_file()]

    def write(self, record: PartRecord, table: EmbeddingTable | None) -> None:
        """Keep a finished part: its rows, then its record."""
        if table is not None:
            table.write(self._table_path(record.part))
        write_text(self._record_path(record.part), record.to_json())

    def record(self, part: int) -> PartRecord:
        """What became of a part."""
        return PartRecord.from_json(self._record_path(part).read_text(encoding="utf-8"))

    def table(self, part: int) -> EmbeddingTable | None:
        """The rows of a part; None if all its clips were skipped.

        Raises:
            ValueError: the file is damaged, or not what its record says.
        """
        record = self.record(part)
        if not record.embedded:
            return None
        table = EmbeddingTable.read(self._table_path(part), require_pairs=False)
        if table.num_rows != record.rows:
            path = self._table_path(part)
            raise ValueError(f"{path}: holds {table.num_rows} rows, its record says {record.rows}; delete both files")
        return table

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _table_path(self, part: int) -> Path:
        return self.folder / f"part-{part:07d}.npz"

    def _record_path(self, part: int) -> Path:
        return self.folder / f"part-{part:07d}.json"


def check_same_run(path: Path, run: dict[str, Any]) -> None:
    """Refuse a folder that another run wrote.

    Args:
        path: Its `run.json` or `summary.json`.
        run: This run's identity.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = record.get("run", record)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a readable record of a run ({error}); delete the folder or use another"
        ) from error
    differs = [
        f"{k}: {before.get(k)!r} there, {run.get(k)!r} now" for k in {**run, **before} if before.get(k) != run.get(k)
    ]
    if differs:
        raise ValueError(f"{path.parent}: holds another run ({_listed(differs)}); use another --out, or --overwrite")


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with replacing(path) as work:
        work.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # JSON reads it back


def _listed(items: Sequence[str], limit: int = 3) -> str:
    return "; ".join(item[:200] for item in items[:limit]) + ("; ..." if len(items) > limit else "")
