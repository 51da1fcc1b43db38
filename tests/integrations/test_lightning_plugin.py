"""`RefineConditioning` and `FinetuneRefiner` on a small latent-diffusion LightningModule."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffgap_lightning.bridges import IdentityBridge
from diffgap_lightning.integrations.joint import pair_loss
from diffgap_lightning.integrations.lightning import FinetuneRefiner, RefineConditioning
from diffgap_lightning.refiner import DiffGAPRefiner

PROGRAM = Path(__file__).with_name("latent_diffusion.py")


@pytest.fixture(scope="module")
def ldm() -> ModuleType:
    spec = spec_from_file_location("latent_diffusion", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["latent_diffusion"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refiner(ldm: ModuleType) -> DiffGAPRefiner:
    return ldm.measured()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(*callbacks: Callback, **options: Any) -> Trainer:
        defaults = {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": tmp_path, "max_epochs": 1,
        }  # fmt: skip
        return Trainer(**{**defaults, **options}, callbacks=list(callbacks))

    return make


class Watch(Callback):
    """Conditions that the module gets in each stage, first batch first."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def look(self, stage: str, module: LightningModule) -> None:
        with torch.no_grad():
            found = module.get_learned_conditioning(["clip 0", "", "clip 2"])[:, 0]
        self.seen.setdefault(stage, []).append(found.detach())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look("train", pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look("sanity" if trainer.sanity_checking else "validate", pl_module)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look("test", pl_module)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look("predict", pl_module)


def run_all(trainer: Trainer, module: LightningModule, data: Any) -> list[Tensor]:
    trainer.fit(module, data, data)
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    return trainer.predict(module, data)


# ---- attached for stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [["train"], ["validate"], ["test", "predict"], ["train", "validate"]])
def test_conditions_are_refined_in_the_stages_named_and_nowhere_else(
    ldm: ModuleType, refiner: DiffGAPRefiner, make_trainer: Callable[..., Trainer], stages: list[str]
) -> None:
    module, watch = ldm.TinyLatentDiffusion(), Watch()
    trainer = make_trainer(RefineConditioning(refiner, stages=stages, strength=0), watch, val_check_interval=2)
    run_all(trainer, module, ldm.loader())
    plain = module.get_learned_conditioning(["clip 0", "", "clip 2"])[:, 0]
    refined = plain.clone()
    refined[[0, 2]] = refiner.refine(plain[[0, 2]], source="text", target="audio", strength=0)
    assert set(watch.seen) == {"sanity", "train", "validate", "test", "predict"}
    for stage, seen in watch.seen.items():
        expected = refined if (stage if stage != "sanity" else "validate") in stages else plain
        assert all(torch.equal(found, expected) for found in seen), stage
    assert "get_learned_conditioning" not in vars(module)
    assert not any("refiner" in name for name, _ in module.named_modules())


def test_an_identity_changes_no_bit(ldm: ModuleType, make_trainer: Callable[..., Trainer]) -> None:
    text, audio, _ = ldm.world()
    ids = dict.fromkeys(("text", "audio"), torch.arange(len(text)))
    identity = IdentityBridge().fit({"text": text, "audio": audio}, ids)
    weights, conditions = [], []
    for callbacks in ([], [RefineConditioning(identity, stages=["train", "validate", "predict"], strength=0)]):
        torch.manual_seed(0)
        module = ldm.TinyLatentDiffusion()
        conditions.append(run_all(make_trainer(*callbacks), module, ldm.loader()))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)
    assert all(torch.equal(a, b) for a, b in zip(*conditions, strict=True))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_an_identity_changes_no_bit_in_half_precision(
    ldm: ModuleType, make_trainer: Callable[..., Trainer], precision: str
) -> None:
    text, audio, _ = ldm.world()
    identity = IdentityBridge().fit({"text": text, "audio": audio}, dict.fromkeys(("text", "audio"), torch.arange(192)))
    found = []
    for callbacks in ([], [RefineConditioning(identity, strength=0)]):
        trainer = make_trainer(*callbacks, precision=precision)
        found.append(torch.cat(trainer.predict(ldm.TinyLatentDiffusion(), ldm.loader())))
    assert found[0].dtype == {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert torch.equal(*found)


@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_an_exception_detaches(
    ldm: ModuleType, refiner: DiffGAPRefiner, make_trainer: Callable[..., Trainer], hook: str
) -> None:
    module = ldm.TinyLatentDiffusion()

    def fail(*_: Any) -> None:
        assert "get_learned_conditioning" in vars(module)
        raise RuntimeError("stop")

    setattr(module, hook, fail)
    trainer = make_trainer(RefineConditioning(refiner, stages=["train", "validate"]))
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, ldm.loader(), ldm.loader())
    assert "get_learned_conditioning" not in vars(module)


