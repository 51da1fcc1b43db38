"""The refiner: what a trained DiffGAP is used through, with or without Lightning.

    refiner = DiffGAPRefiner.from_pretrained("runs/quickstart/refiner")
    audio_like = refiner.refine(text_embedding, source="text", target="audio")     # (B, D) -> (B, D)
    similarity = refiner.score(text, audio, source="text", target="audio")         # (Q, G)

`refine` starts somewhere and denoises the rest of the way, conditioned on the source embedding:

    start="posterior_mean"   E[target | source], blended with the centred source and brought back to the target's
                             variance (regression alone shrinks off the data's manifold)
    start="source"           the source embedding with its centroid moved onto the target's
    strength                 how far back the start is noised: 0 returns the start itself, 1 is pure noise

`score` never samples. It adds up similarities, each an inner product of features of query and gallery row alone: the
closed-form bridges' scores, the contrastive diffusion modules' posterior means in both directions, and a correction for
hubs (see `hubness.py`). Their weights are fitted on held-out rows (see `fusion.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from diffgap_lightning.bridges import (
    Bridge,
    CCABridge,
    CentreBridge,
    MixtureBridge,
    ProcrustesBridge,
    RestoredRidgeBridge,
    RidgeBridge,
)
from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.checkpoint import load_folder, save_folder
from diffgap_lightning.closed_forms import HUB_BRIDGE, ClosedForms, fit_closed_forms, held_out
from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.samplers import sample_named
from diffgap_lightning.diffusion.schedule import NoiseSchedule, sampling_times
from diffgap_lightning.functional.checks import check_embeddings, frames_as_rows
from diffgap_lightning.functional.pairs import frame_rows, pair_indices
from diffgap_lightning.functional.precision import full_float32
from diffgap_lightning.fusion import PSEUDO_QUERIES, ScoredGallery, fit_weights, fit_weights_over, fuse
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.hubness import HubCorrection
from diffgap_lightning.mixture_denoiser import MixtureDenoiser
from diffgap_lightning.novelty import distances, novelty, typical_distances
from diffgap_lightning.refiner_config import Direction, RefinerConfig, Sampler, Start, direction_name
from diffgap_lightning.sequence_denoiser import SequenceDenoiser
from diffgap_lightning.space import EmbeddingSpace, Rank
from diffgap_lightning.together import refine_together
from diffgap_lightning.uncertainty import Uncertainty, uncertainty_of

# The closed forms that the fused score may draw on.
_BRIDGES: dict[str, type[Bridge]] = {
    "centre": CentreBridge,
    "ridge": RidgeBridge,
    "restored": RestoredRidgeBridge,
    "procrustes": ProcrustesBridge,
    "cca": CCABridge,
    "mixture": MixtureBridge,
}
# Weights before there is a validation, and where it is small: the strongest closed form, and a little of what may
# correct it. Of few pairs, whose posterior means are kernel regressions, these means are the strongest.
_NO_BRIDGE = ("forward", "backward", "hub")
_PRIOR_WEIGHTS = {"restored": 1.0, "centre": 0.5, "cca": 0.3, "mixture": 0.05, "forward": 0.2, "backward": 0.2}
_FEW_PRIOR_WEIGHTS = {"forward": 1.0, "backward": 1.0, "centre": 1.0, "hub": 1.5}
_NUM_FOLDS = 5
_BLEND = 0.3  # of the centred source with a linear posterior mean
_LEAST_ROWS = 16  # of a modality in the rest of a fold, below which there are no folds
_TOLERANCE = 1.645  # standard errors, one-sided 5 %: by how much a bridge must win to be preferred


class DiffGAPRefiner(nn.Module):
    """Refines and scores embeddings across modalities; made by `measure` or `from_pretrained`.

    Args:
        config: What to build.
        space: The coordinates.
        closed_forms: Fitted Gaussian denoiser of each direction.
        bridges: Fitted closed-form bridges of all pairs, by name.
        hubs: Fitted hub correction of each pair, if there is any.
    """

    def __init__(
        self,
        config: RefinerConfig,
        space: EmbeddingSpace,
        closed_forms: Mapping[Direction, GaussianDenoiser],
        bridges: Mapping[str, Bridge],
        hubs: Mapping[Direction, HubCorrection] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.space = config, space
        self.bridges = nn.ModuleDict(bridges)
        self.hubs = nn.ModuleDict({direction_name(*pair): hub for pair, hub in (hubs or {}).items()})
        self.cdm = nn.ModuleDict()
        for source, target in config.directions:
            sizes, dropout = (config.ranks[target], config.ranks[source]), config.dropout
            network: MLPDenoiser | SequenceDenoiser
            if config.frames:
                network = SequenceDenoiser(*sizes, config.frames, config.width, config.depth, dropout)
            else:
                network = MLPDenoiser(*sizes, config.width, config.depth, dropout=dropout)
            schedule = NoiseSchedule(config.schedule)
            closed_form = closed_forms[source, target]
            self.cdm[direction_name(source, target)] = ContrastiveDiffusion(
                closed_form, network, schedule, config.prediction
            )

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
        pairs = tuple(pairs or _default_pairs(embeddings))
        wanted = {m: embeddings[m] for m in embeddings if any(m in p for p in pairs)}
        missing = sorted({m for p in pairs for m in p} - set(wanted))
        if missing:
            raise ValueError(f"pairs: got {missing[0]}, but the data has only {', '.join(embeddings)}")
        wanted, ids, choices["frames"] = frame_rows(wanted, ids, max_pairs)
        few_pairs = 0 if choices["frames"] else few_pairs  # leaving out one frame of a clip is no new clip
        space = EmbeddingSpace.fit(wanted, rank)
        config = RefinerConfig(tuple(pairs), space.dims, space.ranks, **choices)
        same = all(config.dims[s] == config.dims[t] for s, t in config.pairs)
        fewest = min(len(x) for x in wanted.values())
        usable = {n: b for n, b in _BRIDGES.items() if (same or not b.equal_dims) and fewest >= b.least_rows}
        bridges = {name: bridge() for name, bridge in usable.items()}
        closed = fit_closed_forms(space, wanted, ids, config.pairs, bridges, max_pairs, few_pairs)
        refiner = cls._of(config, space, closed)
        restore = {
            d: _restoring(refiner.start_energy(refiner._whole(wanted[d[0]], 4096), source=d[0], target=d[1]))
            for d in config.directions
        }
        refiner.config = replace(refiner.config, restore={_name(d): r for d, r in restore.items()})
        for pair in config.pairs:
            if len(pair_indices(*(ids[m] for m in pair))[0]) <= few_pairs:
                refiner._cross_fit(wanted, ids, pair, closed)
        typical = {}
        for source, target in config.directions:  # as `novelty` takes the first direction to a modality
            if target not in typical:
                count = min(max_pairs, len(pair_indices(ids[source], ids[target])[0]))
                typical[target] = typical_distances(wanted[target], ids[target], space.ranks[target], count)
        refiner.config = replace(refiner.config, typical=typical)
        return refiner

    @classmethod
    def _of(cls, config: RefinerConfig, space: EmbeddingSpace, closed: ClosedForms) -> DiffGAPRefiner:
        """An untrained refiner of these closed forms, with the weights that need no held-out rows."""
        records = {name: bridge.to_parts()[0] for name, bridge in closed.bridges.items()}
        refiner = cls(replace(config, bridges=records), space, closed.denoisers, closed.bridges, closed.hubs).eval()
        refiner.config = replace(
            refiner.config,
            restore=dict.fromkeys(map(_name, config.directions), 1.0),
            fusion={_name(pair): refiner._prior(pair) for pair in config.pairs},
        )
        return refiner

    def _cross_fit(
        self, embeddings: Mapping[str, Tensor], ids: Mapping[str, Tensor], pair: Direction, closed: ClosedForms
    ) -> None:
        """Fit a pair's fusion weights and restoring factors on rows that no closed form was fitted on, by folds."""
        galleries: list[ScoredGallery] = []
        energy: dict[Direction, list[Tensor]] = {pair: [], pair[::-1]: []}
        for kept, held in held_out(ids[pair[0]], ids[pair[1]], _NUM_FOLDS):
            if min(map(int, (mask.sum() for mask in kept))) < _LEAST_ROWS:
                return
            rest = {m: embeddings[m][mask] for m, mask in zip(pair, kept, strict=True)}
            rest_ids = {m: ids[m][mask] for m, mask in zip(pair, kept, strict=True)}
            space = EmbeddingSpace.fit(rest, {m: self.config.ranks[m] for m in pair})
            again = {name: bridge.again(pair) for name, bridge in closed.bridges.items()}
            config = replace(self.config, pairs=(pair,), dims=space.dims, ranks=space.ranks)
            fitted = fit_closed_forms(space, rest, rest_ids, (pair,), again, len(rest_ids[pair[0]]) ** 2, 0, closed)
            fold = self._of(config, space, fitted)
            found = {m: embeddings[m][mask] for m, mask in zip(pair, held, strict=True)}
            found_ids = [ids[m][mask] for m, mask in zip(pair, held, strict=True)]
            features = [fold.components(found[m], modality=m, pair=pair) for m in pair]
            galleries.append((features[0], features[1], found_ids[0], found_ids[1]))
            for source, target in energy:
                energy[source, target].append(fold.start_energy(found[source], source=source, target=target))
        weights = fit_weights_over(galleries, self._prior(pair), list(self.bridges), tolerance=_TOLERANCE)
        name, queries = _name(pair), sum(len(gallery[2]) for gallery in galleries)
        self.config = replace(
            self.config,
            restore=self.config.restore | {_name(d): _restoring(torch.cat(e)) for d, e in energy.items()},
            fusion=self.config.fusion | {name: weights},
            fusion_prior=self.config.fusion_prior | {name: weights},
            fusion_queries=self.config.fusion_queries | {name: float(queries)},
        )

    def _prior(self, pair: Direction) -> dict[str, float]:
        kernel = all(len(self.cdm_of(*d).closed_form.anchors) > 0 for d in (pair, pair[::-1]))
        usable = {*self.bridges, *_NO_BRIDGE[:2], *(["hub"] if _name(pair) in self.hubs else [])}
        return {k: w for k, w in (_FEW_PRIOR_WEIGHTS if kernel else _PRIOR_WEIGHTS).items() if k in usable}

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Ordered (source, target) pairs."""
        return self.config.directions

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
        rows = self._rows(embedding, source, per_frame)
        if start is None:
            start = config.start if strength is None else "source"
        strength = config.strength if strength is None else strength
        times = sampling_times(config.num_steps if num_steps is None else num_steps, strength, rows.device)
        offset = self._whole(self._start(rows, source, target, start)).repeat_interleave(num_samples, 0)
        if strength > 0:
            condition = self._whole(self.space.encode(rows, source)).repeat_interleave(num_samples, 0)
            denoise = cdm.denoiser(condition, 1.0 if guidance_scale is None else guidance_scale)
            z = self.space.coordinates(offset, target)
            noisy = cdm.schedule.add_noise(z, _randn_like(z, generator), times[:1].expand(len(z)))
            clean = sample_named(sampler or config.sampler, denoise, noisy, cdm.schedule, times, generator)
            # What lies outside the basis is not diffused: it stays what the start has there.
            offset = offset + self.space.offset(clean - z, target)
        out = nn.functional.normalize(self.space.mean(target) + offset, dim=-1).to(embedding.device, embedding.dtype)
        out = out if num_samples == 1 else out.unflatten(0, (-1, num_samples))
        if per_frame:
            out = out.unflatten(0, embedding.shape[:2])
        return out.transpose(1, 2) if per_frame and num_samples > 1 else out

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
        rows = self._rows(embedding, modality)
        if modality not in self.config.typical:
            raise ValueError(f"novelty: this refiner holds no distances of {modality}; measure it anew")
        other = next(s for s, t in self.directions if t == modality)
        closed = self.cdm_of(other, modality).closed_form
        precision = (closed.basis[1] / closed.variance[1]) @ closed.basis[1].T
        found = novelty(*distances(self.space, modality, precision, rows), self.config.typical[modality])
        return found.to(embedding.device)

    @torch.no_grad()
    def score(self, query: Tensor, gallery: Tensor, *, source: str, target: str) -> Tensor:
        """Fused similarity `(Q, G)` float32 of queries `(Q, D)` of modality `source` to a gallery of modality `target`.

        No query is conditioned on its own candidate: every row is looked at alone. Sequences `(Q, T, D)` and
        `(G, T, D)` are compared by the mean of their frames' features.
        """
        features = [
            self.score_features(rows, modality=modality, source=source, target=target)
            for rows, modality in ((query, source), (gallery, target))
        ]
        with full_float32(query.device):
            return features[0] @ features[1].to(query.device).T

    @torch.no_grad()
    def score_features(self, embedding: Tensor, *, modality: str, source: str, target: str) -> Tensor:
        """Features `(N, F)` float32 whose inner products are the fused score; `modality` is one of the two."""
        pair = self._pair(source, target)
        if modality not in pair:
            raise ValueError(f"modality: got {modality!r}, expected {source!r} or {target!r}")
        return fuse(self.components(embedding, modality=modality, pair=pair), self.config.fusion[direction_name(*pair)])

    @torch.no_grad()
    def components(self, embedding: Tensor, *, modality: str, pair: Direction) -> dict[str, Tensor]:
        """Features of every score component, unweighted; see the module's docstring.

        Args:
            embedding: `(N, D)` rows of one of the pair's modalities, or `(N, T, D)` sequences.
            modality: Which.
            pair: As in the configuration.

        Returns:
            Component to `(N, F_k)`: the bridges by name, `"hub"`, `"forward"` and `"backward"`.
        """
        source, target = pair
        rows = self._rows(embedding, modality)
        embedding = embedding.flatten(0, -2)
        found = {
            name: bridge.score_features(embedding, modality=modality, source=source, target=target)
            for name, bridge in self.bridges.items()
            if isinstance(bridge, Bridge)
        }
        if direction_name(*pair) in self.hubs:
            bridge = self.bridges[HUB_BRIDGE]
            features = bridge.score_features(embedding, modality=modality, source=source, target=target)  # type: ignore[operator]
            found["hub"] = self.hubs[direction_name(*pair)](features, modality == source)
        own = self.space.encode(rows, modality)
        other = target if modality == source else source
        produced = self.cdm_of(modality, other).posterior_mean(self._whole(own)).flatten(0, -2)
        forward, backward = (produced, own) if modality == source else (own, produced)
        unit, device = nn.functional.normalize, embedding.device
        found |= {"forward": unit(forward, dim=1).to(device), "backward": unit(backward, dim=1).to(device)}
        return {name: self._whole(x).mean(1) for name, x in found.items()} if self.config.frames else found

    @torch.no_grad()
    def start_energy(self, embedding: Tensor, *, source: str, target: str) -> Tensor:
        """Mean square of each row's unrestored start in the target's coordinates, `(N,)`; 1 on average on the data."""
        offset = self._blend(self._rows(embedding, source), source, target)
        return self._whole(self.space.coordinates(offset, target).square()).flatten(1).mean(1)

    def calibrate(self, embeddings: Mapping[str, Tensor], ids: Mapping[str, Tensor]) -> None:
        """Fit the fusion weights and the restoring factors on rows that were not trained on.

        Args:
            embeddings: Modality to `(N, D)` validation rows.
            ids: Modality to `(N,)`.
        """
        components = {
            (pair, m): self.components(embeddings[m], modality=m, pair=pair) for pair in self.config.pairs for m in pair
        }
        energy = {d: self.start_energy(embeddings[d[0]], source=d[0], target=d[1]) for d in self.directions}
        self.calibrate_from(components, energy, ids)

    def calibrate_from(
        self,
        components: Mapping[tuple[Direction, str], Mapping[str, Tensor]],
        energy: Mapping[Direction, Tensor],
        ids: Mapping[str, Tensor],
    ) -> None:
        """`calibrate` from what `components` and `start_energy` returned, e.g. gathered over a validation epoch."""
        fusion = {}
        for pair in self.config.pairs:
            s, t = pair
            name = direction_name(s, t)
            fusion[name] = fit_weights(
                components[pair, s],
                components[pair, t],
                ids[s],
                ids[t],
                prior=self.config.fusion_prior.get(name, self._prior(pair)),
                rivals=list(self.bridges),
                pseudo_queries=max(PSEUDO_QUERIES, self.config.fusion_queries.get(name, 0.0)),
                tolerance=_TOLERANCE,
            )
        restore = {direction_name(*d): _restoring(e) for d, e in energy.items()}
        self.config = replace(self.config, fusion=fusion, restore=restore)

    def save_pretrained(self, folder: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None) -> Path:
        """Write a checkpoint folder (see `checkpoint.py`), atomically.

        Args:
            folder: Where to write; an older checkpoint there is replaced.
            state: Tensors to save instead of the present ones, e.g. averaged weights.
        """
        return save_folder(folder, type(self).__name__, asdict(self.config), state or self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], encoder: Any = None) -> DiffGAPRefiner:
        """Load what `save_pretrained` wrote; nothing in the folder is executed.

        Args:
            folder: The checkpoint folder.
            encoder: The encoder that will be used, or its fingerprint; a refiner of another's space is refused.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: altered or truncated files, a newer schema, another kind of model, another encoder.
        """
        config, tensors = load_folder(folder, cls.__name__)
        refiner = cls.from_state(config, tensors)
        refiner.check_encoder(encoder, str(folder))
        return refiner

    def check_encoder(self, encoder: Any, name: str = "refiner") -> None:
        """Refuse to be used in another space than the one that was trained in.

        Args:
            encoder: An encoder, its fingerprint, or None where that is not known.
            name: Of this refiner, for the message.

        Raises:
            ValueError: both are known and they differ; the message names both.
        """
        given, trained = getattr(encoder, "fingerprint", encoder), self.config.encoder
        if given is not None and trained is not None and given != trained:
            raise ValueError(
                f"{name}: was trained in the space of encoder {trained!r}, got {given!r}; "
                "use that encoder or train a refiner for this one"
            )

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DiffGAPRefiner:
        """Rebuild a refiner from its configuration's values and its `state_dict`.

        Raises:
            ValueError: unknown or missing fields, or tensors that do not fit them.
        """
        try:
            built = RefinerConfig(**config)
        except TypeError as error:
            raise ValueError(f"refiner: the configuration does not fit this version ({error})") from error
        dims, ranks = built.dims, built.ranks
        closed_forms = {d: _empty_closed_form(ranks, d, tensors) for d in built.directions}
        wrong = {direction_name(*d) for d in built.directions} - set(built.restore)
        wrong |= {direction_name(*p) for p in built.pairs} - set(built.fusion) | set(built.bridges) - set(_BRIDGES)
        if wrong:
            raise ValueError(f"refiner: restore, fusion or bridges lack or do not know {', '.join(sorted(wrong))}")
        prefix = "bridges."
        states = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        bridges = {n: _BRIDGES[n].from_parts(record, _part(states, n)) for n, record in built.bridges.items()}
        hubs = {}
        for pair in built.pairs:
            bank = [f"hubs.{direction_name(*pair)}.{side}" for side in ("source", "target")]
            if all(name in tensors and tensors[name].ndim == 2 for name in bank) and HUB_BRIDGE in bridges:
                sizes = (_rows_of(tensors, bank[0]), _rows_of(tensors, bank[1]))
                hubs[pair] = HubCorrection(sizes, tensors[bank[0]].shape[1])
        with torch.random.fork_rng(devices=[]):  # the networks' first weights are replaced at once
            refiner = cls(built, EmbeddingSpace(dims, ranks), closed_forms, bridges, hubs).eval()
        try:
            refiner.load_state_dict(dict(tensors))
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise ValueError(f"refiner: the tensors do not fit the configuration ({detail:.300})") from error
        return refiner

    def cdm_of(self, source: str, target: str) -> ContrastiveDiffusion:
        """The contrastive diffusion module of a direction.

        Raises:
            ValueError: a direction that this refiner does not have.
        """
        if (source, target) not in self.directions:
            known = ", ".join(direction_name(*d) for d in self.directions)
            raise ValueError(f"source={source!r}, target={target!r}: this refiner knows {known}")
        return self.cdm[direction_name(source, target)]  # type: ignore[return-value]

    def _rows(self, embedding: Tensor, modality: str, per_frame: bool = False) -> Tensor:
        """Checked rows `(B, D)` of unit norm, float32, where the refiner is; of sequences their frames `(B T, D)`."""
        if modality not in self.config.dims:
            raise ValueError(f"modality: got {modality!r}, expected one of {', '.join(self.config.dims)}")
        embedding = frames_as_rows(embedding, modality, self.config.frames, per_frame)
        check_embeddings(embedding, modality, dim=self.config.dims[modality])
        return nn.functional.normalize(embedding.to(self.space.mean(modality).device, torch.float32), dim=1)

    def _whole(self, rows: Tensor, most: int | None = None) -> Tensor:
        """Frames `(B T, ...)` as sequences `(B, T, ...)`, if the refiner takes sequences; of at most so many rows."""
        frames = self.config.frames
        rows = rows if most is None else rows[: most - most % max(frames, 1)]
        return rows.unflatten(0, (-1, frames)) if frames else rows

    def _start(self, rows: Tensor, source: str, target: str, start: Start) -> Tensor:
        """Offset from the target's centroid `(B, D_t)` at which refining starts."""
        if start not in get_args(Start):
            raise ValueError(f"start: got {start!r}, expected one of {', '.join(get_args(Start))}")
        if start == "posterior_mean":
            return self.config.restore[direction_name(source, target)] * self._blend(rows, source, target)
        self.space.shift(rows[:1], source, target)  # refuses unequal dimensions
        return self.space.centre(rows, source)

    def _blend(self, rows: Tensor, source: str, target: str) -> Tensor:
        """Posterior mean and, where the dimensions are equal, centred source: an offset `(B, D_t)`."""
        mean = self.cdm_of(source, target).posterior_mean(self._whole(self.space.encode(rows, source)))
        offset = self.space.offset(mean.flatten(0, -2), target)
        if self.config.dims[source] != self.config.dims[target]:
            return offset
        blend = self.config.blend
        if blend is None:
            closed_form = self.cdm_of(source, target).closed_form
            linear = len(closed_form.anchors) == 0 and not isinstance(closed_form, MixtureDenoiser)
            blend = _BLEND if linear else 0.0
        return offset if blend == 0 else (1 - blend) * offset + blend * self.space.centre(rows, source)

    def _pair(self, source: str, target: str) -> Direction:
        self.cdm_of(source, target)
        return (source, target) if (source, target) in self.config.pairs else (target, source)


