"""Refining from several modalities at once: text + video -> audio, where any of them may be missing.

    refiner.refine({"text": text, "video": video}, target="audio")
    refiner.refine({"text": text, "video": video}, target="audio", present={"video": has_video})

Rows with the same sources are refined together. A row with one source takes the ordinary path of that direction; one
with more starts at the mean of the product of their posteriors (see `product.py`), brought back to the target's
variance by the share of it that the Gaussian model says the mean explains, and is denoised by the product's denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.diffusion.samplers import sample_named
from diffgap_lightning.diffusion.schedule import sampling_times
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.refiner.config import RefinerConfig
from diffgap_lightning.refiner.product import PosteriorProduct, presence_groups
from diffgap_lightning.space import EmbeddingSpace


class OneSource(Protocol):
    """What is asked of a refiner."""

    config: RefinerConfig
    space: EmbeddingSpace

    def cdm_of(self, source: str, target: str) -> ContrastiveDiffusion:
        """The module of a direction."""

    @property
    def refine(self) -> Callable[..., Tensor]:
        """Refine from one source."""


def refine_together(
    refiner: OneSource,
    embeddings: Mapping[str, Tensor | None],
    *,
    target: str,
    present: Mapping[str, Tensor] | None = None,
    num_samples: int = 1,
    **options: Any,
) -> Tensor:
    """Refine rows that have one or more sources.

    Args:
        refiner: It has a direction from every source to `target`.
        embeddings: Source to `(B, D_source)`, the same B; None is a source that no row has.
        target: The modality to move to.
        present: Source to `(B,)` bool, False where a row lacks it and what is there is not looked at; default: True.
        num_samples: Samples for each row.
        **options: As of `refine`.

    Returns:
        `(B, D_target)` or `(B, num_samples, D_target)` in the dtype and on the device of the first source.

    Raises:
        ValueError: no source, numbers of rows that differ, a row without any source, a direction that is not known.
    """
    given = {m: x for m, x in embeddings.items() if x is not None}
    masks = _masks(given, present or {})
    first = next(iter(given.values()))
    for source in given:
        refiner.cdm_of(source, target)
    shape = (len(first), num_samples, refiner.config.dims[target])
    parts, places = [], []
    for sources, rows in presence_groups(masks, len(first)):
        chosen = {m: given[m][rows.to(given[m].device)] for m in sources}
        if len(sources) == 1:
            ((source, x),) = chosen.items()
            part = refiner.refine(x, source=source, target=target, num_samples=num_samples, **options)
        else:
            part = _refine_group(refiner, chosen, target, num_samples, **options)
        parts.append(part.reshape(len(rows), *shape[1:]).to(first))
        places.append(rows.to(first.device))
    out = torch.cat(parts)[torch.cat(places).argsort()]
    return out[:, 0] if num_samples == 1 else out


def _masks(given: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not given:
        raise ValueError("sources: got none, expected at least one modality with embeddings")
    lengths = {m: len(x) for m, x in given.items()}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{n} of {m}" for m, n in lengths.items())
        raise ValueError(f"sources: got {found} rows, expected as many of each; name missing ones in `present`")
    unknown = sorted(set(present) - set(given))
    if unknown:
        raise ValueError(f"present: got {unknown[0]!r}, expected some of {', '.join(given)}")
    masks = {}
    for m, count in lengths.items():
        mask = present.get(m, torch.ones(count, dtype=torch.bool))
        if mask.dtype != torch.bool or mask.shape != (count,):
            raise ValueError(f"present[{m!r}]: got {tuple(mask.shape)} of {mask.dtype}, expected ({count},) bool")
        masks[m] = mask
    return masks


def _refine_group(
    refiner: OneSource,
    embeddings: Mapping[str, Tensor],
    target: str,
    num_samples: int,
    num_steps: int | None = None,
    strength: float | None = None,
    guidance_scale: float | None = None,
    start: str | None = None,
    sampler: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows that all have the same two or more sources: `(B * num_samples, D_target)`."""
    config, space = refiner.config, refiner.space
    if start == "source" or (start is None and strength is not None and config.start == "source"):
        raise ValueError("start: got 'source' with several sources, expected 'posterior_mean': they have one mean")
    strength = config.strength if strength is None else strength
    device = space.mean(target).device
    conditions = []
    for m, x in embeddings.items():
        check_embeddings(x, m, dim=config.dims[m])
        conditions.append(space.encode(nn.functional.normalize(x.to(device, torch.float32), dim=1), m))
    product = PosteriorProduct([refiner.cdm_of(m, target) for m in embeddings], conditions)
    explained, _ = product.explained()
    z = product.posterior_mean() * max(explained, 1e-4) ** -0.5
    times = sampling_times(config.num_steps if num_steps is None else num_steps, strength, device)
    if strength > 0:
        product.conditions = [c.repeat_interleave(num_samples, 0) for c in conditions]
    z = z.repeat_interleave(num_samples, 0)
    if strength > 0:
        schedule = product.cdms[0].schedule
        noise = torch.randn(z.shape, generator=generator, device=device if generator is None else generator.device)
        noisy = schedule.add_noise(z, noise.to(device), times[:1].expand(len(z)))
        denoise = product.denoiser(1.0 if guidance_scale is None else guidance_scale)
        z = sample_named(sampler or config.sampler, denoise, noisy, schedule, times, generator)
    return space.decode(z, target)
