"""What is refused before any arithmetic: embeddings that are not `(B, D)`, finite, non-zero or of unit norm.

A wrong embedding seldom crashes anything later: it quietly shifts a mean or wins a ranking. So every public entry calls
`check_embeddings` once, and the message names the field, what was found and what to do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_embeddings(x: Tensor, name: str, dim: int | None = None, unit: bool = False) -> Tensor:
    """Return `x` unchanged if it is a usable batch of embeddings.

    Args:
        x: `(B, D)` floating tensor.
        name: How the caller's user knows this tensor; it opens the error message.
        dim: The expected D, where it is known.
        unit: Also require unit L2 norm (tolerance 1e-3, or 2e-2 for half precision).

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: wrong shape or dimension, empty, NaN or infinite, zero rows, rows that are not of unit norm.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: got {got}, expected a floating (B, D) tensor; convert it with .float()")
    if x.ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (B, D): one embedding a row")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least one row; the input is empty")
    if dim is not None and x.shape[1] != dim:
        raise ValueError(f"{name}: got dimension {x.shape[1]}, expected {dim}; is this another encoder's embedding?")
    norm = x.detach().float().norm(dim=1)
    bad = ~torch.isfinite(norm)
    if bad.any():
        raise ValueError(f"{name}: {_rows(bad)} NaN or infinite values; remove or re-embed them")
    bad = norm == 0
    if bad.any():
        raise ValueError(f"{name}: {_rows(bad)} zero vectors, which have no direction; remove or re-embed them")
    if unit:
        tolerance = 2e-2 if x.dtype in (torch.float16, torch.bfloat16) else 1e-3
        bad = (norm - 1).abs() > tolerance
        if bad.any():
            first = norm[bad][0].item()
            raise ValueError(
                f"{name}: {_rows(bad)} L2 norm different from 1 (first: {first:.4g}); "
                "normalise the rows, e.g. torch.nn.functional.normalize(x, dim=1)"
            )
    return x


def frames_as_rows(x: Tensor, name: str, frames: int, per_frame: bool = False) -> Tensor:
    """Rows `(B T, D)` of sequences, or embeddings as they are; either is refused where the other is expected.

    Args:
        x: `(B, D)`, or `(B, T, D)`; anything else is left to `check_embeddings`.
        name: It opens the error message.
        frames: T of the sequences that are taken; 0 for embeddings.
        per_frame: Take sequences of any length, frame by frame.

    Raises:
        ValueError: another number of dimensions or frames; the message says what to do.
    """
    shape = tuple(getattr(x, "shape", ()))
    if per_frame and frames:
        raise ValueError(f"per_frame: this refiner takes sequences of {frames} frames as wholes; leave per_frame out")
    if per_frame and len(shape) != 3:
        raise ValueError(f"{name}: got shape {shape}, expected (B, T, D) with per_frame=True")
    if len(shape) not in (2, 3):
        return x
    if frames and (len(shape) != 3 or shape[1] != frames):
        raise ValueError(
            f"{name}: got shape {shape}, expected (B, {frames}, D): this refiner was trained on sequences of {frames} "
            "frames; cut or resample to as many"
        )
    if len(shape) == 3 and not frames and not per_frame:
        raise ValueError(
            f"{name}: got shape {shape}, a sequence; expected (B, D): this refiner was trained on single embeddings. "
            "per_frame=True refines every frame on its own, a refiner trained on sequences refines them as wholes"
        )
    return x.flatten(0, 1) if len(shape) == 3 else x


def _rows(bad: Tensor) -> str:
    """`3 of 10 rows (first: row 4) have`."""
    index = int(bad.nonzero()[0])
    return f"{int(bad.sum())} of {len(bad)} rows (first: row {index}) have"