def _empty_closed_form(
    ranks: Mapping[str, int], direction: Direction, tensors: Mapping[str, Tensor]
) -> GaussianDenoiser:
    """A closed form of the kind and shape that a state holds."""
    source, target = direction
    centre = tensors.get(f"cdm.{direction_name(*direction)}.closed_form.centre")
    if centre is None:
        anchors = _rows_of(tensors, f"cdm.{direction_name(*direction)}.closed_form.anchors")
        return GaussianDenoiser(ranks[source], ranks[target], anchors)
    if centre.ndim != 2:
        raise ValueError(f"refiner: closed_form.centre has shape {tuple(centre.shape)}, expected a matrix")
    return MixtureDenoiser(ranks[source], ranks[target], *centre.shape)


def _restoring(energy: Tensor) -> float:
    """The factor that brings starts to unit mean square."""
    return float(energy.mean().clamp(min=1e-4).rsqrt())


def _name(direction: Direction) -> str:
    return direction_name(*direction)


def _rows_of(tensors: Mapping[str, Tensor], name: str) -> int:
    return len(tensors[name]) if name in tensors and tensors[name].ndim > 0 else 0


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below `name.`, without that prefix."""
    return {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}


def _default_pairs(modalities: Collection[str]) -> list[Direction]:
    """Text to audio where both are there, and everything else to audio; all pairs where there is no audio."""
    sources = sorted(m for m in modalities if m != "audio")
    if "audio" in modalities:
        return [(m, "audio") for m in sources]
    return list(combinations(sources, 2))


def _randn_like(z: Tensor, generator: torch.Generator | None) -> Tensor:
    device = z.device if generator is None else generator.device
    return torch.randn(z.shape, generator=generator, device=device).to(z.device)
