"""What a run of few pairs leaves: the trained network where it clearly helps, otherwise closed forms of all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from diffgap_lightning.data import EmbeddingDataModule, EmbeddingTable
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.callbacks import GiveBackValidation, SaveRefiner
from diffgap_lightning.training.callbacks.give_back import gain_of_network, together
from diffgap_lightning.training.module import DiffGAPModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
]


def rows(n: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Noisy pairs in 12 dimensions."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 12, generator=g)
    rows = {
        m: torch.nn.functional.normalize(shared + torch.randn(n, 12, generator=g), dim=1) for m in ("text", "audio")
    }
    return rows, dict.fromkeys(rows, torch.arange(n))


@pytest.fixture
def data(tmp_path: Path) -> EmbeddingDataModule:
    embeddings, ids = rows(120)
    table = EmbeddingTable(embeddings, ids)
    path = table.write(tmp_path / "table.npz")
    return EmbeddingDataModule(str(path), batch_size=32, val_fraction=0.25, test_fraction=0.25)


def fit(folder: Path, data: EmbeddingDataModule, tolerance: float, **options: object) -> DiffGAPRefiner:
    module = DiffGAPModule(width=16, depth=1, **options)
    trainer = Trainer(
        default_root_dir=folder, max_steps=4, check_val_every_n_epoch=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", enable_checkpointing=False,
        callbacks=[SaveRefiner(monitor="val/loss", mode="min"), GiveBackValidation(tolerance)],
    )  # fmt: skip
    trainer.fit(module, data)
    return DiffGAPRefiner.from_pretrained(folder / "refiner")


def test_without_a_clear_gain_the_closed_forms_get_all_rows(tmp_path: Path, data: EmbeddingDataModule) -> None:
    refiner = fit(tmp_path, data, tolerance=float("inf"))
    train, val = data.rows("train"), data.rows("val")
    both = {m: torch.cat([train.embeddings[m], val.embeddings[m]]) for m in ("text", "audio")}
    for modality, x in both.items():
        torch.testing.assert_close(refiner.space.mean(modality), x.mean(0))
    untrained = DiffGAPRefiner.measure(
        both, {m: torch.cat([train.ids[m], val.ids[m]]) for m in both}, width=16, depth=1
    )
    options = {"source": "text", "target": "audio", "start": "posterior_mean", "strength": 0.0}
    test = data.rows("test").embeddings["text"]
    torch.testing.assert_close(refiner.refine(test, **options), untrained.refine(test, **options))


@pytest.mark.parametrize("reason", [{"tolerance": float("-inf")}, {"tolerance": float("inf"), "few_pairs": 50}])
def test_the_trained_refiner_stays(tmp_path: Path, data: EmbeddingDataModule, reason: dict[str, float]) -> None:
    """The network wins, or pairs are not few."""
    refiner = fit(tmp_path, data, **reason)
    torch.testing.assert_close(refiner.space.mean("text"), data.rows("train").embeddings["text"].mean(0))
    assert any(p.abs().sum() > 0 for p in refiner.cdm_of("text", "audio").network.output.parameters())


def test_gain_of_a_network_that_knows_the_answer() -> None:
    embeddings, ids = rows(60)
    refiner = DiffGAPRefiner.measure(embeddings, ids)
    assert gain_of_network(refiner, embeddings, ids)[0] == pytest.approx(0.0, abs=1e-4)
    expected = 0.0
    for source, target in refiner.directions:
        cdm, x0 = refiner.cdm_of(source, target), refiner.space.encode(embeddings[target], target)
        expected += float((x0 - cdm.closed_form.mean(refiner.space.encode(embeddings[source], source))).square().mean())

        def right(residual, mean, log_snr, condition, keep=None, x0=x0, cdm=cdm):
            return x0 - mean - residual

        cdm.network.forward = right
    gain, error = gain_of_network(refiner, embeddings, ids)
    assert gain == pytest.approx(expected, rel=1e-5)
    assert 0 < error < gain


def test_rows_of_both_splits_are_joined_once() -> None:
    embeddings, ids = rows(5)
    more, more_ids = rows(3, seed=1)
    more = {"text": embeddings["text"][:3], "audio": more["audio"]}  # the texts are in both
    joined, joined_ids = together((embeddings, ids), (more, more_ids))
    assert {m: len(x) for m, x in joined.items()} == {"text": 5, "audio": 8}
    assert joined_ids["audio"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
