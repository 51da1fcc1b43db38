"""Where a generator takes its contrastive embedding, and how one attribute of an object is replaced for a while.

A *seam* says how a generator is called in messages, how wide its conditioning embedding is and whose it is, and gives a
context manager that lets a conditioner at the conditional embedding. Each adapter module has `find(generator)`, which
returns the generator's seam or None; it looks at class names alone, so that no generator's package is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from diffgap_lightning.integrations.conditioner import Conditioner

_ABSENT = object()
_MARK = "_diffgap_conditioned"


@dataclass(frozen=True)
class Seam:
    """A place where embeddings can be refined.

    Attributes:
        name: The generator, as messages call it.
        dim: Width of its conditioning embedding, if it can be known.
        encoder: Name of the checkpoint of its contrastive encoder, if it can be known.
        patch: Of a conditioner: a context manager inside which the generator's conditional embedding is refined.
    """

    name: str
    dim: int | None
    encoder: str | None
    patch: Callable[[Conditioner], AbstractContextManager[None]]


def class_names(generator: object) -> set[str]:
    """`package.ClassName` of the generator's class and its bases, whatever submodules they live in."""
    return {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(generator).__mro__}


@contextmanager
def override(owner: Any, name: str, value: Any, mark: bool = True) -> Iterator[None]:
    """Set an attribute of this one object; afterwards it is as it was, also where it was the class's.

    A function set here is marked, unless told otherwise: another one in the same place would refine twice.

    Raises:
        ValueError: a conditioned function is there already.
    """
    before = vars(owner).get(name, _ABSENT)
    if mark and callable(value):
        if hasattr(before, _MARK):
            raise ValueError(
                f"{type(owner).__name__}.{name} has a refiner attached already; detach it before attaching another"
            )
        setattr(value, _MARK, True)
    # object's own methods: modules and pipelines give theirs other duties.
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)
