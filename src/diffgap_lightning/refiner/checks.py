"""What a refiner's folder may claim: every value of its configuration has a type and range, every size its tensor.

A folder may come from a stranger. Its `config.json` is text that names sizes, and building first and comparing later
would let `"width": 1000000` claim all memory; so the refiner is assembled without storage (on PyTorch's meta device),
its shapes are compared with those of the tensors that are there, and only then is anything of that size allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MAX_STEPS = 10_000  # of a sampler by default: more is no default but a trap
_Check = Callable[[Any], bool]


def _whole(least: int, most: int = 2**31 - 1) -> _Check:
    return lambda value: type(value) is int and least <= value <= most


def _number(least: float, most: float = math.inf) -> _Check:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def _string(value: Any) -> bool:
    return isinstance(value, str)


def _pairs(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_string, pair)) for pair in value
    )


def _distances(value: Any) -> bool:
    positive = _number(math.ulp(0.0))
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(positive, value))


# Field -> what is expected, whether a value is that, and how many names lead to a value.
_EXPECTED: dict[str, tuple[str, _Check, int]] = {
    "pairs": ("a list of [source, target]", _pairs, 0),
    "dims": ("a whole number from 1", _whole(1), 1),
    "ranks": ("a whole number from 1", _whole(1), 1),
    "width": ("a whole number from 1", _whole(1), 0),
    "depth": ("a whole number from 0", _whole(0), 0),
    "num_steps": (f"a whole number from 1 to {MAX_STEPS}", _whole(1, MAX_STEPS), 0),
    "frames": ("a whole number from 0", _whole(0), 0),
    "dropout": ("a number from 0 to 1", _number(0, 1), 0),
    "strength": ("a number from 0 to 1", _number(0, 1), 0),
    "blend": ("a number from 0 to 1, or null", lambda value: value is None or _number(0, 1)(value), 0),
    "restore": ("a finite number >= 0", _number(0), 1),
    "fusion": ("a finite number >= 0", _number(0), 2),
    "fusion_prior": ("a finite number >= 0", _number(0), 2),
    "fusion_queries": ("a finite number >= 0", _number(0), 1),
    "bridges": ("anything", lambda value: True, 2),
    "encoder": ("a fingerprint, or null", lambda value: value is None or _string(value), 0),
    "typical": ("three positive numbers", _distances, 1),
}


def check_values(config: Any) -> None:
    """Check type and range of every value of a `RefinerConfig`.

    Raises:
        ValueError: the first that is not as expected.
    """
    for name, (expected, check, levels) in _EXPECTED.items():
        for label, value in _values(name, getattr(config, name), levels):
            if not check(value):
                raise ValueError(f"{label}: got {repr(value)[:200]}, expected {expected}")
    if set(config.ranks) != set(config.dims):
        raise ValueError(f"ranks: got those of {sorted(config.ranks)}, expected of {sorted(config.dims)}, as dims")
    for modality, rank in config.ranks.items():
        if rank > config.dims.get(modality, 0):
            raise ValueError(f"ranks: got {rank} for {modality}, expected at most its dimension, dims {config.dims}")


def _values(label: str, value: Any, levels: int) -> Iterator[tuple[str, Any]]:
    """The values at the end of `levels` names, each with the names that lead to it."""
    if levels == 0:
        yield label, value
        return
    if not isinstance(value, Mapping) or not all(map(_string, value)):
        raise ValueError(f"{label}: got {repr(value)[:200]}, expected names and their values")
    for name, inner in value.items():
        yield from _values(f"{label} {name}", inner, levels - 1)


def check_claims(config: Any, assemble: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Compare the sizes that a configuration claims with the tensors beside it; nothing of these sizes is allocated.

    Args:
        config: The `RefinerConfig`.
        assemble: Builds the module of that configuration.
        tensors: Its `state_dict`.

    Raises:
        ValueError: tensors that are missing, left over, of another shape, or not finite.
    """
    for name, count in (("depth", config.depth), ("pairs", len(config.pairs))):
        if count > len(tensors):  # each needs tensors of its own; a loop over a false claim could last for years
            raise ValueError(
                f"refiner: the tensors do not fit the configuration ({name} {count} of {len(tensors)} tensors)"
            )
    try:
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in assemble().state_dict().items()}
    except RuntimeError as error:  # more elements than an integer counts
        raise ValueError(f"refiner: the configuration claims impossible sizes ({str(error)[:200]})") from error
    wrong = [
        f"{name}: {list(tensors[name].shape) if name in tensors else 'missing'}, expected {list(shape)}"
        for name, shape in expected.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]
    wrong += [f"{name}: not expected" for name in tensors if name not in expected]
    if wrong:
        raise ValueError(f"refiner: the tensors do not fit the configuration ({'; '.join(wrong)[:300]})")
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"refiner: {name} holds NaN or infinite values; the file was damaged or training diverged")
