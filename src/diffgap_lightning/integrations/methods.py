"""Any object with a method that makes, or takes, the conditioning embedding: `attach(refiner, model, method="...")`.

    method="get_learned_conditioning"       what it returns is refined
    method="cond_stage.encode"              the same on a part of the model
    refine_input=True                       its first argument is refined instead, e.g. CAVP features on their way in

The method is replaced on this one object. Latent diffusion models call one method for both branches of guidance: where
the first argument is a list of texts, rows of the empty prompt stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.integrations.conditioner import Conditioner
from diffgap_lightning.integrations.seam import Seam, override

UNCONDITIONAL = ""


def find(generator: Any, method: str, refine_input: bool = False) -> Seam:
    """The seam at a method, given by its path from the generator.

    Raises:
        ValueError: no such method.
    """
    owner: Any = generator
    *parts, name = method.split(".")
    for part in parts:
        owner = getattr(owner, part, None)
    if not callable(getattr(owner, name, None)):
        kind = type(generator).__name__
        listed = [n for n in dir(generator) if "condition" in n and callable(getattr(generator, n, None))]
        hint = f"; it has {', '.join(listed)}" if listed else ""
        raise ValueError(f"method: {kind} has no method {method!r}{hint}")
    return Seam(f"{type(generator).__name__}.{method}", None, None, partial(_patch, owner, name, refine_input))


@contextmanager
def _patch(owner: Any, name: str, refine_input: bool, condition: Conditioner) -> Iterator[None]:
    plain = getattr(owner, name)

    @wraps(plain)
    def refined_output(*args: Any, **kwargs: Any) -> Tensor:
        out = plain(*args, **kwargs)
        first = next(iter([*args, *kwargs.values()]), None)
        return refine_rows(condition, _tensor(out, f"{name} returned"), _texts(first))

    @wraps(plain)
    def refined_input(first: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(refine_rows(condition, _tensor(first, f"{name} was given"), None), *args, **kwargs)

    with override(owner, name, refined_input if refine_input else refined_output):
        yield


def refine_rows(condition: Conditioner, embedding: Tensor, texts: Sequence[str] | None) -> Tensor:
    """Refine the rows of all texts but the empty one."""
    if texts is None or len(texts) != len(embedding):
        return condition.tiled(embedding)
    chosen = [i for i, text in enumerate(texts) if text != UNCONDITIONAL]
    if not chosen:
        return embedding
    if len(chosen) == len(texts):
        return condition.tiled(embedding, texts)
    refined = condition.tiled(embedding[chosen], [texts[i] for i in chosen], chosen)
    return embedding.index_copy(0, torch.tensor(chosen, device=embedding.device), refined)


def _texts(value: Any) -> list[str] | None:
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return list(value)
    return None


def _tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in (2, 3):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what} {got}, expected an embedding (B, D), (B, 1, D) or (B, T, D); name another method")
    return value
