"""`RefinedEmbeddingWriter`: what `diffgap predict` refines, as a table or as block shards.

The module's `predict_step` gives, for each direction, `text_to_audio` (B, D), `text_to_audio_id` (B,) and
`text_to_audio_row` (B,). Every rank writes its rows to temporary parts; when all are done rank 0 puts them together,
each row of the split once however often a sampler repeated it. The result holds one "modality" a direction, named as
above:

    table     `<direction>` (N, D), `<direction>_id` (N,), `<direction>_row` (N,), in the order of the split's rows
    shards    the same of kind "rows", in the order in which they were made: sort by row, or join by id
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from diffgap_lightning.atomic import check_replaceable
from diffgap_lightning.data.arrays import SUFFIXES, read_arrays, write_arrays
from diffgap_lightning.data.manifest import MANIFEST_NAME
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.table import EmbeddingTable

Rows = dict[str, np.ndarray]


class RefinedEmbeddingWriter(BasePredictionWriter):
    """Writes refined embeddings; add it to the trainer's callbacks. The trainer then returns no predictions.

    Args:
        path: A `.npz` or `.safetensors` file for a table, any other name for a folder of shards. Its folder must be
            visible to all ranks.
        dtype: `"float16"` or `"float32"`.
        overwrite: Replace what is there.
        rows_per_part: Rows that a rank holds before it writes them out.

    Raises:
        ValueError: the path is taken, or another dtype.
    """

    def __init__(self, path: str, dtype: str = "float32", overwrite: bool = False, rows_per_part: int = 65_536) -> None:
        super().__init__(write_interval="batch")
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype: got {dtype!r}, expected 'float16' or 'float32'")
        self.path, self.dtype, self.overwrite, self.rows_per_part = Path(path), dtype, overwrite, rows_per_part
        self.parts = self.path.with_name(f"{self.path.name}.parts")
        self._held: dict[str, list[Rows]] = {}
        self._written, self._started = 0, False

    @property
    def as_table(self) -> bool:
        """Whether the result is one file."""
        return self.path.suffix in SUFFIXES

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a path in use, before anything is computed; forget what a killed run left."""
        taken = self.path.is_file() if self.as_table else (self.path / MANIFEST_NAME).is_file()
        if taken and not self.overwrite:
            raise ValueError(f"{self.path}: exists; choose another path or set overwrite")
        if trainer.is_global_zero:
            check_replaceable(self.path, folder=not self.as_table)
        trainer.predict_loop.return_predictions = False  # they are in files, and may be more than memory holds
        self._held, self._written, self._started = {}, 0, True
        if trainer.is_global_zero:
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(parents=True)
        trainer.strategy.barrier("refined: start")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a prediction without a single batch, for which Lightning calls no other hook."""
        if stage == "predict" and not self._started:
            raise ValueError(f"{self.path}: nothing was refined, because the prediction split has no rows")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Mapping[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hold a batch's rows, and write them out when there are many."""
        for direction in directions_of(prediction):
            rows = {"rows": prediction[direction].float().cpu().numpy().astype(self.dtype)}
            rows |= {name: prediction[f"{direction}_{name}"].cpu().numpy() for name in ("id", "row")}
            if len(rows["rows"]):
                self._held.setdefault(direction, []).append(rows)
        if sum(len(r["row"]) for held in self._held.values() for r in held) >= self.rows_per_part:
            self._flush(trainer.global_rank)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rest; rank 0 puts the parts of all ranks together."""
        self._flush(trainer.global_rank)
        trainer.strategy.barrier("refined: end")
        if not trainer.is_global_zero:
            return
        encoder = getattr(getattr(trainer, "datamodule", None), "encoder", None)
        write = self._write_table if self.as_table else self._write_shards
        counts = write(encoder)
        shutil.rmtree(self.parts, ignore_errors=True)
        listed = ", ".join(f"{count} {direction}" for direction, count in counts.items())
        print(f"refined: {listed} -> {self.path}", file=sys.stderr)

    def _flush(self, rank: int) -> None:
        """One part file for each direction held."""
        for direction, held in self._held.items():
            arrays: Rows = {name: np.concatenate([rows[name] for rows in held]) for name in held[0]}
            write_arrays(self.parts / f"{direction}-{rank:05d}-{self._written:06d}.npz", arrays)
            self._written += 1
        self._held = {}

    def _unique(self) -> dict[str, Iterator[Rows]]:
        """Direction -> the parts of all ranks, each row once."""
        paths: dict[str, list[Path]] = {}
        for path in sorted(self.parts.glob("*.npz")):
            paths.setdefault(path.stem.rsplit("-", 2)[0], []).append(path)
        return {direction: unique_rows(own) for direction, own in paths.items()}

    def _write_shards(self, encoder: str | None) -> dict[str, int]:
        parts = self._unique()
        first = [_chunk(direction, next(rows)) for direction, rows in parts.items()]
        rest = (_chunk(direction, rows) for direction, iterator in parts.items() for rows in iterator)
        chunks = chain([{name: array for chunk in first for name, array in chunk.items()}], rest)
        return write_embedding_shards(
            chunks, self.path, kind="rows", dtype=self.dtype, encoder=encoder, overwrite=self.overwrite
        ).num_rows

    def _write_table(self, encoder: str | None) -> dict[str, int]:
        table = EmbeddingTable({}, {}, encoder=encoder)
        for direction, iterator in self._unique().items():
            parts = list(iterator)
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            order = np.argsort(joined["row"])
            table.embeddings[direction] = torch.from_numpy(joined["rows"][order])
            table.ids[direction] = torch.from_numpy(joined["id"][order])
            table.columns[f"{direction}_row"] = joined["row"][order]
        table.write(self.path)
        return table.num_rows


def unique_rows(paths: Sequence[Path]) -> Iterator[Rows]:
    """The rows of part files, those with a row number that came before left out; it holds one byte a row."""
    seen = np.zeros(0, dtype=bool)
    for path in paths:
        arrays = {name: np.asarray(array) for name, array in read_arrays(path).items()}
        numbers, first = np.unique(arrays["row"], return_index=True)
        seen = np.pad(seen, (0, max(0, int(numbers[-1]) + 1 - len(seen))))
        new = np.sort(first[~seen[numbers]])
        seen[numbers] = True
        if len(new):
            yield {name: array[new] for name, array in arrays.items()}


def _chunk(direction: str, rows: Rows) -> Rows:
    return {direction: rows["rows"], f"{direction}_id": rows["id"], f"{direction}_row": rows["row"]}


def directions_of(prediction: Mapping[str, Tensor]) -> list[str]:
    """The directions that a prediction holds.

    Raises:
        ValueError: none, so this is no prediction of a refiner.
    """
    names = [name for name in prediction if f"{name}_id" in prediction and f"{name}_row" in prediction]
    if not names:
        raise ValueError(
            f"prediction: got {sorted(prediction)}, expected <source>_to_<target> with <source>_to_<target>_id and _row"
        )
    return names
