"""Training steps that a GPU replays: forward, backward, clipping and update recorded once as a CUDA graph.

A denoiser of a few million parameters keeps a GPU waiting for Python: some hundred kernels, each launched by hand. A
recorded step launches all of them at once. Nothing else changes: the kernels are the same, and so are the random
numbers, because a recording reads the state of their generators anew at every replay. The first steps of each kind (a
share of the batch for each direction, a batch size) are taken one kernel at a time, as CUDA graphs require, and count.

`RecordedTraining` puts this under Lightning's automatic optimization: a batch is still one step, so that checkpoints,
schedules, callbacks and resuming mean what they always mean. Where the whole step cannot be one call (see `obstacle`),
Lightning takes it in its own way, and says why. So it does if recording fails.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from diffgap_lightning.training.finite import FiniteSteps, step_unless

Capture = Literal["auto", "off", "dry"]
Batch = Mapping[str, Tensor]
Losses = Callable[[Batch, int], dict[str, Tensor]]
_WARM_UP = 3  # steps of each kind before it is recorded
_MOST_RECORDINGS = 16  # batches of ever other sizes are not worth recording
_SEPARATE_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


class WholeStep:
    """Forward, backward, clipping and update in one call.

    Args:
        losses: Of a batch and the step's kind, scalars of which `"loss"` is minimised. The kind stands for all that
            changes from step to step beside the numbers in the batch and the state of the generators.
        optimizer: With no gradients yet.
        generators: Those that `losses` draws from, beside the default one.
        clip: `(value, "norm" or "value")`, or None.
        record: Replay CUDA graphs; otherwise every step is taken one kernel at a time.
        finite: Watches the gradients.
    """

    def __init__(
        self,
        losses: Losses,
        optimizer: torch.optim.Optimizer,
        generators: Sequence[torch.Generator] = (),
        clip: tuple[float, str] | None = None,
        record: bool = False,
        finite: FiniteSteps | None = None,
    ) -> None:
        self._finite = FiniteSteps(0) if finite is None else finite
        self._losses, self._optimizer, self._generators, self._clip = losses, optimizer, generators, clip
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._seen: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, tuple[Any, dict[str, Tensor], dict[str, Tensor]]] = {}
        self._record = record
        if record:
            self._stream, self._pool = torch.cuda.Stream(self._parameters[0].device), torch.cuda.graph_pool_handle()
            _make_capturable(optimizer)

    def __call__(self, batch: Batch, kind: int) -> dict[str, Tensor]:
        """Take a step; what it returns is overwritten by the next one."""
        if not self._record:
            return self._step(batch, kind)
        key = (kind, *sorted((name, x.shape, x.dtype) for name, x in batch.items()))
        if key not in self._recordings:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= _WARM_UP or len(self._recordings) >= _MOST_RECORDINGS:
                return self._aside(batch, kind)
            try:
                self._recordings[key] = self._capture(batch, kind)
            except RuntimeError as error:  # an operation, a driver or a callback's tensor that cannot be recorded
                return self._give_up(batch, kind, error)
        graph, inputs, outputs = self._recordings[key]
        for name, x in inputs.items():
            x.copy_(batch[name], non_blocking=True)
        graph.replay()
        return outputs

    def _give_up(self, batch: Batch, kind: int, error: RuntimeError) -> dict[str, Tensor]:
        """Record nothing from here on, and take this step: what failed to be recorded has computed nothing."""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        rank_zero_warn(f"training steps are not recorded as CUDA graphs: {reason}; --model.capture off says so at once")
        self._record = False
        self._recordings.clear()
        self._optimizer.zero_grad(set_to_none=True)  # gradients of the recording lie in its memory
        return self._step(batch, kind)

    def _step(self, batch: Batch, kind: int) -> dict[str, Tensor]:
        parts = self._losses(batch, kind)
        with torch.autocast(self._parameters[0].device.type, enabled=False):  # Lightning's forward context ends here
            parts["loss"].backward()
        bad = self._finite.look(self._optimizer)
        if self._clip is not None:
            value, how = self._clip
            clip = nn.utils.clip_grad_norm_ if how == "norm" else nn.utils.clip_grad_value_
            clip(self._parameters, value)
        step_unless(self._optimizer, bad)
        self._optimizer.zero_grad(set_to_none=True)
        return {name: x.detach() for name, x in parts.items()}

    def _aside(self, batch: Batch, kind: int) -> dict[str, Tensor]:
        """A step on the stream that recordings are made on."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self._step(batch, kind)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, batch: Batch, kind: int) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """The graph, the tensors that it reads and those that it writes; recording computes nothing."""
        inputs = {name: x.clone() for name, x in batch.items()}
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Other threads may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self._step(inputs, kind)
        return graph, inputs, outputs


def _make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Keep on the device what changes from step to step: the count of steps and the learning rate."""
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are meant
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["capturable"], group["lr"] = True, torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device)


