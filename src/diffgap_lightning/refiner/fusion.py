"""How much each similarity counts: non-negative weights for a sum of scores, fitted on validation.

Every component k gives a query features q_k and a gallery row features g_k, and the fused score is again one inner
product,

    score = sum_k w_k <q_k, g_k> = <[sqrt(w_k) q_k]_k, [sqrt(w_k) g_k]_k>,

so that exact ranks never need the score matrix. The weights minimise

    symmetric InfoNCE of the validation gallery + (pseudo_queries / queries) |w - s w_prior|^2 / |s w_prior|^2

by projected gradient, so that a component may end at exactly 0 (s: the best scale of the prior alone). A gallery of
fifty clips cannot tell five scores apart: there the prior decides, and the more queries there are (of at most
`max_rows`), the more the data do. The rows may be a validation set, or the held-out folds of a cross-validation, each a
gallery of its own.

Should one of the rivals (the bridges) alone rank these rows better, the weights are moved towards it until it does not,
and the log says so. A lead of one query in fifty is no evidence: `tolerance` asks for so many standard errors of the
paired difference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffgap_lightning.functional.mutual_retrieval import mutual_retrieval_ranks
from diffgap_lightning.functional.retrieval import recall_at_k

Features = Mapping[str, Tensor]
ScoredGallery = tuple[Features, Features, Tensor, Tensor]  # source and target features, source and target ids
PSEUDO_QUERIES = 100.0
_log = logging.getLogger(__name__)


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
    pseudo_queries: float = PSEUDO_QUERIES,
    tolerance: float = 0.0,
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
        pseudo_queries: Weight of the prior.
        tolerance: By how many standard errors of the paired difference a rival must do better to count as better.

    Returns:
        Component to weight, summing to 1.

    Raises:
        ValueError: no id is common to both modalities.
    """
    gallery = source, target, source_ids, target_ids
    return fit_weights_over([gallery], prior, rivals, max_rows, pseudo_queries, tolerance)


def fit_weights_over(
    galleries: Sequence[ScoredGallery],
    prior: Mapping[str, float],
    rivals: Sequence[str],
    max_rows: int = 400,
    pseudo_queries: float = PSEUDO_QUERIES,
    tolerance: float = 0.0,
) -> dict[str, float]:
    """As `fit_weights`, on several galleries, each ranked by itself: the folds of a cross-validation."""
    names = list(galleries[0][0])
    start = torch.tensor([float(prior.get(k, 0.0)) for k in names])
    stacks = [_score_stack(*gallery, max_rows) for gallery in galleries]
    weight = _minimise(stacks, start / start.sum(), pseudo_queries)
    weight = weight / weight.sum()

    def hits(weight: Tensor) -> list[Tensor]:
        named = dict(zip(names, weight.tolist(), strict=True))
        parts = [mutual_hits(fuse(s, named), fuse(t, named), i, j) for s, t, i, j in galleries]
        return [torch.cat([part[way] for part in parts]) for way in (0, 1)]

    if rivals:
        alone = {k: hits(torch.tensor([float(k == name) for name in names])) for k in rivals}
        rival = max(rivals, key=lambda k: float(sum(h.mean() for h in alone[k])))
        best = torch.tensor([float(rival == name) for name in names])
        for share in torch.linspace(0, 1, 9).tolist():
            mixed = (1 - share) * weight + share * best
            if not clearly_better(alone[rival], hits(mixed), tolerance):
                break
        if share > 0:
            _log.warning(
                "fused score: %s alone ranks the held-out rows better, so %.0f %% of it are taken", rival, 100 * share
            )
        weight = mixed
    return dict(zip(names, weight.tolist(), strict=True))


def mutual_hits(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> list[Tensor]:
    """Whether each query's best candidate is a positive, for both directions; rows without a partner do not ask."""
    return [(r.best <= 1).double() for r in mutual_retrieval_ranks(source, target, source_ids, target_ids)]


def clearly_better(rival: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> bool:
    """Whether the mean of the paired figures of `rival` is higher by more than `tolerance` standard errors.

    Each holds one row of figures for each direction, which count alike. The directions' errors are added up as if they
    went together, since they are of the same clips.
    """
    gains = [r - o for r, o in zip(rival, other, strict=True)]
    gain = sum(float(g.mean()) for g in gains)
    if tolerance == 0:
        return gain > 0
    error = sum(float(g.std() / len(g) ** 0.5) if len(g) > 1 else float("inf") for g in gains)
    return gain > tolerance * error


def _score_stack(
    source: Features, target: Features, source_ids: Tensor, target_ids: Tensor, max_rows: int
) -> tuple[Tensor, Tensor]:
    """Scores `(K, N', M')` of a bounded number of rows with partners, and which of them are positive `(N', M')`."""
    shared = torch.unique(source_ids[torch.isin(source_ids, target_ids)])
    if len(shared) == 0:
        raise ValueError("fusion: got no id that both modalities share, expected validation pairs")
    fewer = min(1.0, max_rows / max(int(torch.isin(i, shared).sum()) for i in (source_ids, target_ids)))
    order = torch.randperm(len(shared), generator=torch.Generator().manual_seed(0))
    chosen = shared[order[: max(1, int(fewer * len(shared)))].to(shared.device)]
    rows, columns = (torch.isin(i, chosen).nonzero()[:, 0] for i in (source_ids, target_ids))
    scores = torch.stack([source[k][rows].float() @ target[k][columns].float().T for k in source])
    return scores, source_ids[rows][:, None] == target_ids[columns][None, :]


@torch.inference_mode(False)  # what a caller computed there can still be differentiated by the weights
def _minimise(
    stacks: Sequence[tuple[Tensor, Tensor]], prior: Tensor, pseudo_queries: float, num_iterations: int = 50
) -> Tensor:
    """Weights `(K,)` >= 0 of least penalised InfoNCE: Adam with projection, components in units of their spread."""
    spread = torch.cat([scores.flatten(1) for scores, _ in stacks], 1).std(dim=1).clamp(min=1e-6)
    stacks = [(scores / spread[:, None, None], positive) for scores, positive in stacks]
    queries = sum(positive.shape[0] for _, positive in stacks)

    def infonce(weight: Tensor) -> Tensor:
        losses = [len(positive) / queries * _symmetric_infonce(weight, scores, positive) for scores, positive in stacks]
        return torch.stack(losses).sum()

    direction = prior.to(spread.device) * spread
    scale = torch.tensor([3.0 / float(direction.sum())], device=spread.device)
    scale = _descend(scale, lambda s: infonce(s * direction), num_iterations)
    centre = scale * direction
    penalty = pseudo_queries / queries / centre.square().sum()

    def loss(weight: Tensor) -> Tensor:
        return infonce(weight) + penalty * (weight - centre).square().sum()

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
