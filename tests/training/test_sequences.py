"""A table of sequences trains a refiner of sequences, by the same module, callbacks and folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn.functional import normalize

from diffgap_lightning.data.datamodules import EmbeddingDataModule
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.callbacks import EmbeddingMap, SaveRefiner
from diffgap_lightning.training.module import DiffGAPModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
]
T, D, N = 5, 10, 500
VA = {"source": "video", "target": "audio"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """An audio frame holds what the video showed one frame before."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N, T + 1, 3, generator=g)
    rows = {}
    for name, part in (("video", z[:, 1:]), ("audio", z[:, :-1])):
        x = part @ torch.randn(3, D, generator=g) + torch.randn(D, generator=g)
        rows[name] = normalize(x + 0.2 * torch.randn(N, T, D, generator=g), dim=-1).numpy()
    np.savez(tmp_path / "frames.npz", **rows, video_id=np.arange(N), audio_id=np.arange(N))
    return tmp_path / "frames.npz"


def module(**options) -> DiffGAPModule:
    settings = {"width": 64, "depth": 1, "dropout": 0.0, "rank": "full", "contrastive_weight": 0.1}
    return DiffGAPModule(optimizer=partial(torch.optim.AdamW, lr=4e-3), **{**settings, **options})


def trainer(folder: Path, callbacks: list, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **quiet, **options)


def test_a_fit_on_sequences_learns_validates_saves_resumes_and_predicts(table: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = EmbeddingDataModule(path=table, batch_size=32, val_fraction=0.2, test_fraction=0.2)
    first = trainer(
        tmp_path, [SaveRefiner(monitor="val/cosine"), EmbeddingMap()], max_epochs=20, check_val_every_n_epoch=5
    )
    model = module()
    first.fit(model, data)
    figures = {k: float(v) for k, v in first.callback_metrics.items()}
    assert {"val/video_to_audio/cosine", "val/video_to_audio/mmd2", "val/loss", "val/r1"} <= set(figures)
    assert list((tmp_path / "plots").glob("*.png"))

    saved = DiffGAPRefiner.from_pretrained(tmp_path / "refiner")
    assert saved.config.frames == T
    held_out = data.rows("test").embeddings
    untrained = DiffGAPRefiner.measure(data.rows("train").embeddings, data.rows("train").ids, [("video", "audio")])
    options = {**VA, "start": "posterior_mean", "strength": 0.0}
    cosines = [
        float((refiner.refine(held_out["video"], **options) * held_out["audio"]).sum(-1).mean())
        for refiner in (untrained, saved)
    ]
    assert cosines[1] > cosines[0] + 0.2, cosines

    first.save_checkpoint(tmp_path / "last.ckpt")
    again = module()
    trainer(tmp_path, [], max_epochs=21).fit(again, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.refiner.config.frames == T

    data = EmbeddingDataModule(path=table, batch_size=32, val_fraction=0.2, test_fraction=0.2, predict_split="test")
    parts = trainer(tmp_path, []).predict(again, data)
    assert sum(len(part["video_to_audio"]) for part in parts) == len(held_out["video"])
    assert parts[0]["video_to_audio"].shape[1:] == (T, D)
    tested = trainer(tmp_path, []).test(again, data, verbose=False)
    assert "test/video_to_audio/cosine" in tested[0]


def test_a_refiner_of_embeddings_is_not_resumed_on_sequences(table: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(table))
    np.savez(tmp_path / "pooled.npz", **{k: v[:, 0] if v.ndim == 3 else v for k, v in arrays.items()})
    run = trainer(tmp_path, [], max_steps=1)
    run.fit(module(), EmbeddingDataModule(path=tmp_path / "pooled.npz", batch_size=16))
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="checkpoint: was trained with frames 0, the present settings or data give 5"):
        trainer(tmp_path, [], max_steps=2).fit(
            module(),
            EmbeddingDataModule(path=table, batch_size=16),
            ckpt_path=tmp_path / "last.ckpt",
            weights_only=True,
        )
