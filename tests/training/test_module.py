"""Fits of seconds: that training helps, resumes exactly, keeps what was validated, and takes any loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, IterableDataset

from diffgap_lightning.data.datamodules import SyntheticDataModule
from diffgap_lightning.data.synthetic import SyntheticWorld
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.refiner.fusion import mean_recall
from diffgap_lightning.training.callbacks import AverageWeights, SaveRefiner
from diffgap_lightning.training.module import DiffGAPModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*WeightAveraging.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
]

DECAY = 0.8
TA, AT = ("text", "audio"), ("audio", "text")
State = dict[str, Tensor]


def data(**options: Any) -> SyntheticDataModule:
    world = SyntheticWorld(
        latent_dim=6, num_concepts=4, dim=12, hidden_dim=24,
        mode_scale=1.5, shared_std=0.4, audio_noise=0.3, text_noise=0.3,
    )  # fmt: skip
    return SyntheticDataModule(
        **{"num_pairs": 180, "num_val": 40, "num_test": 30, "batch_size": 30, **options}, world=world
    )


def module(seed: int = 0, **options: Any) -> DiffGAPModule:
    torch.manual_seed(seed)
    settings = {"width": 16, "depth": 1, "dropout": 0.0, "rank": "full", "num_steps": 3}
    return DiffGAPModule(**{**settings, "optimizer": partial(torch.optim.AdamW, lr=1e-2), **options})


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    checkpoints = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return Trainer(
        **{**quiet, **own, "default_root_dir": folder, "enable_checkpointing": checkpoints, **options},
        callbacks=list(callbacks),
    )


class Watch(Callback):
    """Losses of all steps, and the averaged weights of every validation, averaged here by hand."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.average: State | None = None
        self.validated: list[tuple[float, State]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        now = {k: v.detach().clone() for k, v in pl_module.refiner.state_dict().items()}
        old = self.average
        self.average = now if old is None else {k: DECAY * old[k] + (1 - DECAY) * now[k] for k in now}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.average is not None:
            self.validated.append((float(trainer.callback_metrics["val/r1"]), dict(self.average)))


def averaging() -> AverageWeights:
    return AverageWeights(decay=DECAY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One whole fit: 2 epochs of 6 steps with averaged weights, checkpoints in mid-epoch and after each."""
    folder, watch = tmp_path_factory.mktemp("run"), Watch()
    checkpoints = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1),
        ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1),
    ]
    fitted, saver = module(), SaveRefiner()
    fit = trainer(folder, watch, averaging(), saver, *checkpoints)
    fit.fit(fitted, datamodule=data())
    return SimpleNamespace(folder=folder, watch=watch, module=fitted, trainer=fit, best=saver.best)


def rows(split: str) -> SimpleNamespace:
    source = data()
    source.setup()
    return source.rows(split)


def batches(split: str, size: int = 20) -> list[dict[str, Tensor]]:
    """Aligned pairs with their row numbers, in order."""
    table, parts = rows(split), []
    for start in range(0, len(table.ids["text"]), size):
        index = torch.arange(len(table.ids["text"]))[start : start + size]
        batch = {m: table.embeddings[m][index] for m in TA}
        parts.append(batch | {f"{m}_id": table.ids[m][index] for m in TA} | {f"{m}_row": index for m in TA})
    return parts


def plain(parts: list[dict[str, Tensor]]) -> DataLoader:
    """A loader that knows nothing of this project."""
    return DataLoader(parts, batch_size=None)


def loader(split: str, size: int = 20) -> DataLoader:
    return plain(batches(split, size))


def changed(before: State, refiner: DiffGAPRefiner) -> set[tuple[str, str]]:
    """Directions whose networks are not what they were."""
    now = refiner.state_dict()
    names = {k for k in now if k.startswith("cdm.") and not torch.equal(now[k], before[k])}
    return {d for d in refiner.directions if any(k.startswith(f"cdm.{d[0]}->{d[1]}.") for k in names)}


# ---- a fit -----------------------------------------------------------------------------------------------------------


def test_a_copy_for_averaging_shares_what_makes_the_optimizer() -> None:
    """A command line's factory holds its parser, the trainer and the rows; files among them cannot be copied at all."""

    class Heavy:
        def __call__(self, parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters)

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    built = module(optimizer=Heavy(), lr_scheduler=Heavy())
    copied = deepcopy(built)
    assert copied.optimizer is built.optimizer
    assert isinstance(copied.optimizer(copied.parameters()), torch.optim.AdamW)


def test_training_improves_on_the_closed_form_that_it_starts_from(tmp_path: Path) -> None:
    # few_pairs=0: a linear closed form. A kernel regression on these few pairs leaves nothing for a network to add.
    source, fitted = data(num_pairs=480, num_val=60, batch_size=40), module(width=32, few_pairs=0)
    start = trainer(tmp_path).validate(fitted, datamodule=source, verbose=False)[0]
    assert not fitted.refiner.training
    untrained = {k: v.clone() for k, v in fitted.refiner.state_dict().items()}
    fit = trainer(tmp_path, averaging(), max_epochs=8)
    fit.fit(fitted, datamodule=source)
    assert changed(untrained, fitted.refiner) == {TA, AT}
    assert fit.callback_metrics["val/loss"] < start["val/loss"] - 0.015
    closed = [k for k in untrained if not k.startswith("cdm.") or ".closed_form." in k]
    assert all(torch.equal(untrained[k], fitted.refiner.state_dict()[k]) for k in closed)


def test_a_fit_reports_both_directions_and_leaves_a_refiner_in_inference_mode(run) -> None:
    figures = run.trainer.callback_metrics
    names = {
        f"val/{s}_to_{t}/{k}" for s, t in (TA, AT) for k in ("r1", "r5", "r10", "median_rank", "mean_rank", "map10")
    }
    names |= {f"val/{s}_to_{t}/{k}" for s, t in (TA, AT) for k in ("cosine", "mmd2", "centroid_distance")}
    names |= {
        "val/r1",
        "val/cosine",
        "val/loss",
        "train/loss",
        "train/loss/text_to_audio",
        "train/denoising/audio_to_text",
    }
    assert names <= set(figures)
    mean = (figures["val/text_to_audio/r1"] + figures["val/audio_to_text/r1"]) / 2
    torch.testing.assert_close(figures["val/r1"], mean)
    assert not run.module.refiner.training
    assert run.module.refiner.config.encoder == data().world.fingerprint


def test_the_saved_refiner_is_the_averaged_one_that_was_best_in_validation(run) -> None:
    saved = DiffGAPRefiner.from_pretrained(run.folder / "refiner")
    assert len(run.watch.validated) == 2
    best, average = max(run.watch.validated, key=lambda figure_and_state: figure_and_state[0])
    assert run.best == best
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5, msg=name)
    table = rows("val")
    features = [saved.score_features(table.embeddings[m], modality=m, source="text", target="audio") for m in TA]
    assert mean_recall(*features, *(table.ids[m] for m in TA)) == pytest.approx(best, abs=1e-6)


def test_what_is_validated_is_the_mean_cosine_of_the_refined_rows(run, tmp_path: Path) -> None:
    found = trainer(tmp_path).validate(
        DiffGAPModule(refiner=str(run.folder / "refiner")), loader("val"), verbose=False
    )[0]
    refiner, table = DiffGAPRefiner.from_pretrained(run.folder / "refiner"), rows("val")
    for source, target in (TA, AT):
        refined = refiner.refine(
            table.embeddings[source], source=source, target=target, generator=torch.Generator().manual_seed(9)
        )
        i, j = pair_indices(table.ids[source], table.ids[target])
        expected = float((refined[i] * table.embeddings[target][j]).sum(1).mean())
        assert found[f"val/{source}_to_{target}/cosine"] == pytest.approx(expected, abs=0.02)  # other noise


def test_validation_outside_a_fit_changes_nothing_and_repeats_itself(run, tmp_path: Path) -> None:
    loaded = DiffGAPModule(refiner=str(run.folder / "refiner"))
    before = loaded.refiner.config
    figures = [trainer(tmp_path).validate(loaded, datamodule=data(), verbose=False)[0] for _ in range(2)]
    assert loaded.refiner.config == before
    assert figures[0] == figures[1]
    batched = trainer(tmp_path).validate(loaded, loader("val", 7), verbose=False)[0]
    assert batched == pytest.approx(
        figures[0], abs=1e-5
    )  # how rows are batched does not matter, a row's noise is its own


@pytest.mark.parametrize("objective", ["diffusion", "regression"])
@pytest.mark.parametrize(
    ("split", "steps", "trained"),
    [("bst", 1, {TA, AT}), ("joint", 1, {TA, AT}), ("alternate", 1, {TA}), ("alternate", 2, {TA, AT}),
     ("forward", 2, {TA}), ("backward", 2, {AT})],
)  # fmt: skip
def test_every_split_trains_its_directions(run, tmp_path: Path, split, steps, trained, objective) -> None:
    fitted = module(
        refiner=str(run.folder / "refiner"), split=split, objective=objective, contrastive_weight=0.1,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    before = {k: v.clone() for k, v in fitted.refiner.state_dict().items()}
    temperature = fitted.logit_scale.item()
    trainer(tmp_path, max_steps=steps, limit_val_batches=0).fit(fitted, loader("train"))
    assert changed(before, fitted.refiner) == trained
    assert fitted.logit_scale.item() != temperature


def test_the_ablation_without_diffusion_refines_by_its_start_alone(tmp_path: Path) -> None:
    fitted = module(objective="regression", strength=0.5)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(fitted, datamodule=data())
    assert fitted.refiner.config.strength == 0.0


def test_accumulated_batches_get_noise_of_their_own(run, tmp_path: Path) -> None:
    watch, batch = Watch(), batches("train")[0]
    fitted = module(refiner=str(run.folder / "refiner"))
    trainer(tmp_path, watch, max_steps=1, accumulate_grad_batches=3, limit_val_batches=0).fit(
        fitted, plain([batch] * 3)
    )
    assert len(set(watch.losses)) == 3


def test_a_scheduler_steps_with_the_optimizer(run, tmp_path: Path) -> None:
    fitted = module(
        refiner=str(run.folder / "refiner"),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    )
    fit = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    fit.fit(fitted, loader("train"))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


def test_without_validation_the_last_refiner_is_saved(tmp_path: Path) -> None:
    fitted = module()
    trainer(tmp_path, SaveRefiner(), averaging(), max_steps=4).fit(fitted, datamodule=data(num_val=0))
    saved, state = DiffGAPRefiner.from_pretrained(tmp_path / "refiner"), fitted.refiner.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in saved.state_dict().items())


def test_a_failed_save_leaves_the_older_refiner(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = DiffGAPRefiner.from_pretrained(run.folder / "refiner").save_pretrained(tmp_path / "refiner")
    before = {p.name: p.read_bytes() for p in older.iterdir()}
    fitted = module(refiner=str(run.folder / "refiner"))
    monkeypatch.setattr("diffgap_lightning.checkpoint._sha256", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, SaveRefiner(), max_steps=1).fit(fitted, loader("train"), loader("val"))
    assert {p.name: p.read_bytes() for p in older.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["refiner"]


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step=4.ckpt", "epoch=0.ckpt"])
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path: Path, name: str) -> None:
    watch, resumed = Watch(), module(seed=5)
    fit = trainer(tmp_path, watch, averaging(), SaveRefiner())
    fit.fit(resumed, datamodule=data(), ckpt_path=str(run.folder / name))
    rest = run.watch.losses[-len(watch.losses) :]
    assert len(rest) == {"step=4.ckpt": 8, "epoch=0.ckpt": 6}[name]
    assert watch.losses == pytest.approx(rest, abs=1e-6)
    for key, value in run.module.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, atol=1e-6, rtol=0, msg=key)
    assert resumed.refiner.config == run.module.refiner.config
    for key, value in run.trainer.callback_metrics.items():
        torch.testing.assert_close(fit.callback_metrics[key], value, atol=1e-5, rtol=0, msg=key)


def test_resuming_another_model_is_refused(run, tmp_path: Path) -> None:
    for options, words in (
        ({"width": 24}, "trained with width 16, the present settings or data give 24; resume with the run's own"),
        ({"rank": 5}, "trained with ranks .*'audio': 12.*give .*'audio': 5"),
        ({"prediction": "v"}, "trained with prediction x0.* give v"),
    ):
        fitted = module(**options)
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path).fit(fitted, datamodule=data(), ckpt_path=str(run.folder / "epoch=0.ckpt"))


