"""The contrastive spaces that a refiner lives in: one base class, and short names for the encoders that ship.

An encoder is named by a short name (`hashing`) or by its class path (`my_package.MyEncoder`); each optional package is
imported only when its encoder is built.
"""

from __future__ import annotations

from importlib import import_module

from diffgap_lightning.encoders.base import ContrastiveEncoder

SHORT_NAMES: dict[str, str] = {
    "hashing": "diffgap_lightning.encoders.hashing.HashingEncoder",
    "laion-clap": "diffgap_lightning.encoders.laion_clap.LaionClapEncoder",
    "transformers-clap": "diffgap_lightning.encoders.transformers_clap.TransformersClapEncoder",
    "open-clip": "diffgap_lightning.encoders.open_clip.OpenClipEncoder",
    "cavp": "diffgap_lightning.encoders.cavp.CavpEncoder",
}

__all__ = ["SHORT_NAMES", "ContrastiveEncoder", "encoder_class"]


def encoder_class(name: str) -> type:
    """The class behind a short name or a class path.

    Args:
        name: A key of `SHORT_NAMES` (with `-` or `_`), or `package.module.Class`.

    Raises:
        ValueError: no such short name, module or class; the message lists the short names.
    """
    path = SHORT_NAMES.get(name.replace("_", "-"), name)
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"encoder {name!r}: not a short name ({', '.join(SHORT_NAMES)}) and not a class path")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and something that it imports does not
        raise ValueError(
            f"encoder {name!r}: no module {error.name!r}; short names are {', '.join(SHORT_NAMES)}"
        ) from error
    if not isinstance(getattr(module, class_name, None), type):
        raise ValueError(f"encoder {name!r}: module {module_name!r} has no class {class_name!r}")
    return getattr(module, class_name)