def test_noise_is_new_in_each_step_and_the_same_in_each_validation(
    ldm: ModuleType, refiner: DiffGAPRefiner, make_trainer: Callable[..., Trainer]
) -> None:
    watch = Watch()
    callback = RefineConditioning(refiner, stages=["train", "validate"], strength=0.9)
    make_trainer(callback, watch, max_epochs=2).fit(ldm.TinyLatentDiffusion(), ldm.loader(), ldm.loader())
    train, validate = (torch.stack(watch.seen[s])[:, 0] for s in ("train", "validate"))
    assert len(train.unique(dim=0)) == len(train) == 8
    assert torch.equal(validate[:4], validate[4:])
    assert len(validate.unique(dim=0)) == 4


class Holder(LightningModule):
    """A module whose conditioning method belongs to a part of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model.get_learned_conditioning(list(batch["caption"]))


def test_a_part_of_the_module_and_a_folder(
    ldm: ModuleType, refiner: DiffGAPRefiner, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    folder = refiner.save_pretrained(tmp_path / "refiner")
    module = Holder(ldm.TinyLatentDiffusion())
    callback = RefineConditioning(folder, method="model.get_learned_conditioning", strength=0)
    found = make_trainer(callback).predict(module, ldm.loader())
    expected = refiner.refine(ldm.world()[0], source="text", target="audio", strength=0)
    torch.testing.assert_close(torch.cat(found)[:, 0], expected)
    with pytest.raises(ValueError, match="Holder has no method 'get_learned_conditioning'"):
        make_trainer(RefineConditioning(folder)).predict(module, ldm.loader())


def test_it_is_configured_from_yaml(ldm: ModuleType, refiner: DiffGAPRefiner, tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    refiner.save_pretrained(tmp_path / "refiner")
    (tmp_path / "config.yaml").write_text(f"""
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  max_epochs: 1
  callbacks:
    - class_path: diffgap_lightning.integrations.lightning.RefineConditioning
      init_args:
        refiner: {tmp_path}/refiner
        method: get_learned_conditioning
        stages: [train, predict]
        strength: 0.3
    - class_path: diffgap_lightning.integrations.lightning.FinetuneRefiner
      init_args: {{refiner: {tmp_path}/refiner, method: audio_of, paired: audio_embedding}}
