from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from diffgap_lightning.cli.main import main

pytestmark = pytest.mark.slow


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end as a user's mistake; the line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"diffgap {argv[0]}: error: ")
    return line


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_has_everything_in_one_folder(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert {"config.yaml", "checkpoints", "refiner", "plots", "lightning_logs"} <= names
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert [p.name for p in (trained / "plots").iterdir()] == ["epoch-0000.png"]
    assert {p.name for p in (trained / "refiner").iterdir()} == {"config.json", "model.safetensors"}
    assert list((trained / "lightning_logs" / "version_0").glob("events.out.*"))


def test_the_saved_config_starts_the_run_again(trained: Path, tiny_config: Path) -> None:
    saved, given = (yaml.safe_load(p.read_text()) for p in (trained / "config.yaml", tiny_config))
    assert saved["ckpt_path"] is None
    assert saved["model"]["width"] == given["model"]["width"]
    assert saved["data"]["init_args"]["num_pairs"] == given["data"]["init_args"]["num_pairs"]
    assert saved["trainer"]["default_root_dir"] == str(trained)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_reads_the_best_checkpoint_and_leaves_the_config(command: str, run: Path, capsys) -> None:
    before = (run / "config.yaml").read_text()
    main([command, "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(run)])
    out = capsys.readouterr().out
    assert "text_to_audio/r1" in out.replace("\n", "")
    assert (run / "config.yaml").read_text() == before


def test_predict_runs_on_the_best_checkpoint(run: Path) -> None:
    main(["predict", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(run)])


def test_a_second_run_in_the_same_folder_replaces_the_first(run: Path, tiny_config: Path) -> None:
    main(["fit", "--config", str(tiny_config), f"--trainer.default_root_dir={run}", "--trainer.max_epochs=1"])
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert (run / "lightning_logs" / "version_1").is_dir()


def test_a_run_goes_on_from_its_last_checkpoint(run: Path, tiny_config: Path) -> None:
    here = [f"--trainer.default_root_dir={run}", "--ckpt_path=last", "--trainer.max_epochs=3"]
    main(["fit", "--config", str(tiny_config), *here])
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    assert last["global_step"] == 3 * (400 // 64)
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None


def test_the_command_line_wins_over_a_checkpoint(run: Path, tiny_config: Path, capsys) -> None:
    here = [f"--trainer.default_root_dir={run}", "--ckpt_path=last", "--trainer.max_epochs=3"]
    line = fails(["fit", "--config", str(tiny_config), *here, "--model.width=24"], capsys)
    assert "width 16" in line
    assert "give 24" in line
    main(["fit", "--config", str(tiny_config), *here, "--model.strength=0.5", "--model.split=joint"])
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (saved["strength"], saved["split"]) == (0.5, "joint")


def test_the_datamodule_s_arguments_have_a_short_form(tiny_config: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tiny_config), "--data.num_pairs", "300", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["num_pairs"] == 300


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.max_epochs", "x"], "--trainer.max_epochs: expected int, got x"),
        (["--model.widht", "3"], "unrecognized arguments: --model.widht 3; did you mean --model.width?"),
        (["--data.num_pair", "3"], "SyntheticDataModule: Option 'num_pair' is not accepted"),
        (["--data.num_pairs", "many"], "num_pairs: expected int, got many"),
        (["--data", "Nothing"], "--data: no such class, got Nothing"),
        (["--data.batch_size", "0"], "batch_size: got 0, expected at least 1"),
        (["--model.pairs", "[[text, video]]"], "video"),
        (["--ckpt_path", "nowhere.ckpt"], "--ckpt_path: nowhere.ckpt not found"),
        (["--ckpt_path", "last", "--trainer.default_root_dir", "nowhere"], "nowhere/checkpoints/last.ckpt not found"),
        (["--trainer.accelerator", "abacus"], "abacus"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: list[str], expected: str, tiny_config: Path, capsys) -> None:
    assert expected in fails(["fit", "--config", str(tiny_config), *arguments], capsys)


def test_mistakes_in_the_file_itself(tiny_config: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    assert "no data: give --config FILE" in fails(["fit"], capsys)
    assert "does not exist" in fails(["fit", "--config", str(path)], capsys).lower()
    path.write_text("trainer: [\n")
    assert "c.yaml is not YAML (" in fails(["fit", "--config", str(path)], capsys)
    path.write_text("traner: {max_epochs: 1}\n")
    assert "unrecognized arguments: --traner.max_epochs" in fails(["fit", "--config", str(path)], capsys)
    path.write_text(tiny_config.read_text().replace("width: 16", "widht: 16"))
    assert "did you mean --model.width?" in fails(["fit", "--config", str(path)], capsys)
    path.write_text(tiny_config.read_text().replace("EmbeddingMap", "EmbedingMap"))
    line = fails(["fit", "--config", str(path)], capsys)
    assert line.endswith("has no attribute 'EmbedingMap'; see `diffgap fit --help`")


def test_testing_before_training_says_so(tiny_config: Path, tmp_path: Path, capsys) -> None:
    line = fails(["test", "--config", str(tiny_config), "--trainer.default_root_dir", str(tmp_path)], capsys)
    assert "best.ckpt not found; train first with `diffgap fit" in line


def test_a_file_that_is_no_checkpoint_is_refused(tiny_config: Path, tmp_path: Path, capsys) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "executed", "!"))

    (tmp_path / "text.ckpt").write_text("no checkpoint")
    line = fails(["test", "--config", str(tiny_config), "--ckpt_path", str(tmp_path / "text.ckpt")], capsys)
    assert "text.ckpt is not a checkpoint" in line
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.ckpt")
    line = fails(["test", "--config", str(tiny_config), "--ckpt_path", str(tmp_path / "evil.ckpt")], capsys)
    assert "evil.ckpt" in line
    assert not (tmp_path / "executed").exists()


def test_a_truncated_checkpoint_is_refused(run: Path, capsys) -> None:
    path = run / "checkpoints" / "best.ckpt"
    path.write_bytes(path.read_bytes()[:-1000])
    line = fails(["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(path)], capsys)
    assert "best.ckpt is not a checkpoint written by fit, or is truncated" in line


def test_ctrl_c_ends_a_run_with_status_130(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "pressing.py").write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\n\n\n"
        "class PressCtrlC(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = [sys.executable, "-m", "diffgap_lightning.cli.main", "fit", "--config", str(tiny_config)]
    settings = [f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks", "[{class_path: pressing.PressCtrlC}]"]
    done = subprocess.run(
        [*command, *settings],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "diffgap fit: interrupted"
