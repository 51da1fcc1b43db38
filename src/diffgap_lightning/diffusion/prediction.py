"""Three names for one prediction: a network may output x0, eps or v, and each gives the other two.

    x_t = alpha x0 + sigma eps,   v = alpha eps - sigma x0        (alpha^2 + sigma^2 = 1)

so x0 = alpha x_t - sigma v and eps = sigma x_t + alpha v. v is Salimans & Ho 2022's; it is the best conditioned of the
three, since its error is the error of x0 divided by sigma and that of eps divided by alpha.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Prediction = Literal["x0", "eps", "v"]


def check_prediction(kind: str) -> None:
    """Refuse an unknown kind with a `ValueError`."""
    if kind not in get_args(Prediction):
        raise ValueError(f"prediction: got {kind!r}, expected 'x0', 'eps' or 'v'")


def to_x0(output: Tensor, kind: Prediction, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean embedding `(B, R)` that an output of the given kind stands for.

    Args:
        output: `(B, R)`, of the given `kind`.
        kind: `"x0"`, `"eps"` or `"v"`.
        x_t: `(B, R)`, the noisy input.
        alpha: Weight of the signal, broadcastable to `(B, R)`; positive for `"eps"`.
        sigma: Weight of the noise, broadcastable to `(B, R)`.
    """
    check_prediction(kind)
    if kind == "x0":
        return output
    if kind == "eps":
        return (x_t - sigma * output) / alpha
    return alpha * x_t - sigma * output


def from_x0(x0: Tensor, kind: Prediction, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The inverse of `to_x0`; for `"eps"` and `"v"` sigma must be positive."""
    check_prediction(kind)
    if kind == "x0":
        return x0
    if kind == "eps":
        return (x_t - alpha * x0) / sigma
    return (alpha * x_t - x0) / sigma
