"""`diffgap compare`: fit the bridges on the training rows, measure them and a trained refiner on held-out rows.

The rows come from the `data:` section of a run's YAML file, with `--data.*` on top as for `fit`; nothing else in the
file is read. Everything is written into one folder: `compare.json`, `space.png` and `compare.html`.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgap_lightning import __version__
from diffgap_lightning.cli.arguments import ArgumentParser, read_config, suggest, suggest_flag, tidy

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

REFINER = "diffgap"
OPTIMUM = "optimum"
MAX_VIEWS = 4


def build_parser() -> ArgumentParser:
    """The command's own flags; `--data.*` are left to the datamodule's class."""
    parser = ArgumentParser(
        prog="diffgap compare",
        usage="%(prog)s --config YAML [--data.NAME VALUE ...] [--refiner DIR] [options]",
        description="Put the bridges and a trained refiner on one table, measured on held-out rows. "
        "Prints the table and writes compare.json, space.png and compare.html.",
        epilog="--data.NAME VALUE replaces an argument of the file's data section, e.g. --data.path table.npz. "
        "Example: diffgap compare --config runs/quickstart/config.yaml --refiner runs/quickstart/refiner",
    )
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="its data section says where the rows come from"
    )
    parser.add_argument("--refiner", metavar="DIR", help="a folder written by fit, e.g. runs/quickstart/refiner")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: compare/ beside the refiner's folder)")
    parser.add_argument("--json", metavar="PATH", help="also write the records here")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="rows to measure on")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--bootstrap", type=_positive, default=1000, metavar="N", help="replicates (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling and the refiner's noise (default: 0)")
    parser.add_argument("--max-rows", type=_positive, metavar="N", help="use at most so many rows of a split")
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see `cli.main` for the convention."""
    parser = build_parser()
    options, data_arguments = parser.parse_known_args(argv)
    from diffgap_lightning.atomic import check_replaceable, check_writable

    check_writable(_out(options))
    if options.json:
        check_replaceable(options.json)
    section = read_data_section(options.config)
    datamodule = build_datamodule(section, data_arguments, parser)

    from diffgap_lightning.evaluation.comparison import compare_methods
    from diffgap_lightning.evaluation.report import LEGEND, format_table, write_json

    datamodule.prepare_data()
    datamodule.setup("fit")
    if options.split == "test":
        datamodule.setup("test")
    models, bridges = _methods(options, datamodule)
    table = datamodule.rows(options.split, max_rows=options.max_rows)  # type: ignore[attr-defined]
    records = compare_methods(
        models,
        table,
        bootstrap=options.bootstrap,
        seed=options.seed,
        optimum=_optimum(options, datamodule, table),
        bridges=bridges,
        progress=lambda tasks: _bar(tasks, "measuring"),
    )
    print(format_table(records), LEGEND, sep="\n\n")
    if options.json:
        write_json(options.json, records)
    page = _write(options, argv, section, records, models, table)
    print(f"page: {page}")
    return 0


def read_data_section(path: str) -> dict[str, Any]:
    """The `data:` section of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, no mapping, or no such section.
    """
    section = read_config(path).get("data")
    if isinstance(section, str):
        section = {"class_path": section}
    if not isinstance(section, dict) or "class_path" not in section:
        raise ValueError(f"--config: {path} has no section data: {{class_path: ..., init_args: ...}}")
    return section


def build_datamodule(
    section: dict[str, Any], arguments: list[str], own: argparse.ArgumentParser | None = None
) -> LightningDataModule:
    """Build the datamodule that a section names, with `--data.*` arguments on top, as `fit` does."""
    import jsonargparse
    from lightning.pytorch import LightningDataModule

    parser = jsonargparse.ArgumentParser(prog="diffgap compare", exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    try:
        config = parser.parse_args(["--data", json.dumps(section), *arguments])
    except argparse.ArgumentError as error:
        message = suggest_flag(tidy(str(error)), own._option_string_actions if own else ())
        raise ValueError(f"{message}; see `diffgap compare --help`") from error
    return parser.instantiate_classes(config).data


def _methods(options: argparse.Namespace, datamodule: Any) -> tuple[dict[str, Any], list[str]]:
    """Fitted bridges and the loaded refiner by name, and which of them are bridges."""
    from diffgap_lightning.bridges import default_bridges
    from diffgap_lightning.refiner import DiffGAPRefiner

    bridges = default_bridges()
    names = options.methods or [*bridges, REFINER, OPTIMUM]
    for name in names:
        if name not in (*bridges, REFINER, OPTIMUM):
            raise ValueError(f"--methods: unknown {name!r}{suggest(name, [*bridges, REFINER, OPTIMUM])}")
    if REFINER in (options.methods or ()) and not options.refiner:
        raise ValueError(f"--methods: {REFINER} needs --refiner DIR, the refiner/ folder of a run")
    train = datamodule.rows("train", max_rows=options.max_rows)
    refiner = None
    if options.refiner and REFINER in names:
        refiner = DiffGAPRefiner.from_pretrained(options.refiner, encoder=getattr(train, "encoder", None))
    chosen = {name: make() for name, make in bridges.items() if name in names}
    for bridge in _bar(chosen.values(), "fitting bridges"):
        bridge.fit(train.embeddings, train.ids)
    models: dict[str, Any] = {**chosen} if refiner is None else {**chosen, REFINER: refiner}
    return models, list(chosen)


def _optimum(options: argparse.Namespace, datamodule: Any, table: Any) -> Any:
    """The exact optimal scores, where the data has them and they belong to these very rows."""
    if OPTIMUM not in (options.methods or [OPTIMUM]) or not hasattr(datamodule, "optimum"):
        return None
    scores = datamodule.optimum(options.split)
    rows = tuple(len(table.embeddings[m]) for m in ("text", "audio"))
    return scores if tuple(scores.shape) == rows else None


def _write(
    options: argparse.Namespace, argv: list[str], section: dict[str, Any], records: Any, models: Any, table: Any
) -> Path:
    """Write the folder; returns the page's path."""
    from diffgap_lightning.evaluation.page import write_html
    from diffgap_lightning.evaluation.report import write_json
    from diffgap_lightning.plotting import SpaceView, space_figure

    folder = _out(options)
    shown = REFINER if REFINER in models else records[0].get("best_bridge", next(iter(models)))
    directions = list(dict.fromkeys(tuple(r["direction"].split("_to_")) for r in records))[:MAX_VIEWS]
    views = [
        SpaceView.of(models[shown], table.embeddings, table.ids, source, target, options.seed)
        for source, target in directions
    ]
    png = io.BytesIO()
    space_figure(views, title=f"the {options.split} rows, refined by {shown}").savefig(png, format="png", dpi=110)
    facts = {
        "command": shlex.join(["diffgap", "compare", *argv]),
        "data": json.dumps(section),
        "measured on": f"{options.split} rows",
        "refiner": options.refiner or "none given",
        "bootstrap": f"{options.bootstrap} replicates, seed {options.seed}",
        "version": f"diffgap-lightning {__version__}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.png").write_bytes(png.getvalue())
    write_json(folder / "compare.json", records)
    return write_html(folder / "compare.html", records, png.getvalue(), title="DiffGAP and its rivals", facts=facts)


def _out(options: argparse.Namespace) -> Path:
    """The folder to write."""
    beside = Path(options.refiner).absolute().parent if options.refiner else Path("runs")
    return Path(options.out) if options.out else beside / "compare"


def _bar(items: Iterable[Any], text: str) -> Iterable[Any]:
    """A progress bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(list(items), desc=text, disable=None, leave=False)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value
