r"""Measures of generated audio from features and class scores: kernel audio distance, KL, inception score, CLAP score.

The Frechet distances (FAD on VGGish's frames, FD on PANNs' clips) are `functional.frechet.frechet_distance`. Here, with
p = softmax of a classifier's logits, all in float64:

    KAD        100 MMD^2(generated, reference), unbiased, Gaussian kernel with sigma = median distance of two reference
               rows (Chung et al. 2025, "KAD: No More FAD!"; their package scales by 100 too)
    KL         mean over pairs of sum_c p_ref(c) (log p_ref(c) - log(p_gen(c) + 1e-6)): how far the generated clip's
               classes are from those of its own reference (AudioGen, AudioLDM)
    IS         exp of the mean over clips of KL(p || mean p), in each of 10 splits of shuffled clips; mean and deviation
               over splits (Salimans et al. 2016)
    CLAP       mean cosine of each clip's audio embedding and its own caption's

Why not torchmetrics: its `FrechetInceptionDistance` takes square roots of the eigenvalues of C_1 C_2, which rounding
makes negative or complex where rows are fewer than dimensions; its `KernelInceptionDistance` (cubic kernel, subsets)
and `InceptionScore` shuffle with the global seed, and its CLIP score builds its own network from a hub.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.mmd import check_rows, median_bandwidth, mmd2
from diffgap_lightning.functional.precision import widest

KAD_SCALE = 100.0
KL_EPS = 1e-6
IS_SPLITS = 10


def kernel_audio_distance(generated: Tensor, reference: Tensor, bandwidth: float | None = None) -> float:
    """KAD, unbiased: 0 on average where both sets are drawn alike, hence sometimes negative.

    Args:
        generated: `(N, D)`, N >= 2.
        reference: `(M, D)`, M >= 2.
        bandwidth: sigma; None: the median distance of two different reference rows.

    Raises:
        TypeError, ValueError: as for `functional.mmd.mmd2`.
    """
    check_rows(generated, "generated")
    check_rows(reference, "reference", dim=generated.shape[1])
    x, y = widest(generated).double(), widest(reference).double()
    sigma = math.sqrt(2) * median_bandwidth(y) if bandwidth is None else bandwidth
    return KAD_SCALE * mmd2(x, y, sigma)


@torch.no_grad()
def kl_divergences(generated: Tensor, reference: Tensor, eps: float = KL_EPS) -> Tensor:
    """`KL(reference || generated)` of the classes of each pair, in nats.

    Args:
        generated: `(N, C)` logits.
        reference: `(N, C)` logits; row i belongs to row i of `generated`.
        eps: Added to the generated clip's probabilities, so that a class it lacks costs much and not infinity.

    Returns:
        `(N,)` float64; the metric is their mean. Slightly below 0 (by up to C eps) where both agree.
    """
    p_log = _log_probabilities(reference, "reference")
    q_log = _log_probabilities(generated, "generated")
    if p_log.shape != q_log.shape:
        raise ValueError(
            f"got {tuple(q_log.shape)} generated and {tuple(p_log.shape)} reference logits, expected pairs of one shape"
        )
    return (p_log.exp() * (p_log - (q_log.exp() + eps).log())).sum(1)


@torch.no_grad()
def inception_score(
    logits: Tensor, splits: int = IS_SPLITS, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Inception score: 1 (all clips alike, or none certain) to C (each certain, all classes equally frequent).

    Args:
        logits: `(N, C)`, at least two clips a split: the score of a single clip is 1 whatever it is.
        splits: The clips are cut into so many parts, the score is taken in each.
        generator: Of the shuffle, on the CPU; None: a fixed one, so that equal clips give equal figures.

    Returns:
        `(mean, standard deviation)` over the splits (divided by the number of splits).
    """
    log_p = _log_probabilities(logits, "logits")
    n = len(log_p)
    if splits < 1 or n < 2 * splits:
        raise ValueError(
            f"inception score: got {n} clips for {splits} splits, expected at least 2 clips a split; "
            "generate more or use fewer splits"
        )
    order = torch.randperm(n, generator=generator or torch.Generator().manual_seed(0))
    scores = []
    for i in range(splits):
        part = log_p[order[i * n // splits : (i + 1) * n // splits].to(log_p.device)]
        marginal = torch.logsumexp(part, 0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return values.mean().item(), values.std(correction=0).item()


@torch.no_grad()
def clap_scores(audio: Tensor, captions: Tensor) -> Tensor:
    """Cosine of each clip's audio embedding `(N, D)` with its caption's `(N, D)`: `(N,)` float64.

    The figure depends on the checkpoint of the encoder: name it, and never compare across checkpoints.
    """
    check_embeddings(audio, "audio")
    check_embeddings(captions, "captions", dim=audio.shape[1])
    if len(audio) != len(captions):
        raise ValueError(f"got {len(audio)} audio and {len(captions)} caption embeddings, expected one caption a clip")
    return cosine_similarity(widest(audio).double(), widest(captions).double(), dim=1)


def _log_probabilities(logits: Tensor, name: str) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"{name}: got {type(logits).__name__}, expected a floating tensor (N, C) of logits")
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, expected (N, C): one row of class scores a clip")
    if not torch.isfinite(logits).all():
        raise ValueError(f"{name}: NaN or infinite logits; are these the classifier's outputs before the softmax?")
    return widest(logits).double().log_softmax(1)