def test_resuming_on_data_that_give_other_closed_forms_is_refused(run, tmp_path: Path) -> None:
    flat = data()
    flat.setup()
    audio = flat.rows("train").embeddings["audio"]
    audio.copy_(normalize(audio * (torch.arange(12) < 4), dim=1))  # fewer canonical directions
    with pytest.raises(ValueError, match="checkpoint: bridges.cca.* has another shape than the present"):
        trainer(tmp_path).fit(module(), datamodule=flat, ckpt_path=str(run.folder / "epoch=0.ckpt"))
    with pytest.raises(ValueError, match="was trained with encoder synthetic-world.* give None"):
        trainer(tmp_path).fit(module(), loader("train"), ckpt_path=str(run.folder / "epoch=0.ckpt"))


def test_a_checkpoint_brings_what_was_fitted_and_leaves_the_settings(run) -> None:
    fitted = module(refiner=str(run.folder / "refiner"))
    fitted.refiner.config = DiffGAPRefiner.from_pretrained(run.folder / "refiner").config.__class__(
        **{**vars(fitted.refiner.config), "strength": 0.9, "num_steps": 7, "fusion": {"text->audio": {"cca": 1.0}}}
    )
    checkpoint = torch.load(run.folder / "epoch=1.ckpt", weights_only=True)
    fitted.on_load_checkpoint(checkpoint)
    config = fitted.refiner.config
    assert (config.strength, config.num_steps) == (0.9, 7)
    assert config.fusion == checkpoint["diffgap"]["refiner"]["fusion"] != {"text->audio": {"cca": 1.0}}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "holds no DiffGAP refiner; was it written by another LightningModule"),
        ({"diffgap": "text"}, "holds no DiffGAP refiner"),
        ({"diffgap": {"schema_version": 2}}, "schema_version 2, this version reads 1 to 1; upgrade diffgap-lightning"),
        ({"diffgap": {"schema_version": "1"}}, "schema_version '1'"),
        ({"diffgap": {}}, "schema_version None"),
    ],
    ids=str,
)
def test_other_checkpoints_are_refused(record, words) -> None:
    with pytest.raises(ValueError, match=words):
        module().on_load_checkpoint({"state_dict": {}, **record})