""")
    cli = LightningCLI(
        ldm.TinyLatentDiffusion, args=["--config", str(tmp_path / "config.yaml")], run=False,
        save_config_callback=None,
    )  # fmt: skip
    first, second = (c for c in cli.trainer.callbacks if isinstance(c, RefineConditioning))
    assert first.stages == ("train", "predict")
    assert first.options["strength"] == 0.3
    assert second.paired == "audio_embedding"
    assert first.refiner.directions == refiner.directions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["fit"]}, r"stages: got \['fit'\], expected a list of some of train, validate"),
        ({"stages": "train"}, "stages: got 'train', expected a list"),
        ({"stages": []}, "stages: got "),
    ],
)
def test_wrong_stages_are_refused(refiner: DiffGAPRefiner, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefineConditioning(refiner, **options)


def test_a_refiner_of_another_space_is_refused(ldm: ModuleType, make_trainer: Callable[..., Trainer]) -> None:
    callback = RefineConditioning(ldm.measured(encoder="space-a"), encoder="space-b")
    with pytest.raises(ValueError, match="space of encoder 'space-a', but TinyLatentDiffusion.* uses 'space-b'"):
        make_trainer(callback).predict(ldm.TinyLatentDiffusion(), ldm.loader())


# ---- trained together ---------------------------------------------------------------------------------------------


def weights(refiner: DiffGAPRefiner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in refiner.parameters()])


def test_a_part_of_the_module_refines_as_it_does_alone(ldm: ModuleType, make_trainer: Callable[..., Trainer]) -> None:
    """With a learning rate of 0 the refiner stays what it was: each stage must see its own refine()."""

    class Still(ldm.TinyLatentDiffusion):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, refiner, watch = Still(), ldm.measured(), Watch()
    callback = FinetuneRefiner(refiner, paired="audio_embedding", strength=0.0)
    run_all(make_trainer(callback, watch), module, ldm.loader())
    plain = module.get_learned_conditioning(["clip 0", "", "clip 2"])[:, 0]
    expected = refiner.refine(plain[[0, 2]], source="text", target="audio", strength=0, start="posterior_mean")
    assert set(watch.seen) == {"sanity", "train", "validate", "test", "predict"}
    for stage, seen in watch.seen.items():
        for found in seen:
            assert torch.equal(found[1], plain[1]), stage
            torch.testing.assert_close(found[[0, 2]], expected)
            assert not torch.allclose(found[0], plain[0], atol=1e-2)
    assert "get_learned_conditioning" not in vars(module)


@pytest.mark.parametrize("hook", ["training_step", "get_learned_conditioning"])
def test_an_exception_gives_the_module_back(ldm: ModuleType, make_trainer: Callable[..., Trainer], hook: str) -> None:
    module, refiner = ldm.TinyLatentDiffusion(), ldm.measured()

    def fail(*_: Any) -> None:
        assert hasattr(module, FinetuneRefiner.NAME)
        raise RuntimeError("stop")

    setattr(module, hook, fail)
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(FinetuneRefiner(refiner)).fit(module, ldm.loader())
    assert not hasattr(module, FinetuneRefiner.NAME)
    assert getattr(module, hook) is fail
    assert not {"training_step", "get_learned_conditioning"} & set(vars(module)) - {hook}
    assert not refiner.training
    assert all(p.requires_grad for p in refiner.parameters())


@pytest.mark.parametrize("own_parameters_only", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_both_losses_fall_and_the_refiner_learns(
    ldm: ModuleType, make_trainer: Callable[..., Trainer], strength: float, own_parameters_only: bool
) -> None:
    refiner = ldm.measured()
    before, way = weights(refiner), {"source": "text", "target": "audio"}
    torch.manual_seed(0)
    module = ldm.TinyLatentDiffusion(own_parameters_only)
    callback = FinetuneRefiner(refiner, paired="audio_embedding", strength=strength, num_steps=2)
    trainer = make_trainer(callback, max_epochs=12)
    text, audio, _ = ldm.world()

    def own_loss() -> float:
        with torch.no_grad():
            return float(pair_loss(refiner, text, audio, **way, generator=torch.Generator().manual_seed(5)))

    first, own = trainer.validate(module, ldm.loader(), verbose=False)[0]["val/loss"], own_loss()
    trainer.fit(module, ldm.loader(shuffle=True))
    last = trainer.validate(module, ldm.loader(), verbose=False)[0]["val/loss"]
    assert last < 0.8 * first
    assert own_loss() < 0.98 * own
    assert not torch.equal(weights(refiner), before)
    assert not refiner.training
    assert all(p.requires_grad for p in refiner.parameters())
    assert not hasattr(module, FinetuneRefiner.NAME)
    assert "training_step" not in vars(module)


def test_the_generators_loss_alone_reaches_the_refiner(ldm: ModuleType, make_trainer: Callable[..., Trainer]) -> None:
    refiner = ldm.measured()
    start = {k: v.clone() for k, v in refiner.state_dict().items()}
    trainer = make_trainer(FinetuneRefiner(refiner), max_epochs=3)
    trainer.fit(ldm.TinyLatentDiffusion(), ldm.loader())
    changed = {k for k, v in refiner.state_dict().items() if not torch.equal(v, start[k])}
    assert changed
    assert all(k.startswith("cdm.text->audio.network.") for k in changed)
    assert "cdm.text->audio.network.no_condition" not in changed


def test_fine_tuning_makes_a_trained_generator_better(ldm: ModuleType, make_trainer: Callable[..., Trainer]) -> None:
    """A generator that was trained on audio embeddings and is prompted with text: AudioLDM's case."""
    torch.manual_seed(0)
    module, audio = ldm.TinyLatentDiffusion(), ldm.world()[1]
    text, module.table = module.table, audio
    make_trainer(max_epochs=25).fit(module, ldm.loader(shuffle=True))
    module.table = text
    for parameter in module.network.parameters():
        parameter.requires_grad_(False)
    refiner = ldm.measured()

    def error(callback: Callback) -> float:
        return make_trainer(callback).test(module, ldm.loader(), verbose=False)[0]["val/loss"]

    plain = make_trainer().test(module, ldm.loader(), verbose=False)[0]["val/loss"]
    attached = error(RefineConditioning(refiner, strength=0, start="posterior_mean"))
    make_trainer(FinetuneRefiner(refiner, paired="audio_of"), max_epochs=15).fit(module, ldm.loader(shuffle=True))
    tuned = error(RefineConditioning(refiner, strength=0, start="posterior_mean"))
    assert attached < 0.8 * plain
    assert tuned < 0.97 * attached


