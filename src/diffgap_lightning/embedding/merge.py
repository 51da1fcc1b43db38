"""Finished parts to shards, and what a run amounts to.

For kind "rows" the rows of the parts are written as they are. For kind "pairs" each row holds one embedding of every
modality of one clip: audio and video of the same window, with each caption of the clip.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffgap_lightning.data.manifest import Manifest
from diffgap_lightning.data.raw_shards import Skip
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.embedding.parts import PartStore, write_text

SUMMARY_NAME = "summary.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass
class EmbedSummary:
    """What a run amounts to; `summary.json` beside the manifest.

    Attributes:
        clips: That were looked at.
        embedded: Clips whose every modality was embedded.
        rows: Modality -> rows before pairing.
        skipped: Reason -> clips; numbers in reasons are replaced by `#`. `skipped.jsonl` lists every one.
        pairs: Rows of the shards, for kind `"pairs"`.
        seconds: That the last run took to embed what was left.
        run: Settings, encoder and corpus.
    """

    clips: int = 0
    embedded: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    pairs: int | None = None
    seconds: float = 0.0
    run: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> EmbedSummary:
        """The summary that a finished run left beside its shards."""
        return cls(**json.loads((Path(folder) / SUMMARY_NAME).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        """A few lines for people."""
        rows = ", ".join(f"{n} {modality}" for modality, n in self.rows.items()) or "none"
        lines = [f"embedded {self.embedded} of {self.clips} clips (rows: {rows})"]
        if self.pairs is not None:
            lines[0] += f", {self.pairs} pairs"
        lines += [f"  skipped {count}: {why}" for why, count in Counter(self.skipped).most_common()]
        return "\n".join(lines)


def finish(
    store: PartStore, out: Path, *, kind: str, dtype: str, split: str | None, seed: int, seconds: float, overwrite: bool
) -> EmbedSummary:
    """Write the shards, the summary and the list of skipped clips, and remove the parts.

    Raises:
        ValueError: no clip could be embedded; a part is damaged.
    """
    summary, skipped = EmbedSummary(seconds=round(seconds, 3), run=store.run), out.parent / f".{out.name}.skipped.tmp"
    rows: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with skipped.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for part in range(store.parts):
            record = store.record(part)
            rows.update(record.rows)
            summary.embedded += record.embedded
            summary.clips += record.embedded + len(record.skipped)
            for skip in record.skipped:
                reasons[_kind_of(skip)] += 1
                file.write(json.dumps(skip._asdict(), ensure_ascii=False) + "\n")
    summary.rows, summary.skipped = dict(rows), dict(reasons.most_common())
    if not summary.embedded:
        os.replace(skipped, store.folder / SKIPPED_NAME)
        raise ValueError(
            f"{out}: none of {summary.clips} clips could be embedded; most often: {_most(reasons)}; "
            f"all are listed in {store.folder / SKIPPED_NAME}"
        )
    manifest = write_shards(store, out, kind=kind, dtype=dtype, split=split, seed=seed, overwrite=overwrite)
    summary.pairs = max(manifest.num_rows.values()) if kind == "pairs" else None
    os.replace(skipped, out / SKIPPED_NAME)
    write_text(out / SUMMARY_NAME, json.dumps(asdict(summary), indent=2, ensure_ascii=False))
    store.remove()
    return summary


def write_shards(
    store: PartStore, out: Path, *, kind: str, dtype: str, split: str | None, seed: int, overwrite: bool
) -> Manifest:
    """Block shards from the parts, in bounded memory."""
    tables = (table for part in range(store.parts) if (table := store.table(part)) is not None)
    chunks: Iterator[dict[str, Any]] = (to_pairs(t) if kind == "pairs" else to_chunk(t) for t in tables)
    return write_embedding_shards(
        chunks,
        out,
        kind=kind,
        dtype=dtype,
        seed=seed,
        split=split,
        encoder=store.run["encoder"],
        overwrite=overwrite,
    )


def to_chunk(table: EmbeddingTable) -> dict[str, Any]:
    """A table's rows as a chunk of kind `"rows"`."""
    chunk: dict[str, Any] = dict(table.columns)
    for modality in table.modalities:
        chunk[modality] = table.embeddings[modality]
        chunk[f"{modality}_id"] = table.names.get(modality, table.ids[modality].numpy())
    return chunk


def to_pairs(table: EmbeddingTable) -> dict[str, Any]:
    """A table's rows as a chunk of kind `"pairs"`: every window with every caption of its clip."""
    index = pair_rows(table)
    return to_chunk(table.select_rows({m: np.array(rows, dtype=np.int64) for m, rows in index.items()}))


def pair_rows(table: EmbeddingTable) -> dict[str, list[int]]:
    """Modality -> row numbers, the same number for all modalities: row i of each belongs together.

    Rows of media with `<modality>_start` pair where clip and start are equal; texts pair with every window of the clip.
    """
    places: dict[str, dict[tuple[int, float], list[int]]] = {}
    for modality, ids in table.ids.items():
        starts = table.columns.get(f"{modality}_start", np.zeros(len(ids)))
        groups = places.setdefault(modality, {})
        for row, key in enumerate(zip(ids.tolist(), starts.tolist(), strict=True)):
            groups.setdefault(key, []).append(row)
    media = [m for m in table.modalities if m != "text"]
    index: dict[str, list[int]] = {m: [] for m in table.modalities}
    for key, rows in (places[media[0]] if media else places["text"]).items():
        windows = [places[m].get(key, [])[:1] for m in media[1:]]
        texts = places["text"].get((key[0], 0.0), []) if "text" in places and media else rows
        if not all(windows):
            continue  # a window that another modality does not reach
        for text in texts if "text" in places else rows[:1]:
            for modality, row in zip(media, [rows[0], *(w[0] for w in windows)], strict=True):
                index[modality].append(row)
            if "text" in places:
                index["text"].append(text)
    return index


def _kind_of(skip: Skip) -> str:
    """A reason without its numbers, so that reasons can be counted."""
    return re.sub(r"\d+(\.\d+)?", "#", skip.reason)


def _most(reasons: Iterable[tuple[str, int]] | Counter[str]) -> str:
    ((reason, count),) = Counter(dict(reasons)).most_common(1) or (("", 0),)
    return f"{reason} ({count})"
