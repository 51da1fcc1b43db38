"""The console script `diffgap`: imports only the chosen command's module, and turns a user's mistake into one line.

To add a command, add a row to `COMMANDS`: name -> (`"module:function"`, one line of help). The function's signature is
`run(argv: list[str]) -> int`: it gets the arguments after the command's name, prints its results to stdout and its
progress to stderr, and returns the exit status. It reports a user's mistake by raising `ValueError`, `TypeError` or
`OSError` with a one-line message (`cli.arguments.ArgumentParser` does so for wrong flags).

Exit status: 0 done, 2 a user's mistake (one line on stderr), 130 interrupted; 143 and 138 stopped by SIGTERM and by
SIGUSR1, `fit` after saving. With `DIFFGAP_TRACEBACK=1` in the environment a mistake shows its traceback instead.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from diffgap_lightning import __version__
from diffgap_lightning.cli.arguments import one_line, suggest

COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("diffgap_lightning.cli.trainer:fit", "train a refiner from a YAML file"),
    "validate": ("diffgap_lightning.cli.trainer:validate", "measure a trained run on its validation rows"),
    "test": ("diffgap_lightning.cli.trainer:test", "measure a trained run on its test rows"),
    "predict": ("diffgap_lightning.cli.trainer:predict", "refine the embeddings of the prediction rows"),
    "compare": ("diffgap_lightning.cli.compare:run", "bridges and a refiner on one table: text, JSON, a page"),
    "embed": ("diffgap_lightning.cli.embed:run", "embed a corpus of audio, text and video into shards"),
    "evaluate": ("diffgap_lightning.cli.evaluate:run", "measure generated clips: FAD, FD, KAD, KL, IS, CLAP score"),
    "encoders": ("diffgap_lightning.cli.encoders:run", "list the encoders, and check that one is what it claims to be"),
    "generate": ("diffgap_lightning.cli.generate:run", "texts and videos into sound, with and without the refiner"),
    "demo": ("diffgap_lightning.cli.demo:run", "the same in a browser on this machine, one prompt or video at a time"),
    "shards": ("diffgap_lightning.cli.shards:run", "pack embeddings into shards for streaming, and look after them"),
}

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


def usage() -> str:
    """The text of `diffgap --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: diffgap COMMAND [ARGUMENTS]\n\n"
        "Close the modality gap of contrastive embeddings with a small diffusion refiner.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n  -h, --help     this text; `diffgap COMMAND --help` explains one command\n"
        "  --version      the installed version\n\n"
        "example:\n  diffgap fit --config configs/quickstart.yaml"
    )


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: with the exit status, unless that is 0.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text, or not in this locale
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] in ("-V", "--version"):
        print(f"diffgap-lightning {__version__}")
        return
    status = _run(arguments[0], arguments[1:])
    if status:
        sys.exit(status)


def _run(name: str, argv: list[str]) -> int:
    """Import and run one command; every expected failure ends as one line on stderr and a status."""
    if name not in COMMANDS:
        print(f"diffgap: error: unknown command {name!r}{suggest(name, COMMANDS)}", file=sys.stderr)
        return 2
    with _interrupts() as interrupts:
        try:
            return _load(COMMANDS[name][0])(argv)
        except KeyboardInterrupt:
            return _interrupted(name)
        except BrokenPipeError:  # the reader of our output left, e.g. `diffgap compare ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if interrupts:
                return _interrupted(name)
            if os.environ.get("DIFFGAP_TRACEBACK") or not isinstance(error, _USER_ERRORS):
                raise
            print(f"diffgap {name}: error: {one_line(str(error)) or type(error).__name__}", file=sys.stderr)
            return 2


def _interrupted(name: str) -> int:
    print(f"\ndiffgap {name}: interrupted", file=sys.stderr)
    return 130


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C as ever, and kept: a package that is being imported may swallow it and then fail for want of a module."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else's to handle
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _load(target: str) -> Callable[[list[str]], int]:
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)


if __name__ == "__main__":
    main()
