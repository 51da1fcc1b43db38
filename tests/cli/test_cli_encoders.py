from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from diffgap_lightning.cli.main import main
from diffgap_lightning.encoders.base import unit
from diffgap_lightning.encoders.hashing import HashingEncoder


class CollapsedEncoder(HashingEncoder):
    def __init__(self, check: bool = True) -> None:
        super().__init__()
        assert not check, "the command shows failures in its table instead of refusing to load"

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        return unit(0.3 * super().embed_text(texts) + 1.0)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A class path under which the encoder above is found."""
    import sys

    module = ModuleType("broken_encoder")
    module.CollapsedEncoder = CollapsedEncoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_encoder", module)
    return "broken_encoder.CollapsedEncoder"


def test_list_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffgap_lightning.cli import encoders

    monkeypatch.setattr(encoders, "find_spec", lambda name: None if name == "laion_clap" else object())
    main(["encoders", "list"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "pip install 'diffgap-lightning[laion-clap]'" in lines["laion-clap"]
    assert lines["open-clip"].endswith("ready")
    assert lines["hashing"].split() == ["hashing", "audio,", "text,", "video", "ready"]
    main(["encoders", "list", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["laion-clap"]["installed"] is False
    assert rows["transformers-clap"]["extra"] == "transformers"


def test_check_prints_a_table_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "new" / "checks.json"
    main(
        ["encoders", "check", "--encoder", "hashing", "--encoder.dim", "32", "--modality", "text", "--json", str(path)]
    )
    out = capsys.readouterr().out
    assert out.startswith("hashing/dim32")
    assert "ok      text   collapse" in out
    record = json.loads(path.read_text())
    assert record["encoder"].startswith("hashing/dim32")
    assert {c["modality"] for c in record["checks"]} == {"text"}
    assert f"{len(record['checks'])} of {len(record['checks'])} checks passed" in out


def test_a_failed_check_says_what_to_do_and_exits_1(capsys: pytest.CaptureFixture[str], importable: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["encoders", "check", "--encoder", importable, "--modality", "text"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "FAILED  text   collapse" in out
    assert "text collapse: the space has collapsed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "hasing"], "not a short name (hashing, laion-clap"),
        (["--encoder", "hashing", "--modality", "smell"], "the encoder has audio, text, video"),
        (["--encoder", "hashing", "--device", "gpu9"], "--device: gpu9 cannot be used"),
        (["--encoder", "hashing", "--encoder.dims", "3"], "see `diffgap encoders check --encoder hashing"),
    ],
)
def test_mistakes_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["encoders", "check", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_of_an_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    main(["encoders", "check", "--encoder", "transformers-clap", "--encoder.help"])
    assert "--encoder.revision" in capsys.readouterr().out
