"""How much each similarity counts: non-negative weights for a sum of scores, fitted on validation.

Every component k gives a query features q_k and a gallery row features g_k, and the fused score is again one inner
product,

    score = sum_k w_k <q_k, g_k> = <[sqrt(w_k) q_k]_k, [sqrt(w_k) g_k]_k>,

so that exact ranks never need the score matrix. The weights minimise

    symmetric InfoNCE of the validation gallery + (pseudo_queries / queries) |w - s w_prior|^2 / |s w_prior|^2

by projected gradient, so that a component may end at exactly 0 (s: the best scale of the prior alone). A gallery of
fifty clips cannot tell five scores apart: there the prior decides, and the more queries
there are (of at most `max_rows`), the more the data do. Should the result rank
the validation gallery worse than one of the rivals (the bridges) alone, it is moved towards that one until it does not:
the fused score is never worse on validation than any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffgap_lightning.functional.mutual_retrieval import mutual_retrieval_ranks
from diffgap_lightning.functional.retrieval import recall_at_k

Features = Mapping[str, Tensor]

_PSEUDO_QUERIES = 100.0


def fuse(features: Features, weights: Mapping[str, float]) -> Tensor:
    """Concatenate the features `(N, F_k)` that have a positive weight, scaled by its root: `(N, F)`."""
    parts = [weights[k] ** 0.5 * features[k] for k in weights if weights[k] > 0]
    if not parts:
        raise ValueError("fusion: got no positive weight, expected at least one")
    return torch.cat(parts, dim=1)


def mean_recall(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> float:
    """R@1 of features `(N, F)`, `(M, F)`, averaged over both directions; rows without a partner are no queries."""
    ranks = mutual_retrieval_ranks(source, target, source_ids, target_ids)
    return sum(recall_at_k(found.best, 1) for found in ranks) / 2


def fit_weights(
    source: Features,
    target: Features,
    source_ids: Tensor,
    target_ids: Tensor,
    prior: Mapping[str, float],
    rivals: Sequence[str],
    max_rows: int = 400,
) -> dict[str, float]:
    """Fit the weights of all components on a validation gallery.

    Args:
        source: Component to `(N, F_k)` features of the source modality's rows.
        target: Component to `(M, F_k)` features of the target modality's rows.
        source_ids: `(N,)`.
        target_ids: `(M,)`; equal ids are positives.
        prior: Component to weight where the data are few; a missing one is 0.
        rivals: Components that must not do better alone.
        max_rows: Rows of each modality (whole ids) that the gradient sees; R@1 is compared on all.

    Returns:
        Component to weight, summing to 1.

    Raises:
        ValueError: no id is common to both modalities.
    """
    shared = torch.unique(source_ids[torch.isin(source_ids, target_ids)])
    if len(shared) == 0:
        raise ValueError("fusion: got no id that both modalities share, expected validation pairs")
    names = list(source)
    start = torch.tensor([float(prior.get(k, 0.0)) for k in names])
    scores, positive = _score_stack(source, target, source_ids, target_ids, shared, max_rows)
    fitted = _minimise(scores, positive, start / start.sum())

    def recall(weight: Tensor) -> float:
        named = dict(zip(names, weight.tolist(), strict=True))
        return mean_recall(fuse(source, named), fuse(target, named), source_ids, target_ids)

    weight = fitted / fitted.sum()
    if not rivals:
        return dict(zip(names, weight.tolist(), strict=True))
    alone = {k: recall(torch.tensor([float(k == name) for name in names])) for k in rivals}
    rival = max(rivals, key=alone.__getitem__)
    best = torch.tensor([float(rival == name) for name in names])
    for share in torch.linspace(0, 1, 9).tolist():
        mixed = (1 - share) * weight + share * best
        if recall(mixed) >= alone[rival]:
            return dict(zip(names, mixed.tolist(), strict=True))
    raise AssertionError("unreachable: the last mixture is the rival itself")


def _score_stack(
    source: Features, target: Features, source_ids: Tensor, target_ids: Tensor, shared: Tensor, max_rows: int
) -> tuple[Tensor, Tensor]:
    """Scores `(K, N', M')` of a bounded number of rows with partners, and which of them are positive `(N', M')`."""
    fewer = min(1.0, max_rows / max(int(torch.isin(i, shared).sum()) for i in (source_ids, target_ids)))
    order = torch.randperm(len(shared), generator=torch.Generator().manual_seed(0))
    chosen = shared[order[: max(1, int(fewer * len(shared)))].to(shared.device)]
    rows, columns = (torch.isin(i, chosen).nonzero()[:, 0] for i in (source_ids, target_ids))
    scores = torch.stack([source[k][rows].float() @ target[k][columns].float().T for k in source])
    return scores, source_ids[rows][:, None] == target_ids[columns][None, :]


@torch.inference_mode(False)  # what a caller computed there can still be differentiated by the weights
def _minimise(scores: Tensor, positive: Tensor, prior: Tensor, num_iterations: int = 50) -> Tensor:
    """Weights `(K,)` >= 0 of least penalised InfoNCE: Adam with projection, components in units of their spread."""
    spread = scores.flatten(1).std(dim=1).clamp(min=1e-6)
    scores = scores / spread[:, None, None]
    direction = prior.to(scores.device) * spread
    scale = torch.tensor([3.0 / float(direction.sum())], device=scores.device)
    scale = _descend(scale, lambda s: _symmetric_infonce(s * direction, scores, positive), num_iterations)
    centre = scale * direction
    penalty = _PSEUDO_QUERIES / positive.shape[0] / centre.square().sum()

    def loss(weight: Tensor) -> Tensor:
        return _symmetric_infonce(weight, scores, positive) + penalty * (weight - centre).square().sum()

    return (_descend(centre, loss, num_iterations) / spread).cpu()


def _descend(start: Tensor, loss: Callable[[Tensor], Tensor], num_iterations: int) -> Tensor:
    """The best non-negative point that projected Adam visits."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([point], lr=0.2)
    best, least = start.clone(), float("inf")
    for _ in range(num_iterations):
        with torch.enable_grad():
            value = loss(point)
        if value.item() < least and float(point.detach().sum()) > 0:
            best, least = point.detach().clone(), value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        with torch.no_grad():
            point.clamp_(min=0)
    return best


def _symmetric_infonce(weight: Tensor, scores: Tensor, positive: Tensor) -> Tensor:
    logits = torch.einsum("k,knm->nm", weight, scores)
    kept = logits.masked_fill(~positive, -torch.inf)
    return sum(((logits.logsumexp(d) - kept.logsumexp(d)).mean() for d in (0, 1)), torch.zeros(())) / 2
