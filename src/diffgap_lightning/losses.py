"""What a direction is trained on: a denoising error and a contrastive term; and how a batch is split (BST).

- denoising: `w(snr) |x0_hat - x0|^2 / R`. Every usual weighting is a weight on the error of x0, since that of eps is
  snr times and that of v is (snr + 1) times as large. min-SNR: Hang et al. 2023; truncated: Salimans & Ho 2022.
- contrastive: InfoNCE from one-step estimates to the batch's targets. Rows with equal ids are all positives, so that a
  clip's second caption is never a negative.
- bidirectional split training: each batch is split between the directions, so that every step improves both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Weighting = Literal["x0", "eps", "v", "min_snr", "truncated_snr"]
Split = Literal["bst", "joint", "alternate", "forward", "backward"]
Direction = tuple[str, str]


def snr_weight(log_snr: Tensor, weighting: Weighting) -> Tensor:
    """Weight of the squared error of x0 at each noise level, of `log_snr`'s shape.

    `"x0"`, `"eps"`, `"v"`: the plain squared error of that quantity. `"min_snr"`: min(snr, 5).
    `"truncated_snr"`: max(snr, 1).
    """
    if weighting not in get_args(Weighting):
        raise ValueError(f"loss_weighting: got {weighting!r}, expected one of {', '.join(get_args(Weighting))}")
    if weighting == "x0":
        return torch.ones_like(log_snr)
    snr = log_snr.exp()
    if weighting == "eps":
        return snr
    if weighting == "v":
        return snr + 1
    return snr.clamp(max=5) if weighting == "min_snr" else snr.clamp(min=1)


def denoising_loss(estimate: Tensor, x0: Tensor, log_snr: Tensor, weighting: Weighting = "x0") -> Tensor:
    """Weighted squared error per coordinate, averaged over the batch.

    Args:
        estimate: `(B, R)`, or `(B, T, R)` of sequences: estimates of x0.
        x0: Of the same shape.
        log_snr: `(B,)`.
        weighting: See `snr_weight`.
    """
    return (snr_weight(log_snr, weighting) * (estimate - x0).square().flatten(1).mean(dim=1)).mean()


def contrastive_loss(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, logit_scale: Tensor
) -> Tensor:
    """InfoNCE with every equal id a positive: `-log(sum over positives / sum over all)`, averaged over the queries.

    Args:
        query: `(B, D)`.
        gallery: `(G, D)`.
        query_ids: `(B,)`; each must occur in `gallery_ids`.
        gallery_ids: `(G,)`.
        logit_scale: Scalar, the log of the inverse temperature.
    """
    query, gallery = torch.nn.functional.normalize(query, dim=1), torch.nn.functional.normalize(gallery, dim=1)
    logits = logit_scale.exp() * query @ gallery.T
    positive = query_ids[:, None] == gallery_ids[None, :]
    return (logits.logsumexp(1) - logits.masked_fill(~positive, -torch.inf).logsumexp(1)).mean()


def noise_rows(batch_size: int, share_of_noise: float) -> int:
    """How many rows of a batch are put at t = 1: the share, rounded up."""
    if not 0.0 <= share_of_noise <= 1.0:
        raise ValueError(f"share_of_noise: got {share_of_noise}, expected a number from 0 to 1")
    return min(batch_size, math.ceil(share_of_noise * batch_size - 1e-6))  # 0.07 * 100 is 7.000000000000001


def stratified_times(
    batch_size: int, share_of_noise: float, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Times `(B,)` in (0, 1]: the first rows at t = 1 exactly, the rest one in each of equally many intervals.

    Stratifying evens out the noise levels between batches (Kingma et al. 2021). Which rows come first is up to the
    caller's shuffling.

    Args:
        batch_size: B.
        share_of_noise: Share of the rows at t = 1, which train the posterior mean; rounded up to a row when positive.
        generator: Source of randomness, on `device`.
        device: Where the times are made.
    """
    count = noise_rows(batch_size, share_of_noise)
    rest = batch_size - count
    offset = torch.rand((), generator=generator, device=device)
    t = (torch.arange(rest, device=device) + offset) / max(rest, 1)
    return torch.cat([torch.ones(count, device=device), t.clamp(min=1e-3, max=1.0)])


def split_batch(
    batch_size: int, directions: Sequence[Direction], split: Split, step: int = 0
) -> dict[Direction, slice]:
    """Which rows of a batch train which direction.

    Args:
        batch_size: B.
        directions: Ordered (source, target) pairs; `"forward"` ones are at even places, `"backward"` ones at odd.
        split: `"bst"`: disjoint, equal shares, at least a row each. `"joint"`: every row trains every direction.
            `"alternate"`: the whole batch, one direction a step in turn. `"forward"` / `"backward"`: those directions
            only, sharing the batch as in `"bst"`.
        step: Global step, for `"alternate"` and to rotate the shares of `"bst"`.

    Raises:
        ValueError: an unknown split, no such direction, or fewer rows than directions to share them.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(get_args(Split))}")
    chosen = {"forward": directions[0::2], "backward": directions[1::2]}.get(split, directions)
    count = len(chosen)
    if count < 1 or (split not in ("joint", "alternate") and count > batch_size):
        raise ValueError(f"split {split!r}: got {batch_size} rows for {count} directions, expected at least one each")
    if split == "alternate":
        return {directions[step % len(directions)]: slice(0, batch_size)}
    if split == "joint":
        return dict.fromkeys(directions, slice(0, batch_size))
    edges = [batch_size * i // count for i in range(count + 1)]
    return {d: slice(edges[(i + step) % count], edges[(i + step) % count + 1]) for i, d in enumerate(chosen)}
