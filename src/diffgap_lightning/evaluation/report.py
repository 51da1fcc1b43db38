"""What a comparison looks like as text and as JSON; `page` makes the HTML from the same cells."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffgap_lightning.atomic import replacing

Record = Mapping[str, Any]

LEGEND = "* the best bridge; + or -: R@1 above or below the best bridge's, the paired 95% interval excludes 0"
HOW_TO_READ = (
    "R@1, R@5, R@10: share of queries with a positive among the first 1, 5, 10 candidates; ties count in their favour.",
    "95% interval: bootstrap over whole ids, the same draws for every method.",
    LEGEND,
    "cosine: produced to true embedding, over positive pairs. MMD² and Fréchet: distance between the set of produced "
    "and the set of true embeddings, less is better (MMD²: Gaussian kernel of median bandwidth, unbiased, so it may be "
    "below 0 by chance; Fréchet: squared, with Ledoit-Wolf covariances).",
    "optimum: the exact optimal score of the synthetic world; it ranks, and produces no embedding.",
)

COLUMNS = (
    ("R@1", "r1", "{:.3f}"),
    ("95% interval", "r1_ci", "{0[0]:.3f} {0[1]:.3f}"),
    ("R@5", "r5", "{:.3f}"),
    ("R@10", "r10", "{:.3f}"),
    ("median", "median_rank", "{:g}"),
    ("mAP@10", "map10", "{:.3f}"),
    ("cosine", "cosine", "{:.3f}"),
    ("MMD²x1000", "mmd2", "{:.1f}"),
    ("Fréchet", "frechet", "{:.3f}"),
)


def cells(record: Record) -> list[str]:
    """A record's figures as the tables print them; "-" where there is none."""
    values = {**record, "mmd2": None if record["mmd2"] is None else round(1000 * record["mmd2"], 1) + 0.0}
    return ["-" if values[key] is None else form.format(values[key]) for _, key, form in COLUMNS]


def mark(record: Record) -> str:
    """`*` the best bridge, `+`/`-` reliably better/worse than it, else nothing."""
    if "best_bridge" not in record:
        return ""
    if record["method"] == record["best_bridge"]:
        return "*"
    low, high = record["r1_minus_best_bridge_ci"]
    return "+" if low > 0 else "-" if high < 0 else ""


def format_table(records: Sequence[Record]) -> str:
    """The records as a text table, one block a direction."""
    blocks = []
    for direction, rows in by_direction(records).items():
        lines = [["method", "", *(title for title, _, _ in COLUMNS)]]
        lines += [[str(r["method"]), mark(r), *cells(r)] for r in rows]
        width = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, width, strict=True))
            )
            for line in lines
        ]
        blocks.append("\n".join([heading(direction, rows[0]), "-" * len(text[0]), *(t.rstrip() for t in text)]))
    return "\n\n".join(blocks)


def by_direction(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each direction, in the order of their first appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["direction"], []).append(record)
    return groups


def heading(direction: str, record: Record) -> str:
    """`text to audio: 100 queries, 80 candidates`."""
    return f"{direction.replace('_', ' ')}: {record['n_query']} queries, {record['n_gallery']} candidates"


def write_json(path: str | os.PathLike[str], records: Sequence[Record]) -> Path:
    """Write the records as a JSON list; a reader sees the whole file or none."""
    return write_atomically(Path(path), (json.dumps(list(records), indent=2, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name and rename it; a reader sees the whole file or none."""
    with replacing(path) as work:
        work.write_bytes(content)
    return path
