"""A refiner for deployment: one direction, one set of options, all that does not depend on the rows done in advance.

`refine` asks the denoiser anew at every step. With the options fixed,

- times are fixed: the schedule, the embedding of the noise level and the sampler's weights are numbers;
- conditions are fixed over the steps: their projections and all (scale, shift, gate) are made in one product;
- the sampler is linear (`diffusion/linear_steps.py`), so it may run in the eigenbasis of the closed form's covariance,
  where that form multiplies coordinate by coordinate; the rotations are folded into the network's first and last layer.

Half of the matrix products and three quarters of the small operations of `refine` are gone; the result is the same to
about six digits. It is a copy: later training of the refiner does not change it. On a GPU, calls of a batch size that
was seen before are replayed as one CUDA graph. It is a plain function of tensors, which `torch.export` takes.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.linear_steps import linear_steps
from diffgap_lightning.diffusion.schedule import sampling_times
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.refiner.config import Sampler, Start, direction_name

_MOST_GRAPHS = 8  # batch sizes
_WARM_UP = 3


class PreparedRefiner(nn.Module):
    """`refine` with fixed options; made by `DiffGAPRefiner.prepare`.

    Args:
        refiner: Of embeddings, not sequences.
        source: Modality of the rows.
        target: Modality to move to.
        num_steps: As in `refine`, as are the others.
        strength: Above 0; at 0 there is nothing to prepare.
        start: `"posterior_mean"` or `"source"`.
        sampler: `"dpmpp_2m"` or `"ddim"`.
        dtype: Of the network's products: bfloat16 is faster on a GPU. All else is float32.

    Raises:
        ValueError: options that cannot be prepared.
    """

    gain: Tensor
    drift: Tensor
    source_mean: Tensor
    encode: Tensor
    rotate: Tensor
    into: Tensor
    out_of: Tensor
    target_mean: Tensor
    known_weight: Tensor
    known_bias: Tensor
    levels: Tensor
    modulate_weight: Tensor
    modulate_bias: Tensor
    residual_weight: Tensor
    mean_weight: Tensor
    output_weight: Tensor
    output_bias: Tensor

    def __init__(
        self, refiner: Any, source: str, target: str, *, num_steps: int, strength: float, start: Start,
        sampler: Sampler, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        cdm, space = refiner.cdm_of(source, target), refiner.space
        network: MLPDenoiser = cdm.network
        if not isinstance(network, MLPDenoiser):
            raise ValueError("prepare: this refiner takes sequences, expected one of single embeddings; use refine")
        if not 0 < strength <= 1:
            raise ValueError(f"strength: got {strength}, expected above 0 to 1; at 0 refine only centres")
        device = space.mean(source).device
        times = sampling_times(num_steps, strength)
        self.source, self.dim, self.dtype = source, refiner.config.dims[source], dtype
        self.from_mean, self.width = start == "posterior_mean", network.inputs.out_features
        self.restore = refiner.config.restore[direction_name(source, target)] if self.from_mean else 1.0
        self.blend = refiner.blend_of(source, target) if self.from_mean else 1.0
        if not self.from_mean:
            space.shift(space.mean(source)[None] + 1, source, target)  # refuses unequal dimensions
        self.steps = linear_steps(sampler, cdm.schedule, times.tolist())
        # The estimate from no signal, which the start needs, comes first.
        levels = torch.cat([torch.ones(1), times[:-1]]).to(device) if self.from_mean else times[:-1].to(device)
        alpha, sigma = (w[:, None] for w in cdm.schedule.alpha_sigma(levels))
        factor = {"x0": torch.ones_like(sigma), "v": -sigma, "eps": -sigma / alpha}[cdm.prediction]
        self.factors = factor[:, 0].tolist()
        self.closed_form = copy.deepcopy(cdm.closed_form).requires_grad_(False)
        basis, variance = cdm.closed_form.basis[0], cdm.closed_form.variance[0]
        gain = alpha * variance / (alpha.square() * variance + sigma.square())
        into = space.basis(target) / space.scale(target) @ basis  # (D_t, R_t): an offset's rotated coordinates
        self._keep("gain", gain)
        self._keep("drift", -alpha * gain)
        self._keep("source_mean", space.mean(source))
        self._keep("encode", space.basis(source) / space.scale(source))
        self._keep("rotate", basis)
        self._keep("into", into)
        self._keep("out_of", space.scale(target) * (basis.T @ space.basis(target).T))  # (R_t, D_t)
        self._keep("target_mean", space.mean(target))
        self._keep_network(network, network.level(cdm.schedule.log_snr(levels)), basis)
        self._graphs: dict[int, tuple[Any, Tensor, Tensor, Tensor]] = {}
        self.eval()

    def _keep_network(self, network: MLPDenoiser, levels: Tensor, basis: Tensor) -> None:
        """`(out, in)` weights in the network's dtype, the first and the last layer's rotated."""
        dtype, blocks, dim = self.dtype, list[Any](network.blocks), basis.shape[0]
        self.depth = len(blocks)
        self._keep("known_weight", network.condition.weight, dtype)
        self._keep("known_bias", network.condition.bias + _padded(network.inputs.bias, network.condition.bias), dtype)
        self._keep("levels", levels, dtype)
        modulations: list[nn.Linear] = [*(block.modulation for block in blocks), network.modulation]
        one = torch.ones_like(network.inputs.bias)
        plus = [one, 0 * one, one] * self.depth + [one, 0 * one]  # 1 + scale, shift, 1 + gate
        self._keep("modulate_weight", torch.cat([layer.weight for layer in modulations]), dtype)
        self._keep("modulate_bias", torch.cat([layer.bias for layer in modulations]) + torch.cat(plus), dtype)
        self._keep("residual_weight", network.inputs.weight[:, :dim] @ basis, dtype)
        self._keep("mean_weight", network.inputs.weight[:, dim:], dtype)
        self._keep("output_weight", basis.T @ network.output.weight, dtype)
        self._keep("output_bias", network.output.bias @ basis, dtype)
        for i, block in enumerate(blocks):
            for name, layer in (("first", block.layers[0]), ("second", block.layers[3])):
                self._keep(f"{name}_weight_{i}", layer.weight, dtype)
                self._keep(f"{name}_bias_{i}", layer.bias, dtype)

    def _keep(self, name: str, value: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.register_buffer(name, value.detach().to(dtype, copy=True).contiguous())

    def forward(self, embedding: Tensor, noise: Tensor) -> Tensor:
        """Refine without a check; the noise is the caller's.

        Args:
            embedding: `(B, D)` float32.
            noise: `(B, R_t)` standard normal.

        Returns:
            `(B, D_t)` unit rows.
        """
        rows = nn.functional.normalize(embedding, dim=1)
        offset = rows - self.source_mean
        condition = offset @ self.encode
        mean = self.closed_form.mean(condition)
        fixed, parts = self._conditioned(condition, mean)
        rotated = mean @ self.rotate
        estimates = range(len(self.factors))
        drift = [self.drift[i] * rotated for i in estimates]
        start = torch.zeros_like(rotated)
        if self.from_mean:
            start = (1 - self.blend) * self._estimate(0, drift[0], rotated, fixed, parts[0])
        z = self.restore * start
        if self.blend:
            z = z + (self.restore * self.blend) * (offset @ self.into)
        first = self.steps[0]
        x, last = first.alpha * z + first.sigma * (noise @ self.rotate), z
        for i, step in enumerate(self.steps, start=len(self.factors) - len(self.steps)):
            residual = torch.addcmul(drift[i], x, self.gain[i])
            x0 = self._estimate(i, residual, rotated, fixed, parts[i])
            x = torch.add(step.x * x, x0, alpha=step.x0)
            if step.last_x0:
                x = torch.add(x, last, alpha=step.last_x0)
            last = x0
        moved = self.restore * start + (x - z)
        out = torch.addmm(self.target_mean, moved, self.out_of)
        if self.blend:
            out = torch.add(out, offset, alpha=self.restore * self.blend)
        return nn.functional.normalize(out, dim=1)

    def _conditioned(self, condition: Tensor, mean: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """What the network makes of the condition: the stream's fixed part, and every estimate's modulations."""
        known = nn.functional.linear(condition.to(self.dtype), self.known_weight, self.known_bias)
        fixed = torch.addmm(known[:, : self.width], mean.to(self.dtype), self.mean_weight.T)
        steer = nn.functional.silu(self.levels[:, None] + known[:, self.width :])  # (estimates, B, steer)
        modulation = nn.functional.linear(steer, self.modulate_weight, self.modulate_bias)
        return fixed, [part.split(self.width, dim=1) for part in modulation.unbind(0)]

    def _estimate(self, i: int, residual: Tensor, rotated: Tensor, fixed: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The estimate of x0, in the eigenbasis: closed form, and the network's correction."""
        h = torch.addmm(fixed, residual.to(self.dtype), self.residual_weight.T)
        shape = (self.width,)
        for k in range(self.depth):
            scale, shift, gate = parts[3 * k : 3 * k + 3]
            a = torch.addcmul(shift, nn.functional.layer_norm(h, shape), scale)
            a = nn.functional.linear(a, self.get_buffer(f"first_weight_{k}"), self.get_buffer(f"first_bias_{k}"))
            a = nn.functional.silu(a)
            a = nn.functional.linear(a, self.get_buffer(f"second_weight_{k}"), self.get_buffer(f"second_bias_{k}"))
            h = torch.addcmul(h, gate, a)
        scale, shift = parts[3 * self.depth :]
        a = nn.functional.silu(torch.addcmul(shift, nn.functional.layer_norm(h, shape), scale))
        correction = nn.functional.linear(a, self.output_weight, self.output_bias)
        return torch.add(residual + rotated, correction.to(residual.dtype), alpha=self.factors[i])

    @torch.inference_mode()
    def refine(self, embedding: Tensor, generator: torch.Generator | None = None, check: bool = True) -> Tensor:
        """As `DiffGAPRefiner.refine`, with the options that were prepared.

        Args:
            embedding: `(B, D)`.
            generator: Source of the noise; on its own device or the refiner's.
            check: Refuse unusable rows; on a GPU that waits for it.
        """
        if check:
            check_embeddings(embedding, self.source, dim=self.dim)
        rows = embedding.to(self.target_mean.device, torch.float32)
        shape, device = (len(rows), len(self.rotate)), rows.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=device).to(rows.device)
        out = self._replayed(rows, noise) if rows.device.type == "cuda" else self(rows, noise)
        return out.to(embedding.device, embedding.dtype)

    def _replayed(self, rows: Tensor, noise: Tensor) -> Tensor:
        """The CUDA graph of this batch size, recorded when it is first met."""
        if len(rows) not in self._graphs:
            if len(self._graphs) >= _MOST_GRAPHS:
                return self(rows, noise)
            self._graphs[len(rows)] = self._record(rows.clone(), noise.clone())
        graph, graph_rows, graph_noise, out = self._graphs[len(rows)]
        graph_rows.copy_(rows)
        graph_noise.copy_(noise)
        graph.replay()
        return out.clone()

    def _record(self, rows: Tensor, noise: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        stream = torch.cuda.Stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self(rows, noise)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = self(rows, noise)
        return graph, rows, noise, out

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write a `torch.export` program of `(embedding, noise)` for any batch size; see `forward`.

        Where it is loaded (`torch.export.load(path).module()`, or compiled ahead of time), this package is not needed.
        """
        device = self.target_mean.device
        example = (torch.ones(2, self.dim, device=device), torch.ones(2, len(self.rotate), device=device))
        batch = torch.export.Dim("batch")
        program = torch.export.export(self, example, dynamic_shapes=({0: batch}, {0: batch}))
        torch.export.save(program, os.fspath(path))


def _padded(x: Tensor, like: Tensor) -> Tensor:
    """`x` followed by zeros."""
    return nn.functional.pad(x, (0, len(like) - len(x)))