def test_a_checkpoint_needs_no_trainer_and_holds_only_tensors_and_plain_values(run) -> None:
    path = run.folder / "epoch=1.ckpt"
    assert "diffgap" in torch.load(path, weights_only=True)
    loaded = DiffGAPModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert not loaded.refiner.training
    assert loaded.refiner.config == run.module.refiner.config
    # Under averaging both are the average after the last step.
    for key, value in run.module.refiner.state_dict().items():
        torch.testing.assert_close(loaded.refiner.state_dict()[key], value, msg=key)


def test_a_test_and_a_prediction_take_the_refiner_from_the_checkpoint(run, tmp_path: Path) -> None:
    path, split = str(run.folder / "epoch=1.ckpt"), loader("test")
    figures = [
        trainer(tmp_path).test(DiffGAPModule(), datamodule=data(), ckpt_path=path, verbose=False)[0],
        trainer(tmp_path).test(DiffGAPModule(), split, ckpt_path=path, verbose=False)[0],
        trainer(tmp_path).test(run.module, datamodule=data(), verbose=False)[0],
    ]
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], abs=0.02)
        assert other["test/r1"] == figures[0]["test/r1"]
    parts = trainer(tmp_path).predict(DiffGAPModule(), split, ckpt_path=path)
    table = rows("test")
    for source, target in (TA, AT):
        name = f"{source}_to_{target}"
        refined, ids, index = (torch.cat([p[name + k] for p in parts]) for k in ("", "_id", "_row"))
        assert refined.shape == (30, 12)
        assert torch.equal(ids, table.ids[source][index])
        again = run.module.refiner.refine(
            table.embeddings[source][index], source=source, target=target, start="posterior_mean", strength=0.0
        )
        assert float((refined * again).sum(1).min()) > 0.8


