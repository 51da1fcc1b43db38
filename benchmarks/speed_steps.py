"""The bare training loop, and what a step costs one kernel at a time, recorded as a CUDA graph, and compiled too.

The loop is what is left when Lightning is taken away: draw rows, encode, two losses, backward, clip, AdamW, running
average. On a CPU nothing is recorded; `--device cpu` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.training.module import DiffGAPModule
from diffgap_lightning.training.recorded import WholeStep
from speed_clock import in_turns

EMA = 0.995


class BareLoop:
    """A loop over rows that are on the device already.

    Args:
        module: Its refiner is copied.
        tables: Modality to `(N, D)`; rows of equal number are pairs.
        batch_size: Pairs a step.
        clip: Norm to clip gradients to.
        ema: Average the weights.
        record: Replay CUDA graphs.
        half: Networks in bfloat16.
    """

    def __init__(
        self, module: DiffGAPModule, tables: dict[str, Tensor], batch_size: int, clip: float | None = None,
        ema: bool = False, record: bool = False, half: bool = False,
    ) -> None:  # fmt: skip
        self.module = copy.copy(module)  # shares the options, and nothing that training changes
        self.module._modules, self.module._generators = dict(module._modules), {}
        self.module._parameters = {"logit_scale": nn.Parameter(module.logit_scale.detach().clone())}
        self.module.refiner = copy.deepcopy(module.refiner).train()  # type: ignore[union-attr]
        self.tables, self.batch_size, self.half = tables, batch_size, half
        parameters = [p for p in self.module.refiner.parameters() if p.requires_grad]
        self.parameters = [*parameters, self.module.logit_scale]
        self.mean = [p.detach().clone() for p in self.parameters] if ema else []
        optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.01, fused=True)
        self.device = self.parameters[0].device
        clipping = (clip, "norm") if clip else None
        self.whole = WholeStep(self.module.losses, optimizer, self.module.generators(), clipping, record)
        generator = torch.Generator(self.device).manual_seed(0)
        self.order = torch.randperm(len(next(iter(tables.values()))), generator=generator, device=self.device)
        self.count = 0

    def batch(self) -> dict[str, Tensor]:
        """The next rows."""
        start = self.count * self.batch_size % max(1, len(self.order) - self.batch_size)
        rows, self.count = self.order[start : start + self.batch_size], self.count + 1
        return {m: x[rows] for m, x in self.tables.items()} | {f"{m}_id": rows for m in self.tables}

    def step(self) -> Tensor:
        """Take one step; the loss."""
        batch = self.batch()
        with torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext():
            loss = self.whole(batch, self.count % 2)["loss"]
        if self.mean:
            torch._foreach_lerp_(self.mean, self.parameters, 1 - EMA)
        return loss


def activations_mb(loop: BareLoop) -> float:
    """What a step keeps for its backward pass, beside weights and buffers."""
    module, kept = loop.module, {}
    own = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = module.losses(loop.batch(), 0)["loss"]
    del loss
    return sum(size for place, size in kept.items() if place not in own) / 1e6


def random_module(device: str, width: int, depth: int, dim: int = 512, compiled: bool = False) -> DiffGAPModule:
    """A module on random pairs; speed does not depend on what they are."""
    g = torch.Generator().manual_seed(0)
    rows = {m: normalize(torch.randn(6000, dim, generator=g), dim=1) for m in ("text", "audio")}
    ids = dict.fromkeys(rows, torch.arange(6000))
    module = DiffGAPModule(width=width, depth=depth, compile=compiled)
    module.refiner = DiffGAPRefiner.measure(rows, ids, rank="full", width=width, depth=depth, dropout=0.1)
    return module.to(device)


def flops(module: DiffGAPModule, batch_size: int) -> float:
    """Operations of the matrix products of a step: a row trains one direction, backward costs twice as much."""
    assert module.refiner is not None
    cdm = module.refiner.cdm_of("text", "audio")
    network = sum(p.numel() for p in cdm.network.parameters() if p.ndim == 2)
    fixed = sum(module.refiner.space.basis(m).numel() for m in ("text", "audio"))  # encoding, no gradient
    fixed += cdm.closed_form.weight.numel() + 4 * cdm.closed_form.basis[0].numel()
    return float(batch_size * (6 * network + 2 * fixed))


def step_times(device: str, batch_size: int, width: int, depth: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step, eager and recorded and compiled, and their share of the rate of products."""
    g = torch.Generator().manual_seed(1)
    count = max(50_000, 2 * batch_size) if device == "cuda" else 4 * batch_size
    tables = {m: normalize(torch.randn(count, 512, generator=g), dim=1).to(device) for m in ("text", "audio")}
    plain = random_module(device, width, depth)
    on_gpu = device == "cuda"
    loops = {"eager": BareLoop(plain, tables, batch_size, ema=True, half=on_gpu)}
    if on_gpu:
        compiled = random_module(device, width, depth, compiled=True)
        loops["recorded"] = BareLoop(plain, tables, batch_size, ema=True, record=True, half=True)
        loops["recorded, compiled"] = BareLoop(compiled, tables, batch_size, ema=True, record=True, half=True)
    for loop in loops.values():
        for _ in range(10 if on_gpu else 1):  # both kinds of step warm up and are recorded
            loop.step()
    times = in_turns({name: loop.step for name, loop in loops.items()}, rounds, device)
    work = flops(plain, batch_size)
    assert plain.refiner is not None
    size = sum(p.numel() for p in plain.refiner.cdm.parameters())
    found: dict[str, Any] = {"batch_size": batch_size, "width": width, "depth": depth, "parameters": size}
    found |= {"flops_per_pair": work / batch_size, "activations_mb": activations_mb(loops["eager"])}
    # Weights, gradients, two moments and the running average, float32.
    found["weights_and_optimizer_mb"] = 5 * 4 * size / 1e6
    for name, time in times.items():
        found[name] = {"ms": 1e3 * time, "pairs_per_second": batch_size / time, "tflops": work / time / 1e12}
        found[name]["eager_over_it"] = times["eager"] / time
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        loops["recorded, compiled"].step()
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    a = parser.parse_args()
    print(step_times(a.device, a.batch_size, a.width, a.depth, a.rounds))


if __name__ == "__main__":
    main()
