"""`need`: an optional package of an encoder, or one sentence that names the extra to install."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def need(module: str, extra: str) -> Any:
    """Import an optional module.

    Raises:
        ImportError: it, or a package that it needs, is not installed; the sentence names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, extra) from error


def package_folder(package: str, extra: str) -> Path:
    """Where an optional package lies, without importing it.

    Raises:
        ImportError: as for `need`.
    """
    try:
        spec = find_spec(package)
    except ValueError:  # in sys.modules without a spec
        spec = None
    if spec is None or spec.origin is None:
        raise missing(package, extra)
    return Path(spec.origin).parent


def missing(package: str, extra: str) -> ImportError:
    """The error for a package that is not there."""
    return ImportError(f"this needs the package {package}: pip install 'diffgap-lightning[{extra}]'", name=package)
