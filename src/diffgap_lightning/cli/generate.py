"""`diffgap generate`: texts and videos into sound, with and without the refiner, and a page to hear the difference.

    diffgap generate "a dog barks in the rain" prompts.txt --model cvssp/audioldm-s-full-v2 --refiner runs/clap/refiner
    diffgap generate clips/ --model FOLDER --refiner runs/v2a/refiner --encoder open-clip --encoder.model ViT-B-32
    diffgap generate prompts.txt ... --candidates 4 --scorer transformers-clap --scorer.model laion/clap-htsat-unfused

A run that was stopped goes on with the same command; finished sounds are not made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgap_lightning import __version__
from diffgap_lightning.cli.arguments import ArgumentParser, one_line
from diffgap_lightning.cli.sound_arguments import (
    ENCODERS,
    add_model_arguments,
    add_sound_arguments,
    build_renderer,
    encoder_help,
    sound_settings,
    split_encoders,
)

if TYPE_CHECKING:
    from diffgap_lightning.generation.items import Item
    from diffgap_lightning.generation.settings import GenerationSettings


def build_parser() -> ArgumentParser:
    """The command's flags; `--encoder.*` and `--scorer.*` are left to the encoders' classes."""
    parser = ArgumentParser(
        prog="diffgap generate",
        usage="%(prog)s INPUT [INPUT ...] --model MODEL [--refiner DIR] [--out DIR] [options]",
        description="Make sound for texts and videos, with and without the refiner, from the same noise. Writes wav "
        "and mp4 files and index.html, a page with players, spectrograms and scores. The same command goes on after "
        "a stop.",
        epilog="--encoder.KEY VALUE and --scorer.KEY VALUE set arguments of those encoders' classes. "
        "Example: diffgap generate prompts.txt --model audioldm-s-full-v2/ --refiner runs/table/refiner --out heard",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a text, a .txt file with one prompt a line, a video or a folder"
    )
    parser.add_argument("--out", default="generated", metavar="DIR", help="folder to write (default: generated)")
    parser.add_argument("--overwrite", action="store_true", help="delete what another run wrote there")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    add_model_arguments(parser)
    add_sound_arguments(parser)
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see `cli.main` for the convention."""
    own, encoders = split_encoders(argv)
    if (status := encoder_help(own, encoders, "diffgap generate")) is not None:
        return status
    options = build_parser().parse_intermixed_args(own)
    settings = sound_settings(options)

    from diffgap_lightning.generation.folder import PAGE_NAME, RunFolder
    from diffgap_lightning.generation.items import read_items
    from diffgap_lightning.generation.run import GenerationRun

    items = read_items(options.inputs)
    folder = RunFolder(options.out, _identity(options, encoders, settings))
    folder.check(options.overwrite)
    renderer = build_renderer(options, encoders, settings, {item.kind for item in items})
    folder.prepare(options.overwrite)
    generation = GenerationRun(renderer, folder, title="With and without the refiner", facts=_facts(options, argv))
    todo = [item for item in items if folder.record(item.key) is None]
    if len(todo) < len(items):
        print(f"going on: {len(items) - len(todo)} of {len(items)} are finished", file=sys.stderr)
    finished = _run(generation, items, todo, quiet=options.no_progress)
    for message in generation.failed.values():
        print(f"left out: {one_line(message)}", file=sys.stderr)
    if not finished:
        raise ValueError("none of the inputs could be used")
    print(f"page: {folder.file(PAGE_NAME)}")
    return 0


def _run(generation: Any, items: Sequence[Item], todo: Sequence[Item], quiet: bool) -> Any:
    """Render with a bar on stderr; an interrupt says what is finished."""
    from tqdm import tqdm

    done = 0

    def finished(item: Item) -> None:
        nonlocal done
        done += 1
        bar.update()

    with tqdm(total=len(todo), desc="generating", unit="item", disable=True if quiet else None) as bar:
        try:
            return generation.run(items, finished)
        except KeyboardInterrupt:
            bar.close()
            left = len(todo) - done
            print(f"\n{done} made, {left} left; the same command goes on", file=sys.stderr, end="")
            raise


def _identity(
    options: argparse.Namespace, encoders: dict[str, list[str]], settings: GenerationSettings
) -> dict[str, Any]:
    """What decides the sounds: a later run into the same folder must agree."""
    names = ("model", "backend", "revision", "dtype", "refiner", "encoder", "scorer")
    chosen = {name: getattr(options, name) for name in names}
    if options.refiner:
        chosen["refiner_sha256"] = _refiner_hash(Path(options.refiner))
    given = {f"{name} arguments": encoders[name] for name in ENCODERS if encoders[name]}
    return {**chosen, **given, **settings.to_json()}


def _refiner_hash(folder: Path) -> str | None:
    """The hash that a refiner's folder states of its tensors; loading checks it."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("sha256")
    except (OSError, ValueError, AttributeError):
        return None  # loading will say what is wrong


def _facts(options: argparse.Namespace, argv: list[str]) -> dict[str, object]:
    return {
        "command": shlex.join(["diffgap", "generate", *argv]),
        "generator": f"{options.model} ({options.backend})",
        "refiner": options.refiner or "none given",
        "scores by": options.scorer or "no --scorer given",
        "seed": options.seed,
        "version": f"diffgap-lightning {__version__}",
    }
