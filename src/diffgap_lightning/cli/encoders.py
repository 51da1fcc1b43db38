"""`diffgap encoders list | check`: which encoders there are, and whether one is what it claims to be.

diffgap encoders list
diffgap encoders check --encoder laion-clap --encoder.checkpoint 630k-audioset-best
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgap_lightning.cli.arguments import ArgumentParser
from diffgap_lightning.cli.encoder_arguments import build_encoder, print_encoder_help, split_encoder_arguments

if TYPE_CHECKING:
    from diffgap_lightning.encoders.checks import Check

_PROG = "diffgap encoders check"


def run(argv: list[str]) -> int:
    """Run one of the subcommands; 1 means that `check` found a failure."""
    own, encoder = split_encoder_arguments(argv)
    if any(a.split("=")[0] == "--encoder.help" for a in encoder):
        return print_encoder_help(own, _PROG)
    arguments = _parser().parse_args(own)
    return _list(arguments) if arguments.command == "list" else _check(arguments, encoder)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="diffgap encoders", description="The encoders that ship, and checks of one of them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|check")
    add = commands.add_parser("list", help="short names, what they embed, and whether their package is installed")
    add.add_argument("--json", action="store_true", help="as JSON")
    add = commands.add_parser(
        "check",
        help="run all checks on an encoder; exit status 1 if one fails",
        epilog="--encoder.KEY VALUE sets an argument of the encoder's class; --encoder.help lists them.",
    )
    add.add_argument("--encoder", required=True, metavar="NAME", help="a short name or a class path")
    add.add_argument("--modality", nargs="+", metavar="NAME", help="only these; default: all that it has")
    add.add_argument("--device", default="cpu", help="where to run it, e.g. cuda; default: cpu")
    add.add_argument("--json", metavar="PATH", help="also write the results here")
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from diffgap_lightning.encoders import SHORT_NAMES, encoder_class

    rows: list[dict[str, Any]] = []
    for name, path in SHORT_NAMES.items():
        kind = encoder_class(name)
        package, extra = getattr(kind, "requires", None) or (None, None)
        installed = package is None or find_spec(package) is not None
        rows.append(
            {"name": name, "modalities": list(kind.modalities), "extra": extra, "installed": installed, "class": path}  # type: ignore[attr-defined]
        )
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        how = "ready" if row["installed"] else f"pip install 'diffgap-lightning[{row['extra']}]'"
        print(f"{row['name']:<18} {', '.join(row['modalities']):<20} {how}")
    return 0


def _check(arguments: argparse.Namespace, encoder_arguments: list[str]) -> int:
    from diffgap_lightning.atomic import check_replaceable
    from diffgap_lightning.encoders import encoder_class
    from diffgap_lightning.encoders.checks import run_checks

    if arguments.json:
        check_replaceable(arguments.json)
    if "check" in signature(encoder_class(arguments.encoder)).parameters:
        encoder_arguments = ["--encoder.check", "false", *encoder_arguments]  # shown in the table instead
    encoder = build_encoder(arguments.encoder, encoder_arguments, _PROG).to(_device(arguments.device)).eval()
    print(f"{encoder.fingerprint} on {arguments.device}")
    checks = []
    for check in run_checks(encoder, arguments.modality):
        checks.append(check)
        print(_row(check), flush=True)
    failed = [check for check in checks if not check.ok]
    for check in failed:
        print(f"{check.modality} {check.name}: {check.advice}")
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    if arguments.json:
        _write(arguments.json, encoder.fingerprint, checks)
    return int(bool(failed))


def _row(check: Check) -> str:
    return f"{'ok' if check.ok else 'FAILED':<7} {check.modality:<6} {check.name:<12} {check.value:<32} {check.limit}"


def _write(path: str, fingerprint: str, checks: Sequence[Check]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    record = {"encoder": fingerprint, "checks": [asdict(check) for check in checks]}
    Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _device(name: str) -> str:
    """Refuse a device that is not there before a model is loaded onto it."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from error
    return name
