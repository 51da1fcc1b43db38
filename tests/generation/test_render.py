from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn.functional import normalize

from diffgap_lightning.data.datamodules import EmbeddingDataModule
from diffgap_lightning.data.mux import read_wav
from diffgap_lightning.data.table import EmbeddingTable
from diffgap_lightning.generation.render import RenderSamples
from diffgap_lightning.training.module import DiffGAPModule

pytest.importorskip("soundfile", reason="needs the extra media")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(300, 8, generator=g)
    rows = {m: normalize(latent @ torch.randn(8, 32, generator=g) + 1.0, dim=1) for m in ("text", "audio")}
    EmbeddingTable(rows, dict.fromkeys(rows, torch.arange(300))).write(tmp_path / "table.npz")
    return tmp_path / "table.npz"


def fit(folder: Path, table: Path, callback: RenderSamples, epochs: int, **options: Any) -> DiffGAPModule:
    module = DiffGAPModule(pairs=[("text", "audio")], width=16, depth=1, rank=6)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[callback], default_root_dir=folder, num_sanity_val_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        logger=TensorBoardLogger(folder, name="log"), **options,
    )  # fmt: skip
    trainer.fit(module, EmbeddingDataModule(str(table), batch_size=64))
    return module


@pytest.mark.slow
def test_prompts_are_heard_during_training(tmp_path: Path, table: Path, generator_folder: Path) -> None:
    callback = RenderSamples(
        ["a dog", "rain"], model=str(generator_folder), every_n_epochs=2, seconds=0.2, num_steps=2, device="cpu"
    )
    module = fit(tmp_path / "run", table, callback, epochs=4)
    renders = tmp_path / "run" / "renders"
    assert sorted(p.name for p in renders.iterdir()) == ["epoch-0000", "epoch-0002"]
    assert (renders / "epoch-0002" / "index.html").read_text().count("<article") == 2
    key = callback.items[0].key
    plain = [read_wav(renders / epoch / "plain" / f"{key}.wav")[0] for epoch in ("epoch-0000", "epoch-0002")]
    assert torch.equal(*plain)  # the same noise and condition each time
    assert len(plain[0]) == 3200
    assert not [name for name in module.state_dict() if "generator" in name or "vocoder" in name]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run" / "log").rglob("events*")).parent), {"audio": 0})
    events.Reload()
    tags = events.Tags()["audio"]
    assert sorted(tags) == sorted(f"render/{v}/{t}" for v in ("plain", "refined") for t in ("a dog", "rain"))
    assert [event.step for event in events.Audio(tags[0])] == sorted({e.step for e in events.Audio(tags[0])})


@pytest.mark.slow
def test_a_rehearsal_leaves_no_trace(tmp_path: Path, table: Path, generator_folder: Path) -> None:
    callback = RenderSamples(["a dog"], model=str(generator_folder), seconds=0.2, num_steps=1)
    fit(tmp_path / "run", table, callback, epochs=1, fast_dev_run=True)
    assert not (tmp_path / "run" / "renders").exists()


def test_refusals() -> None:
    for options, message in (
        ({"prompts": []}, "at least one text"),
        ({"prompts": "a dog"}, "a list of"),
        ({"prompts": ["a dog"]}, "either model"),
        ({"prompts": ["a dog"], "model": "x", "every_n_epochs": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RenderSamples(**options)  # type: ignore[arg-type]
    callback = RenderSamples(["a dog"], model="x")
    callback.load_state_dict({"last_epoch": 7})
    assert callback.state_dict() == {"last_epoch": 7}
