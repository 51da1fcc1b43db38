"""What the machine can do at most: matrix products, copies, and how long a launch takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from speed_clock import in_turns, seconds


def ceilings(device: str, rounds: int) -> dict[str, Any]:
    """TFLOP/s of square products by dtype, GB/s of copies, microseconds of a launch."""
    on_gpu = device == "cuda"
    size = 8192 if on_gpu else 1024
    dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "matmul_size": size, "matmul_tflops": {}}
    if on_gpu:
        found["gpu"] = torch.cuda.get_device_name()
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        time = in_turns({"": lambda a=a, b=b: a @ b}, rounds, device)[""]
        found["matmul_tflops"][str(dtype).removeprefix("torch.")] = 2 * size**3 / time / 1e12
    numbers = torch.randn((1 << 28) if on_gpu else (1 << 24), device=device)
    copy = torch.empty_like(numbers)
    time = in_turns({"": lambda: copy.copy_(numbers)}, rounds, device)[""]
    found["copy_gb_per_second"] = 2 * numbers.numel() * 4 / time / 1e9
    one = torch.zeros(1, device=device)
    found["launch_us"] = 1e6 * seconds(lambda: one.add_(1), device, 2000)
    if on_gpu:
        found["graph_node_us"] = 1e6 * seconds(_hundred_launches(one), device, 100) / 100
    return found


def _hundred_launches(one: torch.Tensor) -> Callable[[], Any]:
    """The same launches as one graph."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(100):
            one.add_(1)
    return graph.replay
