"""Small networks as a bridge: two towers trained by contrast, and a regression in each direction.

    score    cos(h_s(q), h_t(g)) + w cos(q, g)      h = CCA coordinates + network, symmetric InfoNCE of the score
    refine   normalise(mean_t + f_st(x))            f = ridge + network, loss 1 - cos(f(x), y)

q, g, x, y less their centroids; w and the regularisation are those that `CCABridge` chooses. Both begin at the closed
form, and held-out ids decide how far they leave it, so that few pairs cannot make this bridge worse than CCA and ridge
by much: a network that begins at random needs far more pairs to get there (`start="random"` is that network).
Rows with equal ids are never negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffgap_lightning.bridges.base import Bridge, unit
from diffgap_lightning.bridges.cca_choice import CCAChoice, best_choice, moments_of, open_choices, solve
from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.bridges.residual import NET_TENSORS, Loss, Net, Nets, Training, apply_net, new_net, train
from diffgap_lightning.functional.linear import ridge

_MAX_HELD_OUT = 2000
_REFIT_SHARE = 0.05
_EPOCHS, _MIN_STEPS = 5, 500
_LONGER = 4  # times as many for networks that begin at random
_PLAIN = CCAChoice(rank=128, shrinkage=0.5, power=1.0, centred_weight=0.0)  # its rank is the towers' output dimension


class MLPBridge(Bridge):
    """Two towers with InfoNCE and a residual regression, both begun at the closed forms.

    Args:
        start: `"closed_form"`, or `"random"`: networks alone, without centred cosine.
        width: Of the networks' two layers.
        dropout: Of their inputs and layers.
        learning_rate: Of AdamW, after a short warm-up.
        weight_decay: Of AdamW.
        batch_size: Pairs in a batch.
        max_steps: Most steps of each of the two trainings; `"auto"`: five epochs, but at least 500; four times as many
            from a random start.
        patience: Steps without a better held-out loss before training stops.
        held_out: Share of ids held out to decide when to stop, at most 2000; 0: never stop early. Where it is more
            than a twentieth of all ids, training is repeated on all rows for the number of steps found.
        seed: Of everything drawn.
        progress: Wraps the iteration over steps, e.g. in a progress bar; not saved.

    Attributes:
        steps: For each unordered pair, at which step contrast and regression were best; empty in a loaded bridge.
    """

    pair_tensors = ("centred_weight",)
    direction_tensors = tuple(f"{task}_{name}" for task in ("tower", "regression") for name in NET_TENSORS)

    def __init__(
        self,
        start: Literal["closed_form", "random"] = "closed_form",
        width: int = 256,
        dropout: float = 0.3,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.1,
        batch_size: int = 512,
        max_steps: int | Literal["auto"] = "auto",
        patience: int = 100,
        held_out: float = 0.15,
        seed: int = 0,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        if start not in ("closed_form", "random"):
            raise ValueError(f"start: got {start!r}, expected 'closed_form' or 'random'")
        for name, value in (("held_out", held_out), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: got {value}, expected 0 to 1")
        how = Training(width, dropout, learning_rate, weight_decay, batch_size, 0, patience)
        options = {**asdict(how), "max_steps": max_steps}
        super().__init__(start=start, held_out=held_out, seed=seed, **options)
        self.how, self.progress = how, progress
        self.steps: dict[tuple[str, str], tuple[int, int]] = {}

    def _fit_pair(self, first: str, second: str, rows: PairedRows) -> None:
        choice = _PLAIN
        if self.options["start"] == "closed_form":
            choices = open_choices(centred_weight="auto" if self._same_dims(first, second) else 0.0)
            choice = best_choice(choices, rows, moments_of(rows), self.options["seed"])
        held, fitted = rows.split(self.options["held_out"], _MAX_HELD_OUT, self.options["seed"])
        nets, steps = self._train(fitted, held, choice)
        if held is not None and len(held.i) > _REFIT_SHARE * len(rows.i):
            nets, _ = self._train(rows, None, choice, steps)
        self.steps[first, second] = steps
        self._keep(f"centred_weight:{first}->{second}", torch.tensor(choice.centred_weight, device=rows.i.device))
        for name, (net, other) in zip(("tower", "regression"), nets, strict=True):
            for direction, values in ((f"{first}->{second}", net), (f"{second}->{first}", other)):
                for key, value in values.items():
                    self._keep(f"{name}_{key}:{direction}", value)

    def _train(
        self, rows: PairedRows, held: PairedRows | None, choice: CCAChoice, steps: tuple[int, int] | None = None
    ) -> tuple[tuple[Nets, Nets], tuple[int, int]]:
        """Train towers and regressions, until the held-out loss rises or for the numbers of steps given."""
        generator = torch.Generator().manual_seed(self.options["seed"])
        towers, regressions = self._begin(rows, choice, generator)
        limit = self.options["max_steps"]
        if limit == "auto":
            limit = max(_MIN_STEPS, _EPOCHS * len(rows.i) // self.how.batch_size)
            limit *= 1 if self.options["start"] == "closed_form" else _LONGER
        limits = steps or (limit, limit)

        def run(nets: Nets, loss: Loss, max_steps: int) -> tuple[Nets, int]:
            how = replace(self.how, max_steps=max_steps)
            return train(nets, loss, rows, held, how, generator, self.progress) if max_steps else (nets, 0)

        towers, first = run(towers, contrastive_loss(choice.centred_weight), limits[0])
        regressions, second = run(regressions, regression_loss, limits[1])
        return (towers, regressions), (first, second)

    def _begin(self, rows: PairedRows, choice: CCAChoice, generator: torch.Generator) -> tuple[Nets, Nets]:
        """Untrained towers and regressions."""
        closed_form = self.options["start"] == "closed_form"
        x, y = rows.x, rows.y
        w_x, w_y, correlations = solve(choice, moments_of(rows), len(x))
        weight = correlations**choice.power

        def net(z: Tensor, linear: Tensor) -> Net:
            return new_net(z, linear.float(), self.how.width, closed_form, generator)

        return (net(x, w_x * weight), net(y, w_y * weight)), (net(x, ridge(x, y)), net(y, ridge(y, x)))

    def _offset(self, x: Tensor, source: str, target: str) -> Tensor:
        return apply_net(self._net("regression", source, target), x)

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        first, second = self._pair(source, target)
        features = unit(apply_net(self._net("tower", modality, target if modality == source else source), x), dim=1)
        weight = float(self._get(f"centred_weight:{first}->{second}"))
        return features if weight == 0 else torch.cat([features, weight**0.5 * unit(x, dim=1)], dim=1)

    def _net(self, task: str, source: str, target: str) -> Net:
        return {name: self._get(f"{task}_{name}:{source}->{target}") for name in NET_TENSORS}


def contrastive_loss(centred_weight: float) -> Loss:
    """Symmetric InfoNCE of aligned pairs with `centred_weight` times the centred cosine in the score.

    With s the score and e^l the learned scale, the mean over i of `-log softmax_j(e^l s_ij)_i`, and the same over
    columns; other rows with the id of i are left out of the softmax.
    """

    def loss(x: Tensor, y: Tensor, f: Tensor, g: Tensor, ids: Tensor, log_scale: Tensor) -> Tensor:
        scores = unit(f, dim=1) @ unit(g, dim=1).T
        if centred_weight > 0:
            scores = scores + centred_weight * unit(x, dim=1) @ unit(y, dim=1).T
        label = torch.arange(len(x), device=x.device)
        twins = (ids[:, None] == ids) & (label[:, None] != label)
        logits = (log_scale.exp() * scores).masked_fill(twins, -torch.inf)
        return (nn.functional.cross_entropy(logits, label) + nn.functional.cross_entropy(logits.T, label)) / 2

    return loss


def regression_loss(x: Tensor, y: Tensor, f: Tensor, g: Tensor, ids: Tensor, log_scale: Tensor) -> Tensor:
    """`1 - cos(f(x), y)` and the same backwards, between rows less their centroids."""
    forward, backward = nn.functional.cosine_similarity(f, y), nn.functional.cosine_similarity(g, x)
    return 2 - forward.mean() - backward.mean()
