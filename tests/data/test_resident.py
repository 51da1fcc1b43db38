"""Batches that are gathered on the device are the batches that the loader would have gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from diffgap_lightning.data import SyntheticDataModule, SyntheticWorld
from diffgap_lightning.data.batches import PairBatches
from diffgap_lightning.data.resident import ResidentRows, fits


def test_row_numbers_stand_for_the_same_batch_where_clips_have_several_captions() -> None:
    g = torch.Generator().manual_seed(0)
    rows = {"audio": torch.randn(9, 4, generator=g), "text": torch.randn(14, 3, generator=g)}
    ids = {"audio": torch.arange(9) % 7, "text": torch.arange(14) % 5}
    plain, numbers = (PairBatches(rows, ids, 5, seed=3, drop_last=False, rows_only=r) for r in (False, True))
    resident = ResidentRows(rows, ids, torch.device("cpu"))
    assert len(numbers) == len(plain) > 2
    for epoch in range(2):
        for step in range(len(plain)):
            named = numbers[epoch, step]
            assert set(named) == {"audio_row", "text_row"}
            torch.testing.assert_close(resident.gather(named), plain[epoch, step], rtol=0, atol=0)


class Watch(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * batch["audio"].mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen.append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_fit_sees_the_same_batches(tmp_path: Path) -> None:
    world, seen = SyntheticWorld(latent_dim=6, num_concepts=4, dim=12, hidden_dim=24), []
    for resident in (True, False, None):
        module = Watch()
        data = SyntheticDataModule(40, 10, 0, batch_size=8, world=world, resident=resident)
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        seen.append(module.seen)
    assert len(seen[0]) == 2 * (5 + 2)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[2], seen[1], rtol=0, atol=0)


def test_rows_stay_on_a_gpu_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"audio": torch.zeros(100, 8), "text": torch.zeros(50, 8)}
    assert not fits(rows, torch.device("cpu"))
    for free, fit in ((4 * 4800, True), (4 * 4800 - 4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert fits(rows, torch.device("cuda", 0)) is fit
