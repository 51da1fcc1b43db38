"""A linear map plus a small network, and how two of them are trained together.

    f(x) = x A + a(x) B,      a(x) = gelu(gelu(x s W1 + b1) W2 + b2)

With A a closed form and B = 0, training begins at the closed form. It stops where the held-out loss says so, which may
be at once, and what is kept is a running mean of the weights. All draws come from the generator given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffgap_lightning.bridges.pairs import PairedRows

Net = dict[str, Tensor]
Nets = tuple[Net, Net]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, y, f(x), g(y), ids, log_scale)
TRAINED = ("w1", "b1", "w2", "b2", "out")
NET_TENSORS = ("linear", "scale", *TRAINED)

_MEAN_DECAY = 0.95  # of the running mean of the weights, per step
_EVALUATE_EVERY = 20
_WARM_UP = 20
_LOG_SCALES = torch.linspace(0.5, 6.0, 23)  # at which a held-out loss is read: the best temperature counts


@dataclass(frozen=True)
class Training:
    """How networks are trained; `MLPBridge` documents the fields."""

    width: int
    dropout: float
    learning_rate: float
    weight_decay: float
    batch_size: int
    max_steps: int
    patience: int


def new_net(x: Tensor, linear: Tensor, width: int, closed_form: bool, generator: torch.Generator) -> Net:
    """An untrained network for rows like `x` `(N, D)`.

    Args:
        x: Rows to take the input's scale from.
        linear: A `(D, F)`.
        width: Of the network.
        closed_form: Begin at `x A`; otherwise without A, at random.
        generator: Source of the initial weights.
    """

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / rows**0.5).to(x.device)

    dim, out = linear.shape
    last = normal(width, out)
    return {
        "linear": linear if closed_form else torch.zeros_like(linear),
        "scale": x.square().mean().rsqrt(),
        "w1": normal(dim, width),
        "b1": x.new_zeros(width),
        "w2": normal(width, width),
        "b2": x.new_zeros(width),
        "out": torch.zeros_like(last) if closed_form else last,
    }


def apply_net(net: Net, x: Tensor, drop: Callable[[Tensor], Tensor] = lambda a: a) -> Tensor:
    """`f(x)`: `(N, D)` -> `(N, F)`."""
    a = x * net["scale"]
    for weight, bias in (("w1", "b1"), ("w2", "b2")):
        a = nn.functional.gelu(drop(a) @ net[weight] + net[bias])
    return x @ net["linear"] + drop(a) @ net["out"]


def train(
    nets: Nets,
    loss: Loss,
    rows: PairedRows,
    held: PairedRows | None,
    how: Training,
    generator: torch.Generator,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Nets, int]:
    """Train one network for each side of the pairs on a common loss.

    Args:
        nets: Networks of the first and the second modality; they are not changed.
        loss: Of aligned rows, their outputs, their ids and the logarithm of a learned scale.
        rows: Pairs to train on.
        held: Pairs of other ids that decide when to stop; None: stop after `how.max_steps`.
        how: Everything else.
        generator: Source of batches and dropout, on the CPU.
        progress: Wraps the iteration over steps, e.g. in a progress bar.

    Returns:
        The best networks, and at which step they were; 0: as given.
    """
    live, mean = _copy(nets, train=True), _copy(nets)
    log_scale = torch.tensor(2.7, device=rows.i.device, requires_grad=True)
    decayed = {"params": [net[k] for net in live for k in TRAINED], "weight_decay": how.weight_decay}
    optimizer = torch.optim.AdamW([decayed, {"params": [log_scale], "weight_decay": 0.0}], lr=how.learning_rate)
    best, best_step = _copy(nets), 0
    best_loss = _held_out_loss(nets, loss, held) if held else 0.0
    for step in progress(range(1, how.max_steps + 1)):
        optimizer.param_groups[0]["lr"] = how.learning_rate * min(1.0, step / _WARM_UP)
        _backward(live, loss, rows, log_scale, how, generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _follow(mean, live, min(_MEAN_DECAY, step / (step + 10)))
        if held is not None and step % _EVALUATE_EVERY == 0:
            now = _held_out_loss(mean, loss, held)
            if now < best_loss:
                best, best_step, best_loss = _copy(mean), step, now
            elif step - best_step >= how.patience:
                break
    return (best, best_step) if held else (mean, how.max_steps)


def _backward(
    live: Nets, loss: Loss, rows: PairedRows, log_scale: Tensor, how: Training, generator: torch.Generator
) -> None:
    """Gradients of one batch of pairs."""
    size = min(how.batch_size, len(rows.i))
    pair = torch.randint(len(rows.i), (size,), generator=generator).to(rows.i.device)
    i, j = rows.i[pair], rows.j[pair]
    x, y = rows.first[i], rows.second[j]

    def drop(a: Tensor) -> Tensor:
        kept = torch.rand(a.shape, generator=generator).to(a.device) >= how.dropout
        return a * kept / (1 - how.dropout)

    with torch.enable_grad():
        value = loss(x, y, apply_net(live[0], x, drop), apply_net(live[1], y, drop), rows.first_ids[i], log_scale)
        value.backward()


@torch.no_grad()
def _held_out_loss(nets: Nets, loss: Loss, held: PairedRows) -> float:
    x, y = held.x, held.y
    outputs = apply_net(nets[0], x), apply_net(nets[1], y)
    ids = held.first_ids[held.i]
    return min(float(loss(x, y, *outputs, ids, log_scale.to(x.device))) for log_scale in _LOG_SCALES)


def _copy(nets: Nets, train: bool = False) -> Nets:
    first, second = ({k: v.clone().requires_grad_(train and k in TRAINED) for k, v in net.items()} for net in nets)
    return first, second


@torch.no_grad()
def _follow(mean: Nets, live: Nets, decay: float) -> None:
    for target, source in zip(mean, live, strict=True):
        for k in TRAINED:
            target[k].lerp_(source[k], 1 - decay)
