"""Gloo processes train one refiner: 1, 2 and 4 of them alike, stopped and resumed, and when one dies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgap_lightning.refiner import DiffGAPRefiner

pytestmark = pytest.mark.slow

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 2
  accumulate_grad_batches: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: diffgap_lightning.training.callbacks.AverageWeights
      init_args: { decay: 0.8 }
    - class_path: runs.Probe
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: { filename: last, enable_version_counter: false }
    - class_path: diffgap_lightning.training.callbacks.SaveRefiner
    - class_path: diffgap_lightning.training.callbacks.SaveLast
      init_args: { every_n_steps: 1, agree_every_n_steps: 1 }
model: { width: 16, depth: 1, dropout: 0.0, rank: full, num_steps: 2, condition_noise: 0.1 }
data:
  class_path: diffgap_lightning.data.SyntheticDataModule
  init_args:
    num_pairs: 144
    num_val: 21
    num_test: 0
    world:
      class_path: diffgap_lightning.data.SyntheticWorld
      init_args: { latent_dim: 6, num_concepts: 4, dim: 12, hidden_dim: 24 }
"""
BATCH = 24  # over all ranks: 6 batches, 3 optimizer steps an epoch


@pytest.fixture(scope="module")
def fit(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[int], Path]]:
    """`fit(folder, world, *flags, **job)`: a run of as many ranks; their exit statuses."""
    config = tmp_path_factory.mktemp("ddp") / "config.yaml"
    config.write_text(CONFIG)

    def start(log: Path, world: int, *flags: str, **job: Any) -> list[int]:
        own = [f"--trainer.devices={world}", f"--data.batch_size={BATCH // world}"]
        own += ["--trainer.strategy=ddp"] if world > 1 else []
        here = [f"--config={config}", f"--trainer.default_root_dir={log.parent}", "--ckpt_path=auto"]
        return runs(log, "fit", *here, *own, *flags, world=world, **job)

    return start


def figures(seen: list[list[Any]]) -> tuple[list[float], list[dict[str, float]]]:
    """Losses of the steps and figures of the validations."""
    return [line[3] for line in seen if line[0] == "step"], [line[2] for line in seen if line[0] == "val"]


def pairs(ranks: list[list[list[Any]]]) -> list[set[int]]:
    """The ids that each step of all ranks together saw."""
    steps = [[line[4] for line in seen if line[0] == "step"] for seen in ranks]
    return [{i for ids in together for i in ids} for together in zip(*steps, strict=True)]


@pytest.mark.parametrize(("split", "contrast", "worlds"), [("bst", 0.0, (2, 4)), ("joint", 0.2, (2,))])
def test_any_number_of_ranks_is_the_single_process(
    fit: Callable, runs: Any, tmp_path: Path, split: str, contrast: float, worlds: tuple[int, ...]
) -> None:
    """The other splits are in `test_shares.py`, which needs no processes."""
    seen: dict[int, list[list[list[Any]]]] = {}
    for world in (1, *worlds):
        log = tmp_path / str(world) / "log"
        log.parent.mkdir()
        assert fit(log, world, f"--model.split={split}", f"--model.contrastive_weight={contrast}") == [0] * world, (
            runs.said(log)
        )
        seen[world] = [runs.seen(log, rank) for rank in range(world)]
    losses, validations = figures(seen[1][0])
    assert (len(losses), len(validations)) == (12, 2)
    alone = DiffGAPRefiner.from_pretrained(tmp_path / "1" / "refiner")
    for world in worlds:
        assert pairs(seen[world]) == pairs(seen[1])
        for rank in seen[world]:
            found, measured = figures(rank)
            assert found == pytest.approx(losses, rel=1e-5)
            for ours, theirs in zip(measured, validations, strict=True):
                if contrast:  # in validation that term has the candidates of a rank's batch
                    ours.pop("val/loss"), theirs.pop("val/loss", None)
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        refiner = DiffGAPRefiner.from_pretrained(tmp_path / str(world) / "refiner")
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(refiner.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_ranks_that_are_told_to_stop_or_lose_one_go_on_as_if_nothing_had_been(
    fit: Callable, runs: Any, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole" / "log", tmp_path / "broken"
    whole.parent.mkdir()
    broken.mkdir()
    assert fit(whole, 2) == [0, 0], runs.said(whole)
    # One rank is told, in the middle of accumulated batches: both stop after the step.
    assert fit(broken / "told", 2, probe=["SIGTERM", "train", 0, 2], rank=1) == [143, 143], runs.said(broken / "told")
    # One rank is killed: the other does not wait for it.
    first, second = fit(broken / "killed", 2, probe=["SIGKILL", "train", 1, 3], rank=1)
    assert second == -9
    assert first == 2
    assert runs.said(broken / "killed").splitlines()[-1].startswith("diffgap fit: error: another rank ended")
    assert fit(broken / "end", 2) == [0, 0]
    for rank in range(2):
        expected = runs.seen(whole, rank)
        told, killed, end = (runs.seen(broken / name, rank) for name in ("told", "killed", "end"))
        assert told == expected[:4]
        assert killed == expected[4:10]  # the first epoch, with its validation, has 7 lines
        assert end == expected[9:]  # the last optimizer step was that of its second batch
    a, b = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole.parent, broken))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, b[key][name]) for name, value in a[key].items())


def main(folder: str) -> None:
    """One rank: fit, then validate on batches of which only the first rank's hold a pair."""
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from diffgap_lightning.data.datamodules import SyntheticDataModule
    from diffgap_lightning.data.synthetic import SyntheticWorld
    from diffgap_lightning.training.callbacks import AverageWeights, SaveRefiner
    from diffgap_lightning.training.module import DiffGAPModule

    world = SyntheticWorld(latent_dim=6, num_concepts=4, dim=12, hidden_dim=24)
    data = SyntheticDataModule(num_pairs=90, num_val=21, num_test=0, batch_size=9, world=world)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.manual_seed(rank)  # the ranks agree although nobody seeded them alike
    module = DiffGAPModule(width=16, depth=1, split="alternate", num_steps=2)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[SaveRefiner(), AverageWeights(decay=0.9)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    table, first = data.rows("val"), torch.arange(5)
    pairs = {k: v for m in ("text", "audio") for k, v in (
        (m, table.embeddings[m][first]), (f"{m}_id", table.ids[m][first]), (f"{m}_row", first)
    )}  # fmt: skip
    text = {"text": table.embeddings["text"][5:7], "text_id": table.ids["text"][5:7], "text_row": first[:2] + 5}
    alone = trainer.validate(module, DataLoader([pairs if rank == 0 else text], batch_size=None), verbose=False)[0]
    weight = torch.cat([p.detach().flatten() for p in module.refiner.parameters()])
    result = {"config": asdict(module.refiner.config), "figures": figures, "alone": alone, "weight": weight.tolist()}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def test_two_ranks_train_and_validate_one_refiner(runs: Any, tmp_path: Path) -> None:
    status = runs(tmp_path / "log", str(tmp_path), call=[__file__, "main"], world=2)
    assert status == [0, 0], runs.said(tmp_path / "log")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["config"] == second["config"]
    assert first["weight"] == second["weight"]
    assert first["figures"] == second["figures"]
    # The second rank had no pair to measure a loss on, and neither waited for the other for ever.
    assert first["alone"] == second["alone"]
    assert first["alone"]["val/loss"] > 0
    saved = DiffGAPRefiner.from_pretrained(tmp_path / "refiner")
    assert saved.config.ranks == first["config"]["ranks"]