def test_dropped_conditions_are_paired_with_their_own_targets(
    ldm: ModuleType, make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = []
    original = pair_loss

    def look(refiner: Any, source_rows: Tensor, target_rows: Tensor, **options: Any) -> Tensor:
        pairs.append((source_rows, target_rows))
        return original(refiner, source_rows, target_rows, **options)

    monkeypatch.setattr("diffgap_lightning.integrations.lightning.finetune_refiner.pair_loss", look)
    callback = FinetuneRefiner(ldm.measured(), paired="audio_embedding")
    make_trainer(callback).fit(ldm.TinyLatentDiffusion(drop=0.3), ldm.loader())
    text, audio, _ = ldm.world()
    assert any(len(rows) < 48 for rows, _ in pairs)
    for rows, targets in pairs:
        place = [int((text == row).all(1).nonzero()) for row in rows]
        assert torch.equal(targets, audio[place])


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    ldm: ModuleType, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    ends = []
    for parts in ((2,), (1, 2)):
        torch.manual_seed(0)
        module, refiner, path = ldm.TinyLatentDiffusion(own_parameters_only=True), ldm.measured(), None
        for epochs in parts:
            callback = FinetuneRefiner(refiner, paired="audio_embedding", strength=0.4, num_steps=2)
            trainer = make_trainer(callback, Keep(tmp_path / f"{epochs}.ckpt"), max_epochs=epochs)
            trainer.fit(module, ldm.loader(), ckpt_path=path)
            path = tmp_path / f"{epochs}.ckpt"
            if epochs == 1:  # another process: nothing but the checkpoint is left
                torch.manual_seed(1)
                module, refiner = ldm.TinyLatentDiffusion(own_parameters_only=True), ldm.measured()
        ends.append((weights(refiner), module.network[0].weight.detach().clone()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    loaded = ldm.measured()
    found = make_trainer(FinetuneRefiner(loaded)).test(
        ldm.TinyLatentDiffusion(), ldm.loader(), ckpt_path=tmp_path / "2.ckpt", verbose=False
    )
    assert found
    assert torch.equal(weights(loaded), ends[0][0])


class Keep(Callback):
    """Saves a checkpoint at the end of the last epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_a_schedule_and_the_refiners_folder(
    ldm: ModuleType, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    class Scheduled(ldm.TinyLatentDiffusion):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]

    refiner = ldm.measured()
    before = weights(refiner)
    callback = FinetuneRefiner(refiner, paired="audio_embedding", folder=str(tmp_path / "tuned"))
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(Scheduled(), ldm.loader())
    assert [len(o.param_groups) for o in trainer.optimizers] == [1]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    saved = DiffGAPRefiner.from_pretrained(tmp_path / "tuned")
    assert torch.equal(weights(saved), weights(refiner))
    assert not torch.equal(weights(saved), before)


def test_what_cannot_be_trained_is_refused(ldm: ModuleType, make_trainer: Callable[..., Trainer]) -> None:
    text, audio, _ = ldm.world()
    identity = IdentityBridge().fit({"text": text, "audio": audio}, dict.fromkeys(("text", "audio"), torch.arange(192)))
    with pytest.raises(TypeError, match="got IdentityBridge, expected a DiffGAPRefiner"):
        make_trainer(FinetuneRefiner(identity)).fit(ldm.TinyLatentDiffusion(), ldm.loader())
    with pytest.raises(ValueError, match="expected 'train' among them"):
        FinetuneRefiner(ldm.measured(), stages=["validate"])
    with pytest.raises(ValueError, match="loss_weight: got -1"):
        FinetuneRefiner(ldm.measured(), loss_weight=-1)
    by_hand = ldm.TinyLatentDiffusion()
    by_hand.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes by hand"):
        make_trainer(FinetuneRefiner(ldm.measured())).fit(by_hand, ldm.loader())
    refiner = ldm.measured()
    module = ldm.TinyLatentDiffusion()
    with pytest.raises(ValueError, match="paired: got 'sound', expected one of the batch's keys .caption, audio_embe"):
        make_trainer(FinetuneRefiner(refiner, paired="sound")).fit(module, ldm.loader())
    assert not hasattr(module, FinetuneRefiner.NAME)
    assert all(p.requires_grad for p in refiner.parameters())
    with pytest.raises(ValueError, match="optimizer: got 1, but the module has 1"):
        make_trainer(FinetuneRefiner(ldm.measured(), optimizer=1)).fit(
            ldm.TinyLatentDiffusion(own_parameters_only=True), ldm.loader()
        )


@pytest.mark.slow
def test_two_ranks_train_one_refiner(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    saved = DiffGAPRefiner.from_pretrained(tmp_path / "refiner").state_dict()
    assert all(torch.equal(first[k], saved[k]) for k in first)
