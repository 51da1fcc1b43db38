"""What happens to an embedding on its way into a generator: one refiner, its options, and who shares a sample.

    shared (default)    refine (B, D), then tile:  every candidate of a prompt gets the same refined embedding
    per_candidate       tile, then refine:         every candidate gets a sample of its own
    num_samples         the normalised mean of so many samples stands for each of them

The noise comes from a generator of its own, so that the audio generator draws what it would have drawn alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_NARROW_CONE = 0.2  # length of a centroid of unit vectors below which it says little
_FOREIGN = 0.35  # share of the expected cosine below which embeddings are called foreign
_ENOUGH = 8  # embeddings after which that is decided; single prompts scatter too much


class Refines(Protocol):
    """What can be attached: a `DiffGAPRefiner`, any of the bridges, or whatever else has this method."""

    def refine(
        self,
        embedding: Tensor,
        *,
        source: str,
        target: str,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`(B, D)` -> `(B, D_target)`, or `(B, num_samples, D_target)` for more than one sample."""


class Conditioner:
    """Refines a generator's conditional embeddings; called by the adapters.

    Args:
        refiner: See `Refines`; options that are None are not passed to it.
        source: Modality of the generator's embeddings.
        target: Modality that they are to look like.
        strength: As in `DiffGAPRefiner.refine`.
        num_samples: Samples whose normalised mean is used.
        guidance_scale: As in `DiffGAPRefiner.refine`.
        num_steps: As in `DiffGAPRefiner.refine`.
        start: As in `DiffGAPRefiner.refine`.
        per_candidate: A sample for each candidate of a prompt instead of one for all.
        per_frame: Refine each frame of a sequence as an embedding of its own.
        seed: Of the refiner's noise; `reset` begins it anew.
        generator: Source of the noise instead of `seed`; it goes on from call to call.
        differentiable: Let gradients through (`refine_with_grad`).

    Raises:
        ValueError: options out of range, or a direction that the refiner does not have.
    """

    def __init__(
        self,
        refiner: Refines,
        *,
        source: str = "text",
        target: str = "audio",
        strength: float | None = None,
        num_samples: int = 1,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        start: str | None = None,
        per_candidate: bool = False,
        per_frame: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
    ) -> None:
        if not callable(getattr(refiner, "refine", None)):
            raise TypeError(f"refiner: got {type(refiner).__name__}, expected a DiffGAPRefiner, a bridge or another "
                            "object with refine()")  # fmt: skip
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, expected at least 1")
        if strength is not None and not 0 <= strength <= 1:
            raise ValueError(f"strength: got {strength}, expected 0 (the start itself) to 1 (pure noise)")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: got {guidance_scale}, expected a finite number")
        if not differentiable and isinstance(refiner, nn.Module) and refiner.training:
            raise ValueError("refiner: it is in training mode, with dropout; call refiner.eval() first")
        known = getattr(refiner, "directions", None)
        if known is not None and (source, target) not in known:
            listed = ", ".join(f"{s}->{t}" for s, t in known)
            raise ValueError(f"source={source!r}, target={target!r}: this {type(refiner).__name__} knows {listed}")
        self.refiner, self.source, self.target = refiner, source, target
        self.num_samples, self.per_candidate, self.per_frame = num_samples, per_candidate, per_frame
        self._given, self._seed, self._differentiable = generator, seed, differentiable
        options = {"strength": strength, "guidance_scale": guidance_scale, "num_steps": num_steps, "start": start}
        # Sees the embeddings of each call before they are refined, and which rows of the batch they are (None: all).
        self.observe: Callable[[Tensor, Sequence[int] | None], None] | None = None
        self._options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self.reset()

    def reset(self) -> None:
        """Begin the noise of `seed` anew; a generator that was given goes on."""
        self._generator = self._given or torch.Generator().manual_seed(self._seed)
        self._cosines: list[float] = []

    @property
    def dims(self) -> Mapping[str, int]:
        """Embedding dimension of each modality, as far as the refiner says."""
        config = getattr(self.refiner, "config", None)
        return getattr(self.refiner, "dims", None) or getattr(config, "dims", None) or {}

    @property
    def fingerprint(self) -> str | None:
        """The encoder in whose space the refiner was trained, if it is known."""
        return getattr(getattr(self.refiner, "config", None), "encoder", None)

    def __call__(self, embedding: Tensor, candidates: int = 1, selected: Sequence[int] | None = None) -> Tensor:
        """Refine and tile.

        Args:
            embedding: `(B, D)`, `(B, 1, D)` or, for a refiner of sequences or with `per_frame`, `(B, T, D)`.
            candidates: How many waveforms each row conditions.
            selected: Which rows of the generator's batch these are, for `observe`.

        Returns:
            The same layout with `B * candidates` rows, those of a row beside each other.
        """
        if self.observe is not None:
            self.observe(embedding, selected)
        frames = embedding.shape[1] if embedding.ndim == 3 else None
        single = frames == 1 or (self.per_frame and frames is not None)
        rows = embedding.flatten(0, 1) if single else embedding
        self._look(rows)
        own = candidates if self.per_candidate else 1
        out = self._samples(rows, own)  # (rows, own, ...)
        if single:
            out = out.unflatten(0, (-1, frames)).transpose(1, 2)
        out = out.flatten(0, 1)
        return out if self.per_candidate else out.repeat_interleave(candidates, 0)

    def tiled(
        self, embedding: Tensor, names: Sequence[Hashable] | None = None, selected: Sequence[int] | None = None
    ) -> Tensor:
        """Refine rows that the generator has tiled by itself.

        Args:
            embedding: As for a call.
            names: B values; rows of one name are candidates of one prompt. Default: equal rows are.
            selected: As for a call.

        Returns:
            The refined rows in the same order.
        """
        if self.per_candidate:
            return self(embedding, selected=selected)
        if names is None:
            names = [row.numpy().tobytes() for row in embedding.detach().float().cpu()]
        first: dict[Hashable, int] = {}
        place = [first.setdefault(name, i) for i, name in enumerate(names)]
        chosen = list(first.values())
        if len(chosen) == len(place):
            return self(embedding)
        return self(embedding[chosen])[[chosen.index(i) for i in place]]

    @torch.no_grad()
    def _look(self, rows: Tensor) -> None:
        """Warn, once, where the embeddings cannot be of the space that the refiner was trained in.

        Two encoders of one width pass every other check. But a modality's embeddings lie in a cone about their
        centroid, and those of another space have no reason to: the mean cosine of the first few tells.
        """
        space = getattr(self.refiner, "space", None)
        if len(self._cosines) >= _ENOUGH or rows.ndim != 2 or self.source not in getattr(space, "modalities", ()):
            return
        centroid = space.mean(self.source)  # type: ignore[union-attr]
        width = float(centroid.norm())
        if rows.shape[1] != len(centroid) or width < _NARROW_CONE:
            return
        self._cosines += (nn.functional.normalize(rows.to(centroid), dim=1) @ centroid / width).tolist()
        found = sum(self._cosines) / len(self._cosines)
        if len(self._cosines) >= _ENOUGH and found < _FOREIGN * width:
            warnings.warn(
                f"the generator's embeddings have a mean cosine of {found:.2f} to the {self.source} centroid of the "
                f"refiner's training data, where {width:.2f} is expected: was it trained with another encoder?",
                stacklevel=2,
            )

    def _samples(self, rows: Tensor, own: int) -> Tensor:
        """`(R, own, ...)`: the means of `num_samples` samples."""
        count = own * self.num_samples
        refine = getattr(self.refiner, "refine_with_grad" if self._differentiable else "refine")
        out = refine(
            rows,
            source=self.source,
            target=self.target,
            num_samples=count,
            generator=self._generator,
            **self._options,
        )
        if count == 1:
            return out.unsqueeze(1)
        if self.num_samples == 1:
            return out
        mean = out.unflatten(1, (own, self.num_samples)).float().mean(2)
        return nn.functional.normalize(mean, dim=-1).to(out.dtype)
