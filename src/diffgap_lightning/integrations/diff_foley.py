"""Diff-Foley: a sequence of CAVP features, `(B, 32, 512)` of unit norm a frame, conditions its latent diffusion.

    features = refine_features(refiner, features)          # tensor in, tensor out: for any script
    with attach(refiner, latent_diffusion, source="video"):  # or the sampling script as it is

The repository (https://github.com/luosiallen/Diff-Foley) is no package; its `LatentDiffusion`, or any object with its
methods, is recognised by them. Features pass `get_learned_conditioning` and, with double guidance, reach the alignment
classifier as `origin_cond`: both get the same refined sequence. The unconditional branch is zeros behind the
conditioning stage and stays so. The sampling script repeats a video's features for its samples itself: equal rows share
a refined sequence unless `per_candidate` is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.integrations.conditioner import Conditioner, Refines
from diffgap_lightning.integrations.seam import Seam, override

_SAMPLERS = ("sample_log_with_classifier_diff_sampler", "sample_log_with_classifier")


def find(generator: Any) -> Seam | None:
    """The seam of an object with the methods of Diff-Foley's latent diffusion, else None."""
    if not all(callable(getattr(generator, name, None)) for name in ("get_learned_conditioning", _SAMPLERS[0])):
        return None
    embedder = getattr(getattr(generator, "cond_stage_model", None), "embedder", None)
    dim = next((m.in_features for m in _modules(embedder) if isinstance(m, torch.nn.Linear)), None)
    return Seam("Diff-Foley's LatentDiffusion", dim, "CAVP", partial(_patch, generator))


def refine_features(
    refiner: Refines,
    features: Tensor,
    *,
    source: str = "video",
    target: str = "audio",
    strength: float | None = None,
    guidance_scale: float | None = None,
    num_steps: int | None = None,
    per_candidate: bool = False,
    per_frame: bool = False,
    seed: int = 0,
) -> Tensor:
    """Refine a batch of feature sequences.

    Args:
        refiner: One of sequences, or with `per_frame` any.
        features: `(B, T, D)`; equal rows are samples of one video.
        source: Their modality.
        target: The modality to move to.
        strength: As in `DiffGAPRefiner.refine`.
        guidance_scale: As in `DiffGAPRefiner.refine`.
        num_steps: As in `DiffGAPRefiner.refine`.
        per_candidate: A sample for each row instead of one for equal rows.
        per_frame: Refine each frame as an embedding of its own.
        seed: Of the refiner's noise.

    Returns:
        `(B, T, D_target)`, unit norm a frame, in the dtype and on the device of `features`.
    """
    condition = Conditioner(
        refiner, source=source, target=target, strength=strength, guidance_scale=guidance_scale, num_steps=num_steps,
        per_candidate=per_candidate, per_frame=per_frame, seed=seed,
    )  # fmt: skip
    return condition.tiled(features)


@contextmanager
def _patch(model: Any, condition: Conditioner) -> Iterator[None]:
    plain = model.get_learned_conditioning
    last: tuple[Tensor, Tensor] | None = None  # features as they came, and refined

    def refine(features: Tensor) -> Tensor:
        nonlocal last
        if last is None or last[0].shape != features.shape or not torch.equal(last[0], features):
            last = features.clone(), condition.tiled(features)
        return last[1]

    def get_learned_conditioning(c: Tensor) -> Any:
        nonlocal last
        last = None  # a new video, or the same once more: a new sample
        return plain(refine(c))

    def with_classifier(sampler: Any) -> Any:
        def sample(embed_cond: Any, origin_cond: Tensor, *args: Any, **kwargs: Any) -> Any:
            return sampler(embed_cond, refine(origin_cond), *args, **kwargs)

        return sample

    with ExitStack() as stack:
        stack.enter_context(override(model, "get_learned_conditioning", get_learned_conditioning))
        for name in _SAMPLERS:
            if callable(getattr(model, name, None)):
                stack.enter_context(override(model, name, with_classifier(getattr(model, name))))
        yield


def _modules(module: Any) -> list[Any]:
    return list(module.modules()) if isinstance(module, torch.nn.Module) else []
