"""Exact ranks in both directions beside the bare matrix product in tiles, torchmetrics, and the whole matrix.

python benchmarks/speed_retrieval.py 50000          ratio to the bare product; a GPU also checks against float64
python benchmarks/speed_retrieval.py --torchmetrics ratio to `RetrievalRecall`, both ways, at 5000 rows
python benchmarks/speed_retrieval.py 50000 --memory peak above the embeddings, in a process of its own
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.functional.mutual_retrieval import mutual_retrieval_ranks
from speed_clock import in_turns, seconds
from speed_memory import peak_mb


def pairs(rows: int, dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of two modalities, row i of one the partner of row i of the other, and their ids."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(rows, dim, generator=g)
    x, y = (normalize(shared + 2 * torch.randn(rows, dim, generator=g), dim=1).to(device) for _ in range(2))
    return x, y, torch.arange(rows, device=device)


def bare_product(x: Tensor, y: Tensor, tile: int) -> None:
    """All scores, tile by tile, each overwritten by the next."""
    out = x.new_empty(tile, tile)
    for i in range(0, len(x), tile):
        for j in range(0, len(y), tile):
            a, b = x[i : i + tile], y[j : j + tile]
            torch.mm(a, b.T, out=out[: len(a), : len(b)])


def ratio_to_product(rows: int, dim: int, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of both, in turns."""
    x, y, ids = pairs(rows, dim, device)
    tile = 1024 if device == "cpu" else 8192
    times: dict[str, list[float]] = {"ranks": [], "product": []}
    small = slice(0, 2 * tile)
    mutual_retrieval_ranks(x[small], y[small], ids[small], ids[small])
    for _ in range(rounds):
        times["product"].append(seconds(lambda: bare_product(x, y, tile), device))
        times["ranks"].append(seconds(lambda: mutual_retrieval_ranks(x, y, ids, ids), device))
    best = {name: min(values) for name, values in times.items()}
    return {
        "rows": rows, "dim": dim, "threads": torch.get_num_threads(), "rounds": rounds,
        "seconds": best, "ranks_over_product": best["ranks"] / best["product"],
        "tflops": 2 * rows**2 * dim / best["ranks"] / 1e12, "wrong_ranks": wrong_ranks(x, y, ids),
    }  # fmt: skip


def wrong_ranks(x: Tensor, y: Tensor, ids: Tensor, sample: int = 200) -> dict[str, int]:
    """How many of a sample's ranks differ from those in float64, and how many rows there were."""
    forward, _ = mutual_retrieval_ranks(x, y, ids, ids)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:sample].to(x.device)
    scores = x[chosen].double() @ y.double().T
    own = scores[torch.arange(len(chosen), device=x.device), chosen]
    exact = (scores > own[:, None]).sum(1) + 1
    return {"sample": len(chosen), "wrong": int((forward.best[chosen] != exact.to(forward.best.device)).sum())}


def beside_torchmetrics(rows: int, dim: int, rounds: int) -> dict[str, Any]:
    """Recall both ways: ours, the whole matrix, `RetrievalRecall` at 1 and at 1, 5 and 10, and the product alone.

    Ranks answer for every k at once, `RetrievalRecall` for one. What torchmetrics takes over the product alone is the
    most that any exact method can gain on it.
    """
    from torchmetrics.retrieval import RetrievalRecall

    x, y, ids = pairs(rows, dim, "cpu")
    truth = torch.eye(rows, dtype=torch.bool).flatten()
    index = ids[:, None].expand(rows, rows).flatten()

    def whole() -> None:
        scores = x @ y.T
        own = scores.diagonal()
        (scores > own[:, None]).sum(1), (scores > own[None, :]).sum(0)

    def theirs(*top_k: int) -> None:
        scores = x @ y.T
        for each_way in (scores, scores.T):
            for k in top_k:
                metric = RetrievalRecall(top_k=k)
                metric.update(each_way.flatten(), truth, index)
                metric.compute()

    calls = {"ranks": lambda: mutual_retrieval_ranks(x, y, ids, ids), "whole matrix": whole}
    times = in_turns(calls | {"product": lambda: bare_product(x, y, 1024)}, rounds)
    times["torchmetrics"] = min(seconds(lambda: theirs(1)) for _ in range(rounds))
    times["torchmetrics at 1, 5, 10"] = min(seconds(lambda: theirs(1, 5, 10)) for _ in range(rounds))
    return {"rows": rows, "seconds": times} | {
        f"{theirs_name} over {name}": times[theirs_name] / times[name]
        for theirs_name in ("torchmetrics", "torchmetrics at 1, 5, 10")
        for name in (*calls, "product")
    }


def memory(rows: int, dim: int) -> float:
    """MB above the embeddings, measured in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, str(rows), "--dim", str(dim), "--child"], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout)["mb"])


def memory_child(rows: int, dim: int) -> None:
    """Prints the peak; a small call first, for what importing and threads need."""
    x, y, ids = pairs(rows, dim, "cpu")
    mutual_retrieval_ranks(x[:3000], y[:3000], ids[:3000], ids[:3000])
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident now, not at the peak of drawing the rows
    mutual_retrieval_ranks(x, y, ids, ids)
    print(json.dumps({"mb": peak_mb() - resource.getpagesize() * pages / 1e6}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=5000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--torchmetrics", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        memory_child(a.rows, a.dim)
    elif a.memory:
        print(memory(a.rows, a.dim))
    elif a.torchmetrics:
        print(beside_torchmetrics(a.rows, a.dim, a.rounds))
    else:
        print(ratio_to_product(a.rows, a.dim, a.device, a.rounds))


if __name__ == "__main__":
    main()
