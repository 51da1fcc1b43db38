from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module

import pytest

from diffgap_lightning import __version__
from diffgap_lightning.cli import main as cli
from diffgap_lightning.cli.arguments import ArgumentParser


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Installs a function as the command `probe`."""

    def install(function) -> None:
        monkeypatch.setitem(cli.COMMANDS, "probe", ("nowhere:run", "a test's command"))
        monkeypatch.setattr(cli, "_load", lambda target: function)

    return install


def test_help_and_version_import_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from diffgap_lightning.cli.main import main; main(['--help']); main(['--version']);"
        "bad = {'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout
    for name, (_, text) in cli.COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


def test_main_returns_none_after_success(command) -> None:
    seen: list[list[str]] = []
    command(lambda argv: seen.append(argv) or 0)
    assert cli.main(["probe", "--a", "1"]) is None
    assert seen == [["--a", "1"]]


def test_a_status_other_than_zero_is_the_exit_status(command) -> None:
    command(lambda argv: 7)
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe"])
    assert stop.value.code == 7


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
def test_a_users_mistake_is_one_line_and_status_two(command, capsys, monkeypatch, error) -> None:
    def run(argv: list[str]) -> int:
        raise error("x.npz: got\n  3 rows,   expected 4")

    command(run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "diffgap probe: error: x.npz: got 3 rows, expected 4\n"
    monkeypatch.setenv("DIFFGAP_TRACEBACK", "1")
    with pytest.raises(error):
        cli.main(["probe"])


def test_our_own_bug_keeps_its_traceback(command) -> None:
    def run(argv: list[str]) -> int:
        raise KeyError("a bug")

    command(run)
    with pytest.raises(KeyError):
        cli.main(["probe"])


def test_ctrl_c_exits_130_with_one_line(command, capsys) -> None:
    def run(argv: list[str]) -> int:
        raise KeyboardInterrupt

    command(run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "diffgap probe: interrupted"


def test_ctrl_c_that_a_package_turns_into_another_error_is_still_ctrl_c(command, capsys) -> None:
    """As some do while they are imported: they swallow it and then lack what they did not import."""

    def run(argv: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:
            raise RuntimeError("failed to import, look up to see the traceback") from error
        return 0

    command(run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "diffgap probe: interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("typed", "meant"), [("fitt", "'fit'"), ("comapre", "'compare'"), ("zzz", "there are: fit")])
def test_an_unknown_command_names_the_nearest(typed: str, meant: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([typed])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert meant in line
    assert line.count("\n") == 1


@pytest.mark.slow
def test_every_command_has_its_function() -> None:
    for target, _ in cli.COMMANDS.values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))


def test_a_wrong_flag_names_the_nearest() -> None:
    parser = ArgumentParser(prog="diffgap probe")
    parser.add_argument("--bootstrap", type=int)
    with pytest.raises(ValueError, match=r"--bootstrp.*did you mean --bootstrap\?.*diffgap probe --help"):
        parser.parse_args(["--bootstrp", "3"])
    with pytest.raises(ValueError, match="invalid int value: 'x'"):
        parser.parse_args(["--bootstrap", "x"])
