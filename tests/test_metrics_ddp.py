"""Two and three gloo processes; this file is also the program that they run, with arguments RANK FOLDER."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffgap_lightning.metrics import ModalityGap, PairedRetrieval

WORLD, TEXT, AUDIO = 3, 30, 12
TIMEOUT_S = 240
FOR_TWO = ("uneven", "first rank empty", "padded by repetition")  # every collective costs: not all cases twice
Share = tuple[list[list[int]], list[list[int]]]  # batches of text rows, batches of audio rows


def cut(rows: int, bounds: list[int]) -> list[list[int]]:
    ends = [0, *bounds, rows]
    return [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]


def cases(ranks: int) -> dict[str, list[Share]]:
    """For every rank the row numbers of its batches; together each case covers all rows."""
    even = list(zip(cut(TEXT, [10, 20][: ranks - 1]), cut(AUDIO, [4, 8][: ranks - 1]), strict=True))
    uneven = list(zip(cut(TEXT, [17, 19][: ranks - 1]), cut(AUDIO, [1, 11][: ranks - 1]), strict=True))
    everything = (list(range(TEXT)), list(range(AUDIO)))
    return {
        "even": [([t], [a]) for t, a in even],
        "uneven": [([t], [a]) for t, a in uneven],
        "first rank empty": [([], []) if r == 0 else ([everything[0]], [everything[1]]) for r in range(ranks)],
        "last rank gets empty batches": [
            ([[], []], [[], []]) if r == ranks - 1 else ([everything[0]], [everything[1]]) for r in range(ranks)
        ],
        "a modality a rank": [([everything[0]], [[]]) if r == 0 else ([[]], [everything[1]]) for r in range(ranks)],
        "batches in different number": [
            ([[k] for k in t] if r else [t], [[k] for k in a] if r else [a]) for r, (t, a) in enumerate(uneven)
        ],
        "padded by repetition": [([t, [0, 1, 29]], [a, [0, 0, 11]]) for t, a in even],
        "all ranks see all": [([everything[0]], [everything[1][::-1]]) for _ in range(ranks)],
    }


def table() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    audio, ids = torch.randn(AUDIO, 16, generator=g), torch.arange(TEXT) % AUDIO
    text = audio[ids] + 1.2 * torch.randn(TEXT, 16, generator=g)
    return {"source": torch.nn.functional.normalize(text, dim=1), "target": torch.nn.functional.normalize(audio, dim=1)}


def batch(text: list[int], audio: list[int]) -> dict[str, torch.Tensor]:
    rows = {"source": torch.tensor(text, dtype=torch.int64), "target": torch.tensor(audio, dtype=torch.int64)}
    features = {f"{side}_features": table()[side][index] for side, index in rows.items()}
    ids = {f"{side}_ids": index % AUDIO for side, index in rows.items()}
    return features | ids | {f"{side}_rows": index for side, index in rows.items()}


def metrics() -> list[PairedRetrieval | ModalityGap]:
    return [PairedRetrieval("text", "audio"), ModalityGap("text", "audio")]


def figures(share: Share, group: dist.ProcessGroup, between: bool = False) -> dict[str, float]:
    """All figures of a rank that was given `share`; `between`: also compute after the first half of the batches."""
    result: dict[str, float] = {}
    for metric in metrics():
        metric.process_group = group
        text, audio = share
        for k in range(max(len(text), len(audio))):
            metric.update(**batch(text[k] if k < len(text) else [], audio[k] if k < len(audio) else []))
            if between and k == 0:
                metric.compute()
        result |= {name: value.item() for name, value in metric.compute().items()}
    return result


def error_without_data(group: dist.ProcessGroup) -> list[str]:
    messages = []
    for metric in metrics():
        metric.process_group = group
        try:
            metric.compute()
        except ValueError as error:
            messages.append(str(error))
    return messages


def single_process() -> dict[str, float]:
    result: dict[str, float] = {}
    for metric in metrics():
        metric.distributed_available_fn = lambda: False
        metric.update(**batch(list(range(TEXT)), list(range(AUDIO))))
        result |= {name: value.item() for name, value in metric.compute().items()}
    return result


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    report: dict[str, object] = {"single": single_process()}
    for ranks in (WORLD, WORLD - 1):
        group = dist.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        chosen = cases(ranks) if ranks == WORLD else {name: cases(ranks)[name] for name in FOR_TWO}
        for name, shares in chosen.items():
            report[f"{ranks} ranks: {name}"] = figures(shares[rank], group)
        halves = [([t[:5], t[5:]], [a[:2], a[2:]]) for (t,), (a,) in cases(ranks)["even"]]
        report[f"{ranks} ranks: compute between updates"] = figures(halves[rank], group, between=True)
        report[f"{ranks} ranks: no data"] = error_without_data(group)
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def run(folder: Path) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    logs = [(folder / f"{rank}.log").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + TIMEOUT_S
        codes = [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    text = "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(WORLD))
    assert codes == [0] * WORLD, text
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.slow
def test_every_distribution_of_rows_gives_the_figures_of_one_process_exactly(tmp_path: Path) -> None:
    reports = run(tmp_path)
    single = reports[0]["single"]
    assert 0 < single["text_to_audio/r1"] < 1
    assert set(reports[2]) < set(reports[0])
    for report in reports:
        for case, values in report.items():
            if case.endswith("no data"):
                assert values == [
                    f"{kind}: no rows of 'text'; call update() with some before compute()"
                    for kind in ("PairedRetrieval", "ModalityGap")
                ]
            else:
                assert values == single, case
    assert len(reports[0]) == 1 + len(cases(WORLD)) + len(FOR_TWO) + 2 * 2


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
