"""The recipes for clusters: what one machine can run of them is run, the rest is parsed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from diffgap_lightning.cli.embed import _parser as embed_parser
from diffgap_lightning.cli.main import main
from diffgap_lightning.data.datamodules import SyntheticDataModule
from diffgap_lightning.data.shards import write_embedding_shards
from diffgap_lightning.data.synthetic import SyntheticWorld

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
OVERLAYS = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def programs(folder: Path) -> dict[str, str]:
    """An environment in which `srun` writes down its arguments and SLURM's other programs do little."""
    folder.mkdir()
    for name, body in {
        "srun": 'printf "%s\\n" "$@" > "$TOLD"',
        # More than a pipe holds: who reads the first name only and leaves stops scontrol with SIGPIPE.
        "scontrol": 'i=1; while [ $i -le 20000 ]; do echo "node$i"; i=$((i + 1)); done',
        "scancel": "true",
    }.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TOLD": str(folder / "told"),
        "SLURM_NNODES": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip


def diffgap_arguments(words: list[str]) -> list[str]:
    """What comes after `diffgap` or `-m diffgap_lightning.cli.main` in a command line."""
    at = words.index("diffgap_lightning.cli.main" if "torchrun" in words else "diffgap")
    return words[at + 1 :]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_job_script_starts_a_command_that_diffgap_takes(path: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    env = programs(tmp_path / "bin")
    done = subprocess.run(["bash", str(path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = diffgap_arguments((tmp_path / "bin" / "told").read_text().splitlines())
    if command[0] == "embed":
        assert embed_parser().parse_args(command[1:]).shards == ["raw/{0000..9999}.tar"]
        return
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    assert stop.value.code == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["num_nodes"] == 2
    assert trainer["strategy"]["class_path"].endswith("DDPStrategy")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_job_script_asks_slurm_for_what_its_text_says(path: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", path.read_text(), re.M))
    assert {"nodes", "ntasks-per-node", "time", "requeue", "open-mode"} <= set(options)
    signal = {"fit": "SIGUSR1@180", "fit_torchrun": "B:SIGUSR1@180", "embed": None}[path.stem]
    assert options.get("signal") == signal
    assert f"examples/slurm/{path.name}" in PAGE


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_an_overlay_says_how_processes_talk_and_nothing_else(path: Path) -> None:
    overlay = yaml.safe_load(path.read_text())
    assert set(overlay) == {"trainer"}
    assert set(overlay["trainer"]) == {"accelerator", "devices", "num_nodes", "strategy"}
    assert overlay["trainer"]["strategy"]["init_args"]["process_group_backend"] == path.stem


@pytest.mark.slow
def test_the_command_of_the_page_trains_on_two_processes_and_ends_when_one_dies(tmp_path: Path) -> None:
    (line,) = [c for c in re.findall(r"^torchrun (?:.*\\\n)*.*$", PAGE, re.M) if "gloo" in c]
    words = shlex.split(line.replace("\\\n", " "))
    data = SyntheticDataModule(
        num_pairs=60, num_val=20, num_test=0, world=SyntheticWorld(latent_dim=6, num_concepts=4, dim=12, hidden_dim=24)
    )
    data.setup()
    for name, kind in (("train", "pairs"), ("val", "rows")):
        write_embedding_shards(data.rows(name), tmp_path / name, kind=kind, rows_per_block=10, rows_per_shard=20)
    flags = [f"--data.{name}={tmp_path / name}" for name in ("train", "val")]
    flags += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.logger=false", "--data.test=null"]
    flags += ["--data.batch_size=10", "--data.num_workers=0", "--model.width=16", "--model.depth=1"]
    # The probe of tests/runs.py kills the second rank in its second epoch.
    flags += ["--trainer.callbacks+=runs.Probe"]
    job = {"log": str(tmp_path / "log"), "probe": ["SIGKILL", "train", 1, 1], "rank": 1}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RUNS_JOB": json.dumps(job)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words[1:], *flags],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr
    for rank in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"log.{rank}.jsonl").read_text().splitlines()]
        assert [line[:3] for line in lines if line[0] == "step"] == [
            ["step", 0, 0],
            ["step", 0, 1],
            ["step", 0, 2],
            ["step", 1, 0],
        ]
        assert [line[1] for line in lines if line[0] == "val"] == [0]
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert (tmp_path / "run" / "refiner" / "config.json").is_file()
