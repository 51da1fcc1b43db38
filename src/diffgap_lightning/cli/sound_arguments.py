"""Flags that `diffgap generate` and `diffgap demo` share: the models, what decides the sounds, and what they build."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffgap_lightning.cli.encoder_arguments import build_encoder, print_encoder_help, split_encoder_arguments

if TYPE_CHECKING:
    from diffgap_lightning.encoders.base import ContrastiveEncoder
    from diffgap_lightning.generation.rendering import Renderer
    from diffgap_lightning.generation.settings import GenerationSettings

ENCODERS = ("encoder", "scorer")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Generator, refiner and encoders; shared with `diffgap demo`."""
    models = parser.add_argument_group("models")
    models.add_argument("--model", required=True, metavar="MODEL", help="a local folder or file, or a hub id")
    models.add_argument("--backend", default="diffusers", metavar="NAME", help="diffusers (default) or audioldm")
    models.add_argument("--refiner", metavar="DIR", help="a folder written by fit; without it: plain versions only")
    models.add_argument("--encoder", metavar="NAME", help="embeds videos: a short name or a class path")
    models.add_argument("--scorer", metavar="NAME", help="embeds audio and text in the generator's space, for scores")
    models.add_argument("--download", action="store_true", help="fetch a hub id that is not in the local cache")
    models.add_argument("--revision", metavar="COMMIT", help="of the hub id; a download needs it")
    models.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:1, ...")
    models.add_argument("--dtype", default="auto", metavar="NAME", help="float32, float16, bfloat16; auto: by device")


def add_sound_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides the sounds; shared with `diffgap demo`."""
    sound = parser.add_argument_group("sound")
    sound.add_argument("--seconds", type=float, metavar="S", help="of a text's sound (default: the model's own length)")
    sound.add_argument("--steps", type=int, metavar="N", help="of the generator's sampler (default: its own)")
    sound.add_argument("--guidance", type=float, metavar="X", help="of the generator (default: its own)")
    sound.add_argument("--negative", metavar="TEXT", help="prompt of the unconditional branch")
    sound.add_argument("--candidates", type=int, default=1, metavar="K", help="sounds a version; needs --scorer")
    sound.add_argument("--rank-by", default="clap", metavar="NAME", help="clap (default) or refiner")
    sound.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise (default: 0)")
    sound.add_argument("--batch-size", type=int, default=4, metavar="N", help="sounds at a time (default: 4)")
    sound.add_argument("--window", type=float, metavar="S", help="of long videos (default: the model's own length)")
    sound.add_argument("--crossfade", type=float, metavar="S", help="between windows (default: 0.5)")
    sound.add_argument("--max-seconds", type=float, default=600.0, metavar="S", help="longer videos are left out")
    refine = parser.add_argument_group("refining (default: as the refiner's own configuration says)")
    refine.add_argument("--strength", type=float, metavar="X", help="0 (posterior mean) to 1 (from pure noise)")
    refine.add_argument("--refine-steps", type=int, metavar="N", help="sampler steps of the refiner")
    refine.add_argument("--refine-guidance", type=float, metavar="X", help="guidance scale of the refiner")
    refine.add_argument("--start", metavar="NAME", help="posterior_mean or source")


def split_encoders(argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Own arguments, and those of the video encoder and the scorer under one and the same name, `--encoder.KEY`."""
    own, encoder = split_encoder_arguments(argv)
    own, scorer = split_encoder_arguments(own, "--scorer.")
    return own, {"encoder": encoder, "scorer": [a.replace("--scorer.", "--encoder.", 1) for a in scorer]}


def encoder_help(own: list[str], encoders: dict[str, list[str]], prog: str) -> int | None:
    """Answer `--encoder.help` and `--scorer.help`; None if neither is there."""
    for name in ENCODERS:
        if any(a.split("=")[0] == "--encoder.help" for a in encoders[name]):
            other = "--encoder" if name == "scorer" else "--scorer"
            return print_encoder_help([a.replace(f"--{name}", "--encoder", 1) for a in own if a != other], prog)
    return None


def sound_settings(options: argparse.Namespace) -> GenerationSettings:
    """The settings that the flags describe.

    Raises:
        ValueError: naming the flag.
    """
    from diffgap_lightning.generation.settings import GenerationSettings
    from diffgap_lightning.integrations.conditions import RefineOptions

    if not options.max_seconds > 0:
        raise ValueError(f"--max-seconds: got {options.max_seconds}, expected more than 0")
    with _flags({"num_steps": "refine-steps", "guidance_scale": "refine-guidance"}):
        refine = RefineOptions(options.strength, options.refine_steps, options.refine_guidance, options.start)
    with _flags({"num_steps": "steps", "guidance_scale": "guidance", "rank_by": "rank-by"}):
        return GenerationSettings(
            seconds=options.seconds,
            num_steps=options.steps,
            guidance_scale=options.guidance,
            negative_prompt=options.negative,
            candidates=options.candidates,
            rank_by=options.rank_by,
            seed=options.seed,
            refine=refine,
            window=options.window,
            crossfade=options.crossfade,
        )


@contextmanager
def _flags(names: dict[str, str]) -> Iterator[None]:
    """Name the flag instead of the argument that an error begins with."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise ValueError(f"--{names.get(name, name)}:{rest}") from error


def build_renderer(
    options: argparse.Namespace, encoders: dict[str, list[str]], settings: GenerationSettings, kinds: set[str]
) -> Renderer:
    """Load the models that the inputs need."""
    from diffgap_lightning.data.media import MediaLimits
    from diffgap_lightning.generation.loading import choose_device, load_generator
    from diffgap_lightning.generation.rendering import Renderer
    from diffgap_lightning.refiner import DiffGAPRefiner

    if "video" in kinds and not (options.encoder and options.refiner):
        raise ValueError("videos need --encoder NAME (of video) and --refiner DIR (from video to audio)")
    device = choose_device(options.device)
    refiner = DiffGAPRefiner.from_pretrained(options.refiner).to(device) if options.refiner else None
    if refiner is not None and "text" in kinds and ("text", "audio") not in refiner.directions:
        known = ", ".join(f"{s} to {t}" for s, t in refiner.directions)
        raise ValueError(f"--refiner: {options.refiner} knows {known}; texts need one from text to audio")
    loaded: dict[str, ContrastiveEncoder | None] = {}
    for name in ENCODERS:
        chosen = getattr(options, name)
        wanted = chosen and (name == "scorer" or "video" in kinds)
        loaded[name] = build_encoder(chosen, encoders[name], "diffgap generate").to(device).eval() if wanted else None
        if refiner is not None:  # before the generator, which may take minutes to load
            refiner.check_encoder(loaded[name], f"--{name} {chosen}: {options.refiner}")
    generator = load_generator(
        options.model,
        options.backend,
        revision=options.revision,
        download=options.download,
        device=options.device,
        dtype=options.dtype,
    )
    return Renderer(
        generator,
        refiner,
        settings,
        video_encoder=loaded["encoder"],
        scorer=loaded["scorer"],
        batch_size=options.batch_size,
        limits=MediaLimits(max_seconds=options.max_seconds),
    )
