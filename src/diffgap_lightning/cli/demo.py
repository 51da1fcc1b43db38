"""`diffgap demo`: the generator with and without the refiner in a browser, on this machine.

diffgap demo --model audioldm-s-full-v2/ --refiner runs/clap/refiner --scorer transformers-clap --scorer.model clap/
ssh -L 7860:127.0.0.1:7860 gpu-machine              from elsewhere: the server itself listens to loopback alone
"""

from __future__ import annotations

from diffgap_lightning.cli.arguments import ArgumentParser
from diffgap_lightning.cli.sound_arguments import (
    add_model_arguments,
    add_sound_arguments,
    build_renderer,
    encoder_help,
    sound_settings,
    split_encoders,
)


def build_parser() -> ArgumentParser:
    """The command's flags, most of them those of `diffgap generate`."""
    parser = ArgumentParser(
        prog="diffgap demo",
        usage="%(prog)s --model MODEL --refiner DIR [options]",
        description="Serve a page on 127.0.0.1 that makes sound for a prompt or a video, with and without the refiner.",
        epilog="--encoder.KEY VALUE and --scorer.KEY VALUE set arguments of those encoders' classes. "
        "Example: diffgap demo --model audioldm-s-full-v2/ --refiner runs/table/refiner",
    )
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--max-megabytes", type=float, default=100.0, metavar="MB", help="of an upload (default: 100)")
    add_model_arguments(parser)
    add_sound_arguments(parser)
    parser.set_defaults(max_seconds=60.0)
    return parser


def run(argv: list[str]) -> int:
    """Run the command; see `cli.main` for the convention."""
    own, encoders = split_encoders(argv)
    if (status := encoder_help(own, encoders, "diffgap demo")) is not None:
        return status
    options = build_parser().parse_args(own)
    if options.port is not None and not 0 < options.port < 65536:
        raise ValueError(f"--port: got {options.port}, expected from 1 to 65535")
    if not 0 < options.max_megabytes < float("inf"):
        raise ValueError(f"--max-megabytes: got {options.max_megabytes}, expected more than 0")
    if not options.refiner:
        raise ValueError("--refiner DIR is needed: the demo compares with and without it")
    settings = sound_settings(options)

    from diffgap_lightning.generation.demo_page import serve

    renderer = build_renderer(options, encoders, settings, {"video"} if options.encoder else {"text"})
    serve(
        renderer,
        options.port,
        options.max_megabytes,
        ready=lambda url: print(f"demo: {url}  (Ctrl-C ends it)", flush=True),
    )
    return 0
