"""The refiner: what a trained DiffGAP is used through, with or without Lightning.

    refiner = DiffGAPRefiner.from_pretrained("runs/quickstart/refiner")
    audio_like = refiner.refine(text_embedding, source="text", target="audio")     # (B, D) -> (B, D)
    similarity = refiner.score(text, audio, source="text", target="audio")         # (Q, G)

`refine` starts at the posterior mean or at the centred source (see `calibration.py`), noises that as far back as
`strength` says, 0 leaving the start as it is and 1 making it pure noise, and denoises it conditioned on the source.
`score` never samples (see `scoring.py`). `measure` fits all that needs no training (see `measuring.py`),
`from_pretrained` loads what training left (see `refiner_base.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgap_lightning.diffusion.samplers import sample_named
from diffgap_lightning.diffusion.schedule import sampling_times
from diffgap_lightning.refiner.calibration import CalibratedRefiner
from diffgap_lightning.refiner.config import Direction, Sampler, Start, check_start
from diffgap_lightning.refiner.measuring import measure
from diffgap_lightning.refiner.novelty import distances, novelty
from diffgap_lightning.refiner.prepared import PreparedRefiner
from diffgap_lightning.refiner.together import refine_together
from diffgap_lightning.refiner.uncertainty import Uncertainty, uncertainty_of
from diffgap_lightning.space import Rank


class DiffGAPRefiner(CalibratedRefiner):
    """Refines and scores embeddings across modalities; made by `measure` or `from_pretrained`."""

    @classmethod
    def measure(
        cls,
        embeddings: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        pairs: Sequence[Direction] | None = None,
        rank: Rank | Mapping[str, Rank] = "auto",
        max_pairs: int = 100_000,
        few_pairs: int = 2000,
        **choices: Any,
    ) -> DiffGAPRefiner:
        """Fit everything that needs no training: the space, the Gaussian denoisers and the bridges.

        The result already refines and scores; training the denoisers' networks improves it from there. On few pairs
        all of it is also fitted on four fifths of the rows at a time, and the fifth that is left tells how much to
        restore and how to weigh the score components; no row is given up for it.

        Args:
            embeddings: Modality to training rows `(N, D)` of unit norm, or to sequences `(N, T, D)` of unit frames: the
                refiner then takes sequences of T frames, and frame t of one modality is the pair of frame t.
            ids: Modality to `(N,)`; equal ids are positive pairs.
            pairs: (source, target) pairs; default: text to audio where both are there, otherwise all.
            rank: See `EmbeddingSpace.fit`.
            max_pairs: A fixed random subset of so many positive pairs is fitted on.
            few_pairs: Up to so many, the posterior means may be kernel regressions, and the folds are used; 0: never.
                Of sequences never.
            **choices: Other fields of `RefinerConfig`.

        Raises:
            ValueError: unusable rows, or a pair of modalities without a common id.
        """
        return measure(cls, embeddings, ids, pairs, rank, max_pairs, few_pairs, choices)

    @torch.no_grad()
    def refine(
        self,
        embedding: Tensor | Mapping[str, Tensor | None],
        *,
        source: str | None = None,
        target: str,
        num_steps: int | None = None,
        num_samples: int = 1,
        strength: float | None = None,
        guidance_scale: float | None = None,
        start: Start | None = None,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        per_frame: bool = False,
    ) -> Tensor:
        """Carry embeddings of one modality, or of several at once, to where the other modality's lie.

        Args:
            embedding: `(B, D)`, or source modality to `(B, D)` or None; `(B, T, D)` where the refiner was trained on
                sequences of T frames or `per_frame` is set. It is not changed.
            source: Its modality; not with several.
            target: The modality to move to.
            num_steps: Sampler steps, from 1; default: the refiner's.
            num_samples: Samples for each row.
            strength: How far back the start is noised, 0 (the start itself) to 1 (pure noise). Default: the refiner's,
                with its start. Given alone, the start is `"source"`, as image-to-image pipelines mean it: 0 is the
                centred input.
            guidance_scale: Above 1 overstates the condition; default 1.
            start: `"posterior_mean"` or `"source"`.
            sampler: `"dpmpp_2m"`, `"ddim"` or `"ddpm"`.
            generator: Source of the noise; on its own device or the embedding's.
            noise: What the start is noised with instead of drawing it: standard normal `(B, R_target)`, or
                `(B, T, R_target)`, R being the configuration's `ranks`; a row's samples follow each other.
            present: With several sources, source to `(B,)` bool: which rows have it. See `together.py`.
            per_frame: Refine every frame of sequences as an embedding of its own.

        Returns:
            `(B, D_target)`, or `(B, num_samples, D_target)` for more than one sample, of unit norm, in the dtype and on
            the device of `embedding`; of sequences `(B, T, D_target)` or `(B, num_samples, T, D_target)`.

        Raises:
            ValueError: unusable rows, a direction that was not trained, options out of range.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, expected at least 1")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: got {guidance_scale}, expected a finite number")
        if isinstance(embedding, Mapping):
            if source is not None:
                raise ValueError(
                    f"source: got {source!r} beside several sources, expected none: the mapping names them"
                )
            if noise is not None:
                raise ValueError("noise: got some beside several sources, expected a generator")
            if self.config.frames or per_frame:
                raise ValueError("sequences: got several sources, expected one; refine from each alone")
            return refine_together(
                self, embedding, target=target, present=present, num_samples=num_samples, num_steps=num_steps,
                strength=strength, guidance_scale=guidance_scale, start=start, sampler=sampler, generator=generator,
            )  # fmt: skip
        if source is None or present is not None:
            raise ValueError(
                f"source={source!r}, present={present!r}: `source` belongs to one tensor, `present` to several"
            )
        cdm, config = self.cdm_of(source, target), self.config
        rows = self.rows(embedding, source, per_frame)
        if start is None:
            start = config.start if strength is None else "source"
        strength = config.strength if strength is None else strength
        times = sampling_times(config.num_steps if num_steps is None else num_steps, strength, rows.device)
        offset = self.whole(self.start_of(rows, source, target, start)).repeat_interleave(num_samples, 0)
        if strength > 0:
            condition = self.whole(self.space.encode(rows, source)).repeat_interleave(num_samples, 0)
            denoise = cdm.denoiser(condition, 1.0 if guidance_scale is None else guidance_scale)
            z = self.space.coordinates(offset, target)
            noise = _randn_like(z, generator) if noise is None else noise.to(z.device, z.dtype)
            if noise.shape != z.shape:
                raise ValueError(f"noise: got {tuple(noise.shape)}, expected {tuple(z.shape)}")
            noisy = cdm.schedule.add_noise(z, noise, times[:1].expand(len(z)))
            clean = sample_named(sampler or config.sampler, denoise, noisy, cdm.schedule, times, generator)
            # What lies outside the basis is not diffused: it stays what the start has there.
            offset = offset + self.space.offset(clean - z, target)
        out = nn.functional.normalize(self.space.mean(target) + offset, dim=-1).to(embedding.device, embedding.dtype)
        out = out if num_samples == 1 else out.unflatten(0, (-1, num_samples))
        if per_frame:
            out = out.unflatten(0, embedding.shape[:2])
        return out.transpose(1, 2) if per_frame and num_samples > 1 else out

    @torch.no_grad()
    def prepare(
        self,
        *,
        source: str,
        target: str,
        num_steps: int | None = None,
        strength: float | None = None,
        start: Start | None = None,
        sampler: Sampler | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PreparedRefiner:
        """A copy for one direction with the options of `refine` fixed: faster, and it can be exported.

        `dtype` is that of the network's products; see `prepared.py`.
        """
        if start is None:
            start = self.config.start if strength is None else "source"
        check_start(start)
        return PreparedRefiner(
            self, source, target, start=start, sampler=sampler or self.config.sampler, dtype=dtype,
            num_steps=self.config.num_steps if num_steps is None else num_steps,
            strength=self.config.strength if strength is None else strength,
        )  # fmt: skip

    def refine_with_grad(self, embedding: Tensor, *, source: str, target: str, **options: Any) -> Tensor:
        """`refine` with the same options, but gradients reach the networks and `embedding`; for joint training.

        With `strength=0` it is the one-step estimate; otherwise they run through every sampler step.
        """
        return type(self).refine.__wrapped__(  # type: ignore[attr-defined]  # what no_grad decorates
            self, embedding, source=source, target=target, **options
        )

    def uncertainty(
        self,
        embedding: Tensor | Mapping[str, Tensor | None],
        *,
        source: str | None = None,
        target: str,
        num_samples: int = 32,
        level: float = 0.9,
        **options: Any,
    ) -> Uncertainty:
        """How sure refining is of each row, from samples of the whole posterior; see `uncertainty.py`.

        Args:
            embedding: As in `refine`, not sequences.
            source: As in `refine`.
            target: As in `refine`.
            num_samples: Samples for each row; each costs as much as refining it once.
            level: Probability with which the true target's cosine exceeds `lower_cosine`.
            **options: Others of `refine`, e.g. `generator`.
        """
        samples = self.refine(
            embedding, source=source, target=target, num_samples=num_samples, strength=1.0, start="posterior_mean",
            **options,
        )  # fmt: skip
        if samples.ndim != 3:
            raise ValueError(
                f"uncertainty: got {tuple(samples.shape)} from refine, expected embeddings, several samples"
            )
        return uncertainty_of(samples, level)

    @torch.no_grad()
    def novelty(self, embedding: Tensor, *, modality: str) -> Tensor:
        """How far rows `(N, D)` lie from what this refiner was measured on, `(N,)` float32 on their device.

        Above 1 lies 1 % of genuine rows: refuse or flag what is above. See `novelty.py`.
        """
        rows = self.rows(embedding, modality)
        if modality not in self.config.typical:
            raise ValueError(f"novelty: this refiner holds no distances of {modality}; measure it anew")
        other = next(s for s, t in self.directions if t == modality)
        closed = self.cdm_of(other, modality).closed_form
        precision = (closed.basis[1] / closed.variance[1]) @ closed.basis[1].T
        found = novelty(*distances(self.space, modality, precision, rows), self.config.typical[modality])
        return found.to(embedding.device)


def _randn_like(z: Tensor, generator: torch.Generator | None) -> Tensor:
    device = z.device if generator is None else generator.device
    return torch.randn(z.shape, generator=generator, device=device).to(z.device)
