"""What a stream could not read: counted against a budget, named in a summary, never passed over in silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple


class Loss(NamedTuple):
    """Rows that could not be read: a whole block, or one sample of a classic tar."""

    shard: str
    where: str
    rows: int
    reason: str

    def __str__(self) -> str:
        """`shard-000003.tar block 2: CRC-32 differs`."""
        return f"{self.shard} {self.where}: {self.reason}"


class ShardError(ValueError):
    """A block that cannot be read; `loss` says which and why."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(str(loss))
        self.loss = loss


class ShardLossError(OSError):
    """More was lost than the error budget allows."""


class LossLedger:
    """Counts distinct losses of one split on one rank and refuses more than the budget.

    Args:
        split: Name for messages.
        total_rows: Rows of the split.
        budget: The share of `total_rows` that may be lost, from 0 (the first loss is refused) to 1.
        rank: For messages.
    """

    def __init__(self, split: str, total_rows: int, budget: float = 0.0, rank: int = 0) -> None:
        if not 0 <= budget <= 1:
            raise ValueError(f"error_budget: got {budget}, expected a share of the rows between 0 and 1")
        self.split, self.total_rows, self.budget, self.rank = split, total_rows, budget, rank
        self.losses: dict[tuple[str, str], Loss] = {}
        self._told = 0

    @property
    def lost_rows(self) -> int:
        """Rows lost so far, each counted once however often it was met."""
        return sum(loss.rows for loss in self.losses.values())

    def add(self, losses: Iterable[Loss]) -> None:
        """Count losses.

        Raises:
            ShardLossError: the budget is exceeded.
        """
        for loss in losses:
            self.losses.setdefault((loss.shard, loss.where), loss)
        if self.lost_rows > self.budget * self.total_rows:
            raise ShardLossError(
                f"{self.summary()}. This exceeds error_budget={self.budget:g}; check the shards with "
                "`diffgap shards verify`, copy or write them again, or raise error_budget"
            )

    def summary(self, limit: int = 5) -> str:
        """One line: how much was lost, where, and why."""
        losses = list(self.losses.values())
        share = self.lost_rows / max(self.total_rows, 1)
        listed = "; ".join(map(str, losses[:limit]))
        more = f"; and {len(losses) - limit} more" if len(losses) > limit else ""
        lost = f"{self.lost_rows} of {self.total_rows} rows lost ({share:.2%})"
        return f"{self.split}: {lost} on rank {self.rank}: {listed}{more}"

    def tell(self, when: str) -> None:
        """Warn with the summary, if something was lost since the last one."""
        if len(self.losses) > self._told:
            self._told = len(self.losses)
            warnings.warn(f"{when}: {self.summary()}", stacklevel=2)