def obstacle(trainer: Trainer, module: LightningModule) -> str | None:
    """Why a step of this fit cannot be one call, or None."""
    if trainer.world_size > 1:
        return "several processes exchange gradients between backward and update"
    if trainer.accumulate_grad_batches != 1:
        return "gradients are accumulated over batches"
    if trainer.precision == "16-mixed":
        return "float16's gradient scaler decides on the CPU whether to update; bf16-mixed does not"
    if len(trainer.optimizers) != 1:
        return "there is more than one optimizer"
    if not all("capturable" in group for group in trainer.optimizers[0].param_groups):
        return f"{type(trainer.optimizers[0]).__name__} has no option `capturable`; Adam and AdamW have"
    for watcher in (*trainer.callbacks, module):  # type: ignore[attr-defined]
        base = Callback if isinstance(watcher, Callback) else LightningModule
        for hook in _SEPARATE_HOOKS:
            if getattr(type(watcher), hook) is not getattr(base, hook):
                return f"{type(watcher).__name__}.{hook} wants to look between backward and update"
    return None


class RecordedTraining(LightningModule):
    """A module whose training step is one call where that is possible.

    Args:
        capture: `"auto"`: on a GPU, record steps as CUDA graphs. `"off"`: never. `"dry"`: one call, not recorded, on
            any device; for tests and to look for errors.
        skip_non_finite: See `FiniteSteps`.
    """

    def __init__(self, capture: Capture = "auto", skip_non_finite: int = 20) -> None:
        super().__init__()
        self.finite = FiniteSteps(skip_non_finite)
        if capture not in ("auto", "off", "dry"):
            raise ValueError(f"capture: got {capture!r}, expected 'auto', 'off' or 'dry'")
        self.capture = capture
        self._whole_step: WholeStep | None = None

    def losses(self, batch: Batch, kind: int) -> dict[str, Tensor]:
        """See `WholeStep`."""
        raise NotImplementedError

    def generators(self) -> Sequence[torch.Generator]:
        """See `WholeStep`."""
        return ()

    def on_train_start(self) -> None:
        """Decide how steps are taken, now that the optimizer is there and, in a resumed run, loaded."""
        self._whole_step = None
        if self.capture == "off" or (self.capture == "auto" and self.device.type != "cuda"):
            return
        reason = obstacle(self.trainer, self)
        if reason is not None:
            rank_zero_info(f"training steps are not recorded as CUDA graphs: {reason}")
            return
        value = self.trainer.gradient_clip_val
        clip = (float(value), str(self.trainer.gradient_clip_algorithm or "norm")) if value else None
        optimizer, record = self.trainer.optimizers[0], self.capture == "auto"
        optimizer.zero_grad(set_to_none=True)
        self._whole_step = WholeStep(self.losses, optimizer, self.generators(), clip, record, self.finite)

    def on_train_end(self) -> None:
        """Let the recordings go."""
        self._whole_step = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store an optimizer state that a CPU can go on from."""
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:
                if isinstance(group.get("lr"), Tensor):
                    group.update(lr=float(group["lr"]), capturable=False)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Prevent the step if a gradient is not finite, then clip; float16's scaler looks after itself."""
        if self.trainer.precision != "16-mixed":
            self.finite.prevent(optimizer)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell of steps that were passed over: at once, or on a GPU, which would have to wait, now and then."""
        every = max(int(getattr(self.trainer, "log_every_n_steps", 50)), 1)
        if self.device.type == "cpu" or self.finite.allowed == 0 or self.global_step % every == 0:
            skipped = self.finite.tell(self.global_step)
            if skipped:
                self.log("train/skipped_steps", float(skipped), batch_size=1)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, unless the training step did it."""
        if self._whole_step is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """As Lightning's, unless the training step did it."""
        if self._whole_step is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """As Lightning's, unless the training step, which the closure calls, does it."""
        if self._whole_step is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        elif optimizer_closure is not None:
            optimizer_closure()
