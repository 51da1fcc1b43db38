"""`diffgap fit | validate | test | predict`: Lightning's command line around `DiffGAPModule` and any datamodule.

A run has one folder, `--trainer.default_root_dir DIR`, and everything is in it: `config.yaml`, the logs, `checkpoints/`
(of every `ModelCheckpoint` that names no other place) and what the callbacks write, such as `refiner/` and `plots/`.
A later `fit` into the same folder replaces these and adds another version to the logs.

Values come from the YAML files and the command line alone, also with `--ckpt_path`: a checkpoint brings weights,
optimizer and loop state, never settings. `--ckpt_path best` and `last` mean those of the run's folder, `auto` the
furthest one there, or none where there is none: a command that can be repeated until it is done. `validate`, `test` and
`predict` read `best` unless told otherwise, because an untrained module has nothing to measure. Checkpoints are read
with `weights_only`: nothing in them is executed.

While a `fit` runs, another one into the same folder is refused. Told to stop (SIGTERM, SIGUSR1), it saves `last.ckpt`
and exits with 128 + the signal's number; see `training/callbacks/save_last.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import warnings
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from diffgap_lightning.cli.arguments import read_config, suggest_flag, tidy
from diffgap_lightning.cli.run_folder import CHECKPOINTS, RunLock, resolve_checkpoint
from diffgap_lightning.training.callbacks import SaveLast
from diffgap_lightning.training.checkpoint_io import AtomicCheckpointIO
from diffgap_lightning.training.module import DiffGAPModule

DEFAULT_FOLDER = "runs/diffgap"


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder when `fit` starts; it holds what is needed to start the run again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, without the checkpoint that this call may have resumed from."""
        if stage != "fit":
            return
        config = self.config.clone()
        config["ckpt_path"] = None
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(config, str(folder / self.config_filename), skip_none=False, overwrite=True, multifile=False)


class DiffGAPCLI(LightningCLI):
    """Parses and runs one of the trainer's commands.

    Args:
        command: `"fit"`, `"validate"`, `"test"` or `"predict"`; only its parser is built.
        argv: The arguments after the command's name.
    """

    def __init__(self, command: str, argv: list[str]) -> None:
        self._command = command
        self._checkpoint: str | None = None
        self._held = ExitStack()
        try:
            super().__init__(
                DiffGAPModule,
                LightningDataModule,
                subclass_mode_data=True,
                save_config_callback=SaveRunConfig,
                trainer_defaults={"default_root_dir": DEFAULT_FOLDER},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={"prog": "diffgap", "exit_on_error": False, command: {"exit_on_error": False}},
                args=[command, *argv],
            )
        except (UnpicklingError, RuntimeError) as error:
            reason = _unreadable(error)
            if self._checkpoint is None or reason is None:
                raise
            raise ValueError(f"--ckpt_path: {self._checkpoint} {reason}") from error
        finally:
            self._held.close()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one command that was asked for: building the other parsers would only cost time."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and settle which checkpoint is read before anything expensive is built."""
        for path in filter(os.path.exists, _given(list(args or ()), "--config")):
            read_config(path)  # jsonargparse does not name a file that is no mapping
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except argparse.ArgumentError as error:
            flags = self._subcommand_parsers[self._command]._option_string_actions
            message = suggest_flag(tidy(str(error)), flags)
            raise ValueError(f"{message}; see `diffgap {self._command} --help`") from error
        chosen = self.config[self._command]
        folder = chosen["trainer"]["default_root_dir"]
        self._checkpoint = resolve_checkpoint(chosen["ckpt_path"], folder, self._command)
        chosen["ckpt_path"] = self._checkpoint
        local = "://" not in str(folder) and not chosen["trainer"].get("fast_dev_run")
        if self._command == "fit" and local and getattr(rank_zero_only, "rank", 0) == 0:
            self._held.enter_context(RunLock(folder))
        if chosen.get("weights_only") is None:
            chosen["weights_only"] = True

    def _parse_ckpt_path(self) -> None:
        """Overrides Lightning's: settings stored in a checkpoint never replace those that the user gave."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with its checkpoints under the run's folder, written whole, and on a signal too."""
        if self._command == "fit" and self._get(self.config_init, "trainer")["precision"] is None:
            kwargs.setdefault("precision", _default_precision(self._get(self.config_init, "trainer")["accelerator"]))
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self._command == "fit" and not any(isinstance(c, SaveLast) for c in _callbacks(trainer)):
            _callbacks(trainer).append(SaveLast())
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(trainer.default_root_dir).absolute() / CHECKPOINTS)
        return trainer

    def after_fit(self) -> None:
        """Say where the run is."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"run: {self.trainer.default_root_dir}")


def _given(argv: list[str], flag: str) -> list[str]:
    """Values of a flag that may be repeated."""
    after = [argv[i + 1] for i, a in enumerate(argv[:-1]) if a == flag]
    return after + [a.partition("=")[2] for a in argv if a.startswith(f"{flag}=")]


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _default_precision(accelerator: str) -> str:
    """bfloat16 networks where a GPU computes them faster; spaces, closed forms, losses and ranks stay in float32."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def _unreadable(error: Exception) -> str | None:
    """Why a checkpoint could not be read, if that is what the error is about."""
    if isinstance(error, UnpicklingError):
        return "holds other things than tensors and plain values, and is not read"
    first, *details = str(error).splitlines() or [""]
    if "Error(s) in loading state_dict" in first:
        return f"is of another model than these settings give: {' '.join(details[:1]).strip()}"
    return None


def _lost_rank(error: Exception) -> bool:
    """Whether an error is about the connection between ranks."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _run(command: str, argv: list[str]) -> int:
    """Run one command; Lightning's ways to fail become those of `cli.main`."""
    _hush()
    try:
        DiffGAPCLI(command, argv)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if not _lost_rank(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"another rank ended, or the network to it did: its own output says why ({reason})"
        ) from error
    except SIGTERMException as stop:  # Lightning's own says 0, which would mean success
        return int(stop.code or 128 + signal.SIGTERM)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning shut down cleanly and exits 1
            raise KeyboardInterrupt from None
        raise
    return 0


def _hush() -> None:
    """Leave out what is no news to the user of this command; everything else that Lightning says stays."""
    for message in (
        ".*does not have many workers.*",  # tables lie in memory: no worker is right
        ".*Checkpoint directory .* exists and is not empty.*",  # a run's folder may be used again
        ".*WeightAveraging state cannot be restored.*",  # test reads the averaged weights, which is meant
        ".*WeightAveraging callback with a model that overrides.*",  # nothing is sharded here
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def fit(argv: list[str]) -> int:
    """Train."""
    return _run("fit", argv)


def validate(argv: list[str]) -> int:
    """Measure a trained run on its validation rows."""
    return _run("validate", argv)


def test(argv: list[str]) -> int:
    """Measure a trained run on its test rows."""
    return _run("test", argv)


def predict(argv: list[str]) -> int:
    """Refine the prediction rows."""
    return _run("predict", argv)
