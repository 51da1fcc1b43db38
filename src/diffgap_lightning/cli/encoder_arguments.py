"""`--encoder NAME --encoder.KEY VALUE ...` of the commands that run an encoder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from diffgap_lightning.cli.arguments import ArgumentParser, tidy

if TYPE_CHECKING:
    from diffgap_lightning.encoders.base import ContrastiveEncoder


def split_encoder_arguments(argv: list[str], prefix: str = "--encoder.") -> tuple[list[str], list[str]]:
    """`(other arguments, --encoder.NAME arguments with their values)`."""
    own: list[str] = []
    encoder: list[str] = []
    target = own
    for argument in argv:
        if argument.startswith("--"):
            target = encoder if argument.startswith(prefix) else own
        elif target is encoder and encoder and ("=" in encoder[-1] or not encoder[-1].startswith("--")):
            target = own
        target.append(argument)
    return own, encoder


def build_encoder(name: str, arguments: list[str], prog: str = "diffgap embed") -> ContrastiveEncoder:
    """Construct an encoder from its name and `--encoder.NAME VALUE` arguments.

    Args:
        name: A short name or a class path.
        arguments: As `split_encoder_arguments` gave them.
        prog: The command, for messages.

    Raises:
        ValueError: an unknown encoder, or arguments that its class does not take.
    """
    from diffgap_lightning.encoders import encoder_class

    parser = _encoder_parser(encoder_class(name), prog)
    try:
        config = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{tidy(str(error))}; see `{prog} --encoder {name} --encoder.help`") from error
    encoder = parser.instantiate_classes(config).encoder
    for attribute in ("modalities", "dim", "fingerprint"):
        if not getattr(encoder, attribute, None):
            raise ValueError(
                f"encoder {name!r}: {type(encoder).__name__} has no {attribute}; subclass ContrastiveEncoder"
            )
    return encoder


def _encoder_parser(kind: type, prog: str) -> Any:
    from jsonargparse import ArgumentParser as TypedParser

    parser = TypedParser(prog=prog, exit_on_error=False)
    parser.add_class_arguments(kind, "encoder", fail_untyped=False)
    return parser


def print_encoder_help(own: list[str], prog: str) -> int:
    """Print the arguments of the class that `--encoder` names."""
    from diffgap_lightning.encoders import encoder_class

    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--encoder", required=True)
    print(_encoder_parser(encoder_class(parser.parse_known_args(own)[0].encoder), prog).format_help())
    return 0