# ---- loaders ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Batches of no known number."""

    def __init__(self, parts: list[dict[str, Tensor]]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.parts)


@pytest.mark.parametrize("kind", [list, Stream])
def test_any_loader_of_such_batches_will_do(tmp_path: Path, kind) -> None:
    fitted, fit = module(), trainer(tmp_path, SaveRefiner(), max_epochs=1)
    fit.fit(fitted, DataLoader(kind(batches("train")), batch_size=None), loader("val"))
    assert fit.global_step == 9
    assert fitted.refiner.config.pairs == (TA,)
    table = rows("train")
    for m in TA:
        torch.testing.assert_close(fitted.refiner.space.mean(m), table.embeddings[m].mean(0), atol=1e-6, rtol=0)
    assert DiffGAPRefiner.from_pretrained(tmp_path / "refiner").config.encoder is None


def test_a_loader_without_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the training loader yielded no batch"):
        trainer(tmp_path).fit(module(), DataLoader(Stream([]), batch_size=None))


def test_without_a_refiner_there_is_nothing_to_test(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no refiner yet: give ckpt_path=CHECKPOINT, refiner=FOLDER, or a datamodule"):
        trainer(tmp_path).test(module(), loader("test"))
    with pytest.raises(RuntimeError, match="the refiner is not built yet"):
        module().training_step({}, 0)


def test_a_refiner_to_go_on_from_trains_with_dropout(run, tmp_path: Path) -> None:
    modes: list[bool] = []

    class Probe(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            modes.append(all(m.training for m in pl_module.refiner.cdm.modules()))

    fitted = module(refiner=str(run.folder / "refiner"))
    assert not fitted.refiner.training
    trainer(tmp_path, Probe(), max_epochs=2).fit(fitted, plain(batches("train")[:2]), loader("val"))
    assert modes == [True] * 4
    assert not fitted.refiner.training


def test_batches_without_a_pair_count_for_nothing_in_the_validation_loss(run, tmp_path: Path) -> None:
    fitted = DiffGAPModule(refiner=str(run.folder / "refiner"))
    whole = batches("val")
    only = [{k: v for k, v in whole[1].items() if k.startswith(m)} for m in TA]
    strangers = whole[1] | {"audio_id": whole[1]["audio_id"] + 10_000}
    found = [
        trainer(tmp_path).validate(fitted, plain(parts), verbose=False)[0]["val/loss"]
        for parts in (whole[:1], [whole[0], *only], [whole[0], strangers])
    ]
    assert found == pytest.approx([found[0]] * 3)
    none = trainer(tmp_path).validate(fitted, plain(only), verbose=False)[0]  # pairs, but never within a batch
    assert math.isnan(none["val/loss"])
    assert not math.isnan(none["val/r1"])


def test_the_same_rows_twice_are_ranked_once(run, tmp_path: Path) -> None:
    fitted = DiffGAPModule(refiner=str(run.folder / "refiner"))
    once, twice = (trainer(tmp_path).validate(fitted, plain(batches("val") * k), verbose=False)[0] for k in (1, 2))
    once.pop("val/loss"), twice.pop("val/loss")  # a mean over batches, each with noise of its own
    assert once == pytest.approx(twice, abs=1e-6)
