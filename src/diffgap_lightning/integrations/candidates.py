"""Several waveforms a prompt, the best first.

For prompt b with candidates k = 1..K:

    clap(b, k)      cosine of the candidate's audio embedding and the prompt's own embedding, as the encoder gives them
    refiner(b, k)   the refiner's fused score of the same pair, in which the modality gap is taken into account

A candidate is only ever compared with the prompt that it was made for: the scores are (B, K), never (B, B K), so a
prompt's ranking does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap_lightning.data.audio import resample
from diffgap_lightning.encoders.base import ContrastiveEncoder

By = Literal["clap", "refiner"]


class Scorer(Protocol):
    """What ranks by its own score: a refiner or a bridge."""

    def score_features(self, embedding: Tensor, *, modality: str, source: str, target: str) -> Tensor:
        """Features `(N, F)` whose inner products are the score."""


@dataclass(frozen=True)
class Ranking:
    """Scores of each prompt's own candidates.

    Attributes:
        scores: `"clap"` and `"refiner"`, as far as they are known, to `(B, K)` float32.
        order: `(B, K)`; row b lists the candidates of prompt b, best first; equal ones keep their order.
    """

    scores: dict[str, Tensor]
    order: Tensor


def rank_candidates(
    audio: Tensor,
    prompt: Tensor,
    *,
    refiner: Scorer | None = None,
    source: str = "text",
    target: str = "audio",
    by: By = "clap",
) -> Ranking:
    """Score and rank the candidates of each prompt.

    Args:
        audio: `(B, K, D)` embeddings of the candidates.
        prompt: `(B, D_source)` embeddings of the prompts, as the encoder gives them (unrefined).
        refiner: Gives the second score; None leaves it out.
        source: Modality of the prompts.
        target: Modality of the candidates.
        by: Which score decides.

    Raises:
        ValueError: shapes that do not fit, or a deciding score that cannot be computed.
    """
    if audio.ndim != 3 or prompt.ndim != 2 or len(audio) != len(prompt):
        raise ValueError(
            f"got audio {tuple(audio.shape)} and prompts {tuple(prompt.shape)}, expected (B, K, D), (B, D)"
        )
    if by not in get_args(By):
        raise ValueError(f"by: got {by!r}, expected one of {', '.join(get_args(By))}")
    scores: dict[str, Tensor] = {}
    if audio.shape[2] == prompt.shape[1]:
        scores["clap"] = _own_products(normalize(prompt.float(), dim=1), normalize(audio.float(), dim=2))
    if refiner is not None:
        features = [
            refiner.score_features(rows.float(), modality=modality, source=source, target=target)
            for rows, modality in ((prompt, source), (audio.flatten(0, 1), target))
        ]
        scores["refiner"] = _own_products(features[0], features[1].unflatten(0, audio.shape[:2]))
    if by not in scores:
        reason = (
            "needs a refiner" if by == "refiner" else f"needs equal widths, got {prompt.shape[1]} and {audio.shape[2]}"
        )
        raise ValueError(f"by={by!r} {reason}")
    return Ranking(scores, scores[by].argsort(dim=1, descending=True, stable=True))


def embed_waveforms(encoder: ContrastiveEncoder, waveforms: Sequence[Tensor], sample_rate: int) -> Tensor:
    """`(B, D)` audio embeddings of waveforms `(T_i,)` at any sample rate, in Hz."""
    if "audio" not in encoder.modalities or encoder.sample_rate is None:
        raise ValueError(f"{type(encoder).__name__} embeds {', '.join(encoder.modalities)}, expected one with audio")
    transform = encoder.transform("audio")
    prepared = [resample(w.detach().float().cpu(), sample_rate, encoder.sample_rate).clamp(-1, 1) for w in waveforms]
    return encoder.embed_audio([w if transform is None else transform(w) for w in prepared]).float().cpu()


def _own_products(prompt: Tensor, candidates: Tensor) -> Tensor:
    """`(B, F)`, `(B, K, F)` -> `(B, K)` inner products; b: prompt, k: candidate, f: feature."""
    return torch.einsum("bf,bkf->bk", prompt.float(), candidates.float().to(prompt.device))
