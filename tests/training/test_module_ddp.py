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


JOINT = ["--model.split=joint", "--model.contrastive_weight=0.2"]


@pytest.fixture(scope="module")
def two(fit: Callable, runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of two ranks that were not disturbed."""
    log = tmp_path_factory.mktemp("two") / "log"
    assert fit(log, 2, *JOINT) == [0, 0], runs.said(log)
    return log


def same(ranks: list[list[list[Any]]], alone: list[list[Any]], leave: str = "") -> None:
    """Each of the ranks reports the single process's losses and figures, and together they saw its rows."""
    losses, validations = figures(alone)
    assert (len(losses), len(validations)) == (12, 2)
    assert pairs(ranks) == pairs([alone])
    for rank in ranks:
        found, measured = figures(rank)
        assert found == pytest.approx(losses, rel=1e-5)
        for ours, theirs in zip(measured, validations, strict=True):
            expected = {name: value for name, value in theirs.items() if name != leave}
            assert {k: v for k, v in ours.items() if k != leave} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def same_refiner(folder: Path, alone: Path) -> None:
    a, b = (DiffGAPRefiner.from_pretrained(f / "refiner").state_dict() for f in (folder, alone))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_four_ranks_are_the_single_process(fit: Callable, runs: Any, tmp_path: Path) -> None:
    """With `bst`; the other splits are in `test_shares.py`, which needs no processes."""
    for world in (1, 4):
        (tmp_path / str(world)).mkdir()
        assert fit(tmp_path / str(world) / "log", world) == [0] * world, runs.said(tmp_path / str(world) / "log")
    same([runs.seen(tmp_path / "4" / "log", rank) for rank in range(4)], runs.seen(tmp_path / "1" / "log"))
    same_refiner(tmp_path / "4", tmp_path / "1")


def test_two_ranks_with_a_contrastive_term_are_the_single_process(
    fit: Callable, runs: Any, tmp_path: Path, two: Path
) -> None:
    assert fit(tmp_path / "log", 1, *JOINT) == [0], runs.said(tmp_path / "log")
    # In validation that term has the candidates of a rank's batch.
    same([runs.seen(two, rank) for rank in range(2)], runs.seen(tmp_path / "log"), leave="val/loss")
    same_refiner(two.parent, tmp_path)


def test_ranks_that_are_told_to_stop_or_lose_one_go_on_as_if_nothing_had_been(
    fit: Callable, runs: Any, tmp_path: Path, two: Path
) -> None:
    told, killed, end = (tmp_path / name for name in ("told", "killed", "end"))
    # One rank is told, in the middle of accumulated batches: both stop after the step.
    assert fit(told, 2, *JOINT, probe=["SIGTERM", "train", 0, 2], rank=1) == [143, 143], runs.said(told)
    # One rank is killed: the other does not wait for it.
    assert fit(killed, 2, *JOINT, probe=["SIGKILL", "train", 1, 3], rank=1) == [2, -9], runs.said(killed)
    assert runs.said(killed).splitlines()[-1].startswith("diffgap fit: error: another rank ended")
    assert fit(end, 2, *JOINT) == [0, 0]
    for rank in range(2):
        expected = runs.seen(two, rank)
        assert runs.seen(told, rank) == expected[:4]
        assert runs.seen(killed, rank) == expected[4:10]  # the first epoch, with its validation, has 7 lines
        assert runs.seen(end, rank) == expected[9:]  # the last optimizer step was that of its second batch
    a, b = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (two.parent, tmp_path))
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
