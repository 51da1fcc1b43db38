from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffgap_lightning.cli.compare import read_data_section
from diffgap_lightning.cli.main import main

QUICK = ["--methods", "raw", "centre", "--bootstrap", "20"]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["compare", *argv])
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("diffgap compare: error: ")
    return line


def records(path: Path) -> dict[tuple[str, str], dict]:
    return {(r["method"], r["direction"]): r for r in json.loads(path.read_text())}


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from diffgap_lightning.cli.main import main\n"
        "try: main(['compare', '--help'])\n"
        "finally: assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--refiner DIR" in done.stdout


def test_only_the_data_section_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {no_such_thing: 1}\ndata: {class_path: a.B, init_args: {path: x}}\n")
    assert read_data_section(str(path)) == {"class_path": "a.B", "init_args": {"path": "x"}}
    path.write_text("data: a.B\n")
    assert read_data_section(str(path)) == {"class_path": "a.B"}


@pytest.mark.parametrize("text", ["", "model: {}\n", "data: 3\n", "data: {path: x}\n", "- data\n"])
def test_a_file_without_a_data_section_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml (has no section data|holds (nothing|a list), expected sections)"):
        read_data_section(str(tmp_path / "c.yaml"))


def test_mistakes_before_anything_heavy_is_imported(tmp_path: Path, capsys) -> None:
    assert "required: --config" in fails([], capsys)
    assert "nowhere.yaml not found" in fails(["--config", "nowhere.yaml"], capsys)
    assert "expected at least 1" in fails(["--config", "c.yaml", "--bootstrap", "0"], capsys)
    assert "invalid choice: 'dev'" in fails(["--config", "c.yaml", "--split", "dev"], capsys)
    (tmp_path / "c.yaml").write_text("data: [\n")
    assert "c.yaml is not YAML" in fails(["--config", str(tmp_path / "c.yaml")], capsys)


@pytest.mark.slow
def test_the_table_has_every_row_and_the_folder_every_file(trained: Path, tmp_path: Path, capsys) -> None:
    config, refiner = str(trained / "config.yaml"), str(trained / "refiner")
    out, extra = tmp_path / "out", tmp_path / "sub" / "records.json"
    main(
        [
            "compare",
            "--config",
            config,
            "--refiner",
            refiner,
            "--bootstrap",
            "20",
            "--out",
            str(out),
            "--json",
            str(extra),
        ]
    )
    names = ["raw", "centre", "ridge", "restored", "procrustes", "cca", "mlp", "diffgap", "optimum"]
    found = records(extra)
    assert list(found) == [(n, d) for d in ("text_to_audio", "audio_to_text") for n in names]
    assert records(out / "compare.json") == found
    printed = capsys.readouterr().out
    for name in names:
        assert printed.count(f"\n{name} ") == 2
    for direction in ("text_to_audio", "audio_to_text"):
        best = max(r["r1"] for (n, d), r in found.items() if d == direction and n != "optimum")
        assert found["optimum", direction]["r1_ci"][1] >= best
        assert found["centre", direction]["cosine"] > found["raw", direction]["cosine"]
    png = (out / "space.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    page = (out / "compare.html").read_text()
    assert base64.b64encode(png).decode() in page
    assert "refined by diffgap" not in page  # the picture's words are in the picture
    assert str(refiner) in page


@pytest.mark.slow
def test_without_a_refiner_the_bridges_stand_alone(trained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["compare", "--config", str(trained / "config.yaml"), "--data.num_test", "30", "--split", "test", *QUICK])
    found = records(tmp_path / "runs" / "compare" / "compare.json")
    assert {n for n, _ in found} == {"raw", "centre"}
    assert {r["n_query"] for r in found.values()} == {30}
    assert "page: runs/compare/compare.html" in capsys.readouterr().out


@pytest.mark.slow
def test_the_folder_is_beside_the_refiner_and_the_seed_decides(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    command = ["compare", "--config", str(run / "config.yaml"), "--refiner", str(run / "refiner"), "--bootstrap", "20"]
    found = []
    for seed in ("0", "0", "1"):
        main([*command, "--methods", "centre", "diffgap", "--split", "val", "--seed", seed])
        found.append(records(run / "compare" / "compare.json"))
    assert found[0] == found[1] != found[2]
    assert {r["n_query"] for r in found[0].values()} == {60}


@pytest.mark.slow
def test_mistakes_are_one_line(trained: Path, tiny_config: Path, tmp_path: Path, capsys) -> None:
    config = ["--config", str(tiny_config)]
    assert "unknown 'rigde'; did you mean 'ridge'?" in fails([*config, "--methods", "rigde"], capsys)
    assert "diffgap needs --refiner DIR" in fails([*config, "--methods", "diffgap"], capsys)
    assert "nowhere/config.json: not found" in fails([*config, "--refiner", "nowhere"], capsys)
    assert "did you mean --bootstrap?" in fails([*config, "--bootstrp", "3"], capsys)
    assert "Option 'pathh' is not accepted" in fails([*config, "--data.pathh", "x"], capsys)
    assert "table.npz" in fails([*config, "--data", "EmbeddingDataModule", "--data.path", "table.npz"], capsys)
    altered = shutil.copytree(trained / "refiner", tmp_path / "refiner")
    tensors = altered / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    assert "SHA-256" in fails([*config, "--refiner", str(altered)], capsys)
