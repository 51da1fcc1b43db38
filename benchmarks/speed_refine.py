"""Refining: `refine`, and `prepare` with CUDA graphs where there is a GPU, beside their matrix products alone.

The products are those that the prepared refiner makes, with its own weights in its own order and nothing between them:
what no implementation of this network can be faster than by much. Everything is measured in turns.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from diffgap_lightning.refiner import DiffGAPRefiner
from diffgap_lightning.refiner.prepared import PreparedRefiner
from speed_clock import in_turns

STEPS = 10


def default_refiner(device: str, width: int = 512, depth: int = 3, dim: int = 512) -> DiffGAPRefiner:
    """All coordinates, networks of random weights."""
    g = torch.Generator().manual_seed(0)
    rows = {m: normalize(torch.randn(6000, dim, generator=g), dim=1) for m in ("text", "audio")}
    ids = dict.fromkeys(rows, torch.arange(6000))
    torch.manual_seed(0)
    return DiffGAPRefiner.measure(rows, ids, rank="full", width=width, depth=depth).to(device)


@torch.inference_mode()
def products(prepared: PreparedRefiner, rows: Tensor) -> None:
    """The matrix products of one call."""
    p, low = prepared, rows.to(prepared.dtype)
    condition = rows @ p.encode
    p.closed_form.mean(condition)
    condition @ p.rotate, condition @ p.rotate, condition @ p.into, condition @ p.out_of
    linear(low, p.known_weight), low @ p.mean_weight.T
    steer = low.new_zeros(len(p.factors), len(low), p.modulate_weight.shape[1])
    linear(steer, p.modulate_weight)
    h = low[:, : p.width] if p.width <= low.shape[1] else low.repeat(1, 2)[:, : p.width]
    for _ in p.factors:
        low @ p.residual_weight.T
        for k in range(p.depth):
            linear(h, p.get_buffer(f"first_weight_{k}"))
            linear(h, p.get_buffer(f"second_weight_{k}"))
        linear(h, p.output_weight)


def flops(prepared: PreparedRefiner) -> int:
    """Operations a row, of the products."""
    p = prepared
    square = sum(m.numel() for m in (p.encode, p.rotate, p.rotate, p.into, p.out_of, p.closed_form.weight))
    once = square + p.known_weight.numel() + p.mean_weight.numel()
    blocks = sum(p.get_buffer(f"{n}_weight_{k}").numel() for n in ("first", "second") for k in range(p.depth))
    each = p.modulate_weight.numel() + p.residual_weight.numel() + blocks + p.output_weight.numel()
    return 2 * (once + len(p.factors) * each)


def refining(device: str, batches: tuple[int, ...], rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds a call and ratios, by batch size."""
    refiner = default_refiner(device)
    prepared = refiner.prepare(source="text", target="audio", num_steps=STEPS, dtype=dtype)
    noise = torch.Generator(device).manual_seed(0)
    found: dict[str, Any] = {"steps": STEPS, "dtype": str(dtype), "flops_per_row": flops(prepared)}
    for batch in batches:
        rows = normalize(torch.randn(batch, 512, device=device), dim=1)
        graph_of_products = recorded(prepared, rows)
        calls = {
            "refine": lambda rows=rows: refiner.refine(
                rows, source="text", target="audio", num_steps=STEPS, generator=noise
            ),
            "prepared": lambda rows=rows: prepared.refine(rows, noise, check=False),
            "products": graph_of_products,
        }
        if device == "cuda":
            calls["prepared, not recorded"] = lambda rows=rows: eager(prepared, rows)
        times = in_turns(calls, rounds, device)
        found[str(batch)] = {f"{k}_ms": 1e3 * v for k, v in times.items()} | {
            "prepared_over_products": times["prepared"] / times["products"],
            "refine_over_prepared": times["refine"] / times["prepared"],
            "rows_per_second": batch / times["prepared"],
            "tflops": batch * found["flops_per_row"] / times["prepared"] / 1e12,
        }
    return found


@torch.inference_mode()
def eager(prepared: PreparedRefiner, rows: Tensor) -> Tensor:
    """A call without its graph."""
    return prepared(rows, torch.randn_like(rows[:, : len(prepared.rotate)]))


def recorded(prepared: PreparedRefiner, rows: Tensor) -> Any:
    """A function that makes the products; on a GPU they are one graph, so that launching costs nothing there either."""
    if rows.device.type != "cuda":
        return lambda: products(prepared, rows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            products(prepared, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        products(prepared, rows)
    return graph.replay


def parameters(module: nn.Module) -> int:
    """Trained numbers."""
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=30)
    a = parser.parse_args()
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    print(refining(a.device, tuple(a.batches), a.rounds, dtype))


if __name__ == "__main__":
    main()
