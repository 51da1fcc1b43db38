"""`EmbedModule`: an encoder in Lightning's predict loop, over this rank's share of the unfinished parts.

Rank 0 lists the unfinished parts and tells the others, so that all ranks cut the same list: rank r takes parts
r, r + world, ... Loader workers decode while the encoder runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from diffgap_lightning.data.raw_shards import Skip
from diffgap_lightning.embedding.corpus import Corpus
from diffgap_lightning.embedding.decode import ClipDecoder, EmbedSettings
from diffgap_lightning.embedding.parts import PartStore
from diffgap_lightning.embedding.stream import Packed, PartBatch, PartStream, part_loader
from diffgap_lightning.encoders.base import ContrastiveEncoder, unit


@dataclass
class EncodedBatch:
    """The rows of a `PartBatch`.

    Attributes:
        part: Which part.
        ids: Of the clips that were embedded.
        rows: Modality -> `(n, D)` float32 unit rows.
        owners: Modality -> the clip of each row, as an index into `ids`.
        starts: Modality -> start of each row in its clip, in s.
        texts: The texts behind the rows of `"text"`.
        skips: Clips that could not be used.
        last: The part ends here.
    """

    part: int
    ids: list[str]
    rows: dict[str, np.ndarray]
    owners: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]
    texts: list[str] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    last: bool = False


class EmbedModule(LightningModule):
    """Runs an encoder over the batches of this rank's parts.

    Args:
        encoder: Embeds.
        corpus: The clips.
        store: Knows which parts are finished.
        settings: Modalities and windows.
        batch_size: Clips a batch, and most items that the encoder gets at a time.
        num_workers: Processes that decode; 0 decodes between the encoder's batches.
        fresh: Forget parts that are finished.
    """

    def __init__(
        self,
        encoder: ContrastiveEncoder,
        corpus: Corpus,
        store: PartStore,
        settings: EmbedSettings,
        batch_size: int,
        num_workers: int,
        fresh: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.corpus, self.store, self.settings = encoder.eval(), corpus, store, settings
        self.batch_size, self.num_workers, self.fresh = batch_size, num_workers, fresh
        self.parts: list[int] = []

    def predict_dataloader(self) -> Any:
        """The batches of this rank's share of the unfinished parts."""
        todo: list[int] = []
        if self.global_rank == 0:
            self.store.prepare(self.fresh)
            todo = self.store.unfinished()
        todo = self.trainer.strategy.broadcast(todo, src=0)
        self.parts = todo[self.global_rank :: self.trainer.world_size]
        stream = PartStream(self.corpus, self.parts, ClipDecoder(self.settings, self.encoder), self.batch_size)
        return part_loader(stream, self.num_workers, pin_memory=self.device.type == "cuda")

    def transfer_batch_to_device(self, batch: PartBatch, device: torch.device, dataloader_idx: int) -> PartBatch:
        """Leave the batch where it is: `predict_step` moves what the encoder takes at a time."""
        return batch

    def predict_step(self, batch: PartBatch, batch_idx: int = 0) -> EncodedBatch:
        """Embed every modality, at most `batch_size` items at a time."""
        rows = {m: self._embed(m, items) for m, items in batch.items.items()}
        owners = {m: np.array(index) for m, index in batch.owners.items()}
        starts = {m: np.array(s, dtype=np.float32) for m, s in batch.starts.items()}
        if self.settings.windows == "mean":
            for modality in set(rows) - {"text"}:
                rows[modality] = window_means(rows[modality], owners[modality], len(batch.ids))
                owners[modality] = np.arange(len(batch.ids))
                starts[modality] = np.zeros(len(batch.ids), dtype=np.float32)
        texts = batch.items.get("text", [])
        encoded = EncodedBatch(batch.part, batch.ids, {m: r.numpy() for m, r in rows.items()}, owners, starts)
        encoded.texts = texts if isinstance(texts, list) else []
        encoded.skips, encoded.last = batch.skips, batch.last
        return drop_bad_rows(encoded)

    def _embed(self, modality: str, items: Packed | list[str]) -> Tensor:
        """`(n, D)` float32 on the CPU; equal texts are embedded once."""
        if not isinstance(items, Packed):
            unique = sorted(set(items))
            place = {text: i for i, text in enumerate(unique)}
            chunks = [unique[i : i + self.batch_size] for i in range(0, len(unique), self.batch_size)]
            rows = torch.cat([unit(self.encoder.embed(modality, chunk)).cpu() for chunk in chunks])
            return rows[torch.tensor([place[text] for text in items])]
        rows_of = []
        for i in range(0, len(items.shapes), self.batch_size):
            chunk = items.slice(i, i + self.batch_size)
            data = chunk.data.to(self.device, non_blocking=True)
            rows_of.append(unit(self.encoder.embed(modality, chunk.unpack(data))).cpu())
        return torch.cat(rows_of)


def window_means(rows: Tensor, owners: np.ndarray, clips: int) -> Tensor:
    """`(clips, D)` normalised means of the rows of each clip."""
    sums = rows.new_zeros(clips, rows.shape[1]).index_add_(0, torch.from_numpy(owners), rows)
    return unit(sums)


def drop_bad_rows(batch: EncodedBatch) -> EncodedBatch:
    """Turn clips for which the encoder gave NaN or zero vectors into skipped ones."""
    bad: dict[int, str] = {}
    for modality, rows in batch.rows.items():
        norm = np.linalg.norm(rows, axis=1)
        for row in np.flatnonzero(~(np.abs(norm - 1) < 1e-2)):
            bad.setdefault(int(batch.owners[modality][row]), modality)
    if not bad:
        return batch
    kept = [i for i in range(len(batch.ids)) if i not in bad]
    number = {old: new for new, old in enumerate(kept)}
    for modality, owners in batch.owners.items():
        mask = np.array([int(owner) in number for owner in owners], dtype=bool)
        batch.rows[modality], batch.starts[modality] = batch.rows[modality][mask], batch.starts[modality][mask]
        batch.owners[modality] = np.array([number[int(owner)] for owner in owners[mask]], dtype=np.int64)
        if modality == "text":
            batch.texts = [text for text, keep in zip(batch.texts, mask, strict=True) if keep]
    reason = "the encoder gave NaN or a zero vector"
    batch.skips = [*batch.skips, *(Skip(batch.ids[i], f"{modality}: {reason}") for i, modality in bad.items())]
    batch.ids = [batch.ids[i] for i in kept]
    return batch
