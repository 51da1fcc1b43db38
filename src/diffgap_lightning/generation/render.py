"""`RenderSamples`: hear a refiner while it is being trained.

At the end of a validation epoch, now and then, a few prompts go through a frozen generator with and without the present
refiner; the sounds and their page lie in `renders/epoch-0010/` of the run's folder, and loggers that take audio, as
TensorBoard does, get them too. The noise is the same every time: what changes from page to page is the refiner.

    trainer:
      callbacks:
        - class_path: diffgap_lightning.generation.render.RenderSamples
          init_args: {model: audioldm-s-full-v2/, prompts: [a dog barks in the rain, ocean waves], seconds: 5}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from diffgap_lightning.data.mux import read_wav
from diffgap_lightning.generation.folder import Record, RunFolder
from diffgap_lightning.generation.items import text_item
from diffgap_lightning.generation.loading import Backend, load_generator
from diffgap_lightning.generation.rendering import Renderer
from diffgap_lightning.generation.run import GenerationRun
from diffgap_lightning.generation.settings import GenerationSettings
from diffgap_lightning.integrations.diffusers_generator import as_generator
from diffgap_lightning.integrations.generator import EmbeddingGenerator


class RenderSamples(Callback):
    """Render prompts at the first validation and at those that come n epochs or more after the last rendering.

    The module offers its refiner as `pl_module.refiner`, as `DiffGAPModule` does; it knows text to audio. The generator
    is loaded when it is first needed, on the first rank alone, and is no part of the module or its checkpoints.

    Args:
        prompts: What to render.
        model: A local folder or a cached hub id; see `load_generator`.
        generator: Instead of `model`: a diffusers pipeline, or an `EmbeddingGenerator`.
        backend: Which package runs `model`.
        every_n_epochs: n.
        seconds: Length of the sounds; None: the generator's own.
        num_steps: The generator's sampler steps; None: its default.
        seed: Of all noise.
        batch_size: Sounds that are made at a time.
        device: Of the generator; `"auto"`: where the module is.
        folder: Where to write; by default `renders/` in the run's folder (`Trainer.default_root_dir`).

    Raises:
        ValueError: no prompts, both or neither of `model` and `generator`, or a number below 1.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        model: str | None = None,
        generator: Any = None,
        backend: Backend = "diffusers",
        every_n_epochs: int = 10,
        seconds: float | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        batch_size: int = 4,
        device: str = "auto",
        folder: str | None = None,
    ) -> None:
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts: got {prompts!r}, expected a list of at least one text")
        if (model is None) == (generator is None):
            raise ValueError("RenderSamples: give either model (a name or folder) or generator (an object)")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: got {every_n_epochs}, expected at least 1")
        self.items = [text_item(prompt) for prompt in prompts]
        self.model, self.backend, self.device, self.folder = model, backend, device, folder
        self.every_n_epochs, self.batch_size = every_n_epochs, batch_size
        self.settings = GenerationSettings(seconds=seconds, num_steps=num_steps, seed=seed)
        self._generator: EmbeddingGenerator | None = None if generator is None else as_generator(generator)
        self._last_epoch: int | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Render once an epoch, while averaged weights are in place (see `EmbeddingMap`)."""
        last, epoch = self._last_epoch, trainer.current_epoch
        due = trainer.state.fn != "fit" or last is None or epoch - last >= self.every_n_epochs
        if batch_idx or dataloader_idx or trainer.sanity_checking or not due or not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._last_epoch = epoch
        with torch.no_grad():
            self._render(trainer, pl_module, epoch)

    def _render(self, trainer: Trainer, pl_module: Any, epoch: int) -> None:
        refiner = getattr(pl_module, "refiner", None)
        if refiner is None or ("text", "audio") not in refiner.directions:
            raise ValueError(f"RenderSamples: {type(pl_module).__name__} has no refiner from text to audio")
        if self._generator is None:
            assert self.model is not None
            device = str(pl_module.device) if self.device == "auto" else self.device
            self._generator = load_generator(self.model, self.backend, device=device)
        renderer = Renderer(self._generator, refiner, self.settings, batch_size=self.batch_size)
        root = Path(self.folder or Path(trainer.default_root_dir) / "renders")
        out = RunFolder(root / f"epoch-{epoch:04d}", {"epoch": epoch, "step": trainer.global_step})
        out.prepare(overwrite=True)
        facts = {"generator": self._generator.name, "epoch": epoch, "step": trainer.global_step}
        was_training = refiner.training
        refiner.eval()
        try:
            records = GenerationRun(renderer, out, f"Epoch {epoch}", facts).run(self.items)
        finally:
            refiner.train(was_training)
        self._log(trainer, out, records)

    def _log(self, trainer: Trainer, out: RunFolder, records: Sequence[Record]) -> None:
        for logger in trainer.loggers:
            add_audio = getattr(getattr(logger, "experiment", None), "add_audio", None)
            if not callable(add_audio):
                continue
            for record in records:
                for version in record["versions"]:
                    waveform, rate = read_wav(out.file(version["audio"]))
                    tag = f"render/{version['name']}/{record['text'][:60]}"
                    add_audio(tag, waveform[None], global_step=trainer.global_step, sample_rate=rate)

    def state_dict(self) -> dict[str, Any]:
        """When it was last due, for resuming."""
        return {"last_epoch": self._last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._last_epoch = state_dict["last_epoch"]
