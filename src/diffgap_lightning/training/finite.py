"""Optimizer steps that are passed over, because a gradient in them is not finite; the weights stay as they were.

One NaN in one row makes every gradient NaN, on every rank, and the weights with them. So the norm of all gradients is
looked at before each update, on the device, without making a GPU wait. A fused optimizer is told by a flag, its
`found_inf`, and leaves weights, moments and its count of steps alone. Others lose their gradients, or where the CPU
must not look (a recorded step) get everything back that the update changed, which comes to the same.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class FiniteSteps:
    """Counts the steps that are passed over and stops the run when too many follow each other.

    Args:
        allowed: How many in a row may be passed over; 0 stops at the first.
    """

    def __init__(self, allowed: int) -> None:
        if allowed < 0:
            raise ValueError(f"skip_non_finite: got {allowed}, expected 0 or more")
        self.allowed, self._told = allowed, 0
        self._total, self._in_a_row = torch.zeros(()), torch.zeros(())

    def look(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """1 if a gradient of the step that is about to be taken is not finite, 0 if all are; counted."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)
        bad = (~norms.isfinite().all()).float()
        if self._total.device != bad.device:
            self._total, self._in_a_row = self._total.to(bad.device), self._in_a_row.to(bad.device)
        self._total.add_(bad)
        self._in_a_row.add_(1).mul_(bad)
        return bad

    def prevent(self, optimizer: torch.optim.Optimizer) -> None:
        """Look, and see to it that a step that follows changes nothing if it must not."""
        bad = self.look(optimizer)
        if not flagged(optimizer, bad) and bool(bad):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def tell(self, step: int) -> int:
        """Warn of steps passed over since the last time; how many there were in all.

        Raises:
            ValueError: more in a row than allowed.
        """
        total, in_a_row = int(self._total), int(self._in_a_row)
        if in_a_row > self.allowed:
            raise ValueError(
                f"step {step}: a gradient was not finite in {in_a_row} steps in a row; the weights are those before. "
                "Check the rows (`diffgap shards verify`), lower the learning rate, or raise model.skip_non_finite"
            )
        if total > self._told:
            warnings.warn(
                f"step {step}: {total - self._told} steps were passed over, a gradient was not finite ({total} in all)",
                stacklevel=2,
            )
            self._told = total
        return total


def flagged(optimizer: torch.optim.Optimizer, bad: Tensor) -> bool:
    """Hand the flag to a fused optimizer; False if this one is not."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    optimizer.grad_scale, optimizer.found_inf = None, bad  # type: ignore[attr-defined]
    return True


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Take a step that changes nothing where `bad` is 1, without looking at it on the CPU."""
    if flagged(optimizer, bad):
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = {id(x): x.detach().clone() for x in (*parameters, *_state(optimizer))}
    optimizer.step()
    with torch.no_grad():
        for x in (*parameters, *_state(optimizer)):  # a first step also makes the state, from zeros
            x.copy_(torch.where(bad.to(x.device) > 0, before.get(id(x), torch.zeros_like(x)), x))


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
