"""What every bridge is: a deterministic map between embedding modalities, fitted on positive pairs.

A bridge stands wherever a `DiffGAPRefiner` does: `refine` carries rows of one modality to where the other's lie,
`score` compares rows of two, `score_features` gives the features whose inner product is that score. The sampler's
options are accepted and change nothing; `num_samples` repeats the one answer.

A subclass fits one unordered pair of modalities at a time, from rows less their modality's centroid, and keeps what it
learned as float32 buffers named `<tensor>:<first>-><second>`. Arithmetic is in full float32 whatever the input's dtype,
autocast or TF32 say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffgap_lightning.bridges.pairs import PairedRows
from diffgap_lightning.checkpoint import load_folder, save_folder
from diffgap_lightning.functional.checks import check_embeddings
from diffgap_lightning.functional.precision import column_mean, full_float32

Direction = tuple[str, str]
unit = nn.functional.normalize


class Bridge(nn.Module):
    """Common part of all bridges; subclasses give `_fit_pair`, `_offset` and `_features`.

    Args:
        **options: The constructor's arguments, JSON-able; they are saved and restored.

    Attributes:
        dims: Embedding dimension of each modality, from `fit`.
    """

    equal_dims: ClassVar[bool] = False  # only between modalities of one dimension
    least_rows: ClassVar[int] = 0  # of each modality, for a refiner to use it
    pair_tensors: ClassVar[tuple[str, ...]] = ()  # kept for each unordered pair, as (first, second)
    direction_tensors: ClassVar[tuple[str, ...]] = ()  # kept for each ordered pair of a fitted pair

    def __init__(self, **options: Any) -> None:
        super().__init__()
        weight = options.get("centred_weight", 0.0)
        if weight != "auto" and not weight >= 0:
            raise ValueError(f"centred_weight: got {weight}, expected a number >= 0")
        self.options = options
        self.dims: dict[str, int] = {}
        self._directions: tuple[Direction, ...] = ()

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Ordered (source, target) pairs; empty before `fit`."""
        return self._directions

    @torch.no_grad()
    def fit(
        self,
        embeddings: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        directions: Sequence[Direction] | None = None,
    ) -> Bridge:
        """Fit on all rows given.

        Args:
            embeddings: Modality to `(N, D)` rows of unit norm; N and D may differ between modalities.
            ids: Modality to `(N,)` int64; equal ids are positive pairs.
            directions: Ordered (source, target) pairs; default: all of the modalities given.

        Returns:
            The bridge itself.

        Raises:
            TypeError, ValueError: unusable rows, unknown modalities, a pair without a common id, or dimensions that
                this bridge cannot join.
        """
        chosen = _check_directions(directions, embeddings)
        modalities = [m for m in embeddings if any(m in d for d in chosen)]
        for m in modalities:
            check_embeddings(embeddings[m], m, unit=True)
            if m not in ids or ids[m].shape != (len(embeddings[m]),):
                got = tuple(ids[m].shape) if m in ids else "nothing"
                raise ValueError(f"ids of {m}: got {got}, expected ({len(embeddings[m])},): one id a row")
        self._start(chosen, {m: embeddings[m].shape[1] for m in modalities})
        centred = {}
        for m in modalities:
            mean = column_mean(embeddings[m])
            self._keep(f"mean:{m}", mean.float())
            centred[m] = embeddings[m].float() - self._get(f"mean:{m}")
        for first, second in self.pairs:
            rows = PairedRows.find(centred[first], centred[second], ids[first], ids[second], f"{first} and {second}")
            with full_float32(rows.first.device):
                self._fit_pair(first, second, rows)
        return self.eval()

    def refine(
        self,
        embedding: Tensor,
        *,
        source: str,
        target: str,
        num_steps: int | None = None,
        num_samples: int = 1,
        strength: float | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Carry embeddings of one modality to where the other modality's lie.

        Args:
            embedding: `(B, D)`; it is not changed.
            source: Its modality.
            target: The modality to move to.
            num_steps: No effect.
            num_samples: How often each row's answer is repeated.
            strength: No effect.
            guidance_scale: No effect.
            generator: No effect.

        Returns:
            `(B, D_target)`, or `(B, num_samples, D_target)` for more than one sample, of unit norm, in the dtype and on
            the device of `embedding`.

        Raises:
            TypeError, ValueError: unusable rows, or a direction that was not fitted.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, expected at least 1")
        self._check_direction(source, target)
        check_embeddings(embedding, source, dim=self.dims[source])
        mean = self._get(f"mean:{target}")
        with full_float32(mean.device):
            out = unit(mean + self._offset(self.centre(embedding, source), source, target), dim=1)
        return repeat_samples(out.to(embedding.device, embedding.dtype), num_samples)

    def score(self, query: Tensor, gallery: Tensor, *, source: str, target: str) -> Tensor:
        """Similarity `(Q, G)` float32 of queries `(Q, D)` of modality `source` to a gallery of modality `target`."""
        features = [
            self.score_features(rows, modality=modality, source=source, target=target)
            for rows, modality in ((query, source), (gallery, target))
        ]
        with full_float32(query.device):
            return features[0] @ features[1].to(query.device).T

    def score_features(self, embedding: Tensor, *, modality: str, source: str, target: str) -> Tensor:
        """Features `(N, F)` float32 whose inner products are the score.

        Args:
            embedding: `(N, D)` rows of `modality`.
            modality: `source` or `target`.
            source: The queries' modality.
            target: The gallery's modality.
        """
        self._check_direction(source, target)
        if modality not in (source, target):
            raise ValueError(f"modality: got {modality!r}, expected {source!r} or {target!r}")
        check_embeddings(embedding, modality, dim=self.dims[modality])
        with full_float32(self._get(f"mean:{modality}").device):
            features = self._features(self.centre(embedding, modality), modality, source, target)
        return features.to(embedding.device)

    def centre(self, embedding: Tensor, modality: str) -> Tensor:
        """Unit rows less their modality's centroid, `(B, D)` float32 on the bridge's device."""
        mean = self._get(f"mean:{modality}")
        return unit(embedding.to(mean.device, torch.float32), dim=1) - mean

    def again(self, pair: Direction) -> Bridge:
        """An unfitted bridge of the same options, with what this one chose for a pair in place of `"auto"`."""
        return type(self)(**self.options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write a checkpoint folder (see `checkpoint.py`), atomically."""
        config, tensors = self.to_parts()
        return save_folder(folder, type(self).__name__, config, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Bridge:
        """Read what `save_pretrained` wrote; `load_bridge` finds the class by itself."""
        return cls.from_parts(*load_folder(folder, cls.__name__))

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`(config, tensors)`: JSON-able values and the buffers, enough for `from_parts`."""
        if not self._directions:
            raise ValueError(f"{type(self).__name__}: not fitted yet; call fit(embeddings, ids) first")
        config = {"options": self.options, "directions": [list(d) for d in self._directions], "dims": self.dims}
        return config, dict(self.state_dict())

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bridge:
        """Build a fitted bridge from `to_parts`.

        Raises:
            ValueError: values or tensors that do not fit this class.
        """
        try:
            bridge = cls(**config["options"])
            directions = [(str(s), str(t)) for s, t in config["directions"]]
            bridge._start(directions, {str(m): int(d) for m, d in config["dims"].items()})
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{cls.__name__}: the configuration does not fit this class ({error})") from error
        if (
            not directions
            or {m for d in directions for m in d} - set(bridge.dims)
            or any(s == t for s, t in directions)
        ):
            raise ValueError(f"{cls.__name__}: directions {directions} do not fit dims {bridge.dims}")
        expected = bridge._tensor_names()
        if set(tensors) != expected:
            odd = ", ".join(sorted(set(tensors) ^ expected))
            raise ValueError(f"{cls.__name__}: got other tensors than this class keeps ({odd})")
        for name, value in tensors.items():
            kind, _, modality = name.partition(":")
            if kind == "mean" and value.shape != (bridge.dims[modality],):
                got = f"{tuple(value.shape)}, expected ({bridge.dims[modality]},)"
                raise ValueError(f"{cls.__name__}: {name} has shape {got} from the configuration")
            bridge._keep(name, value)
        return bridge.eval()

    @property
    def pairs(self) -> tuple[Direction, ...]:
        """Each unordered pair of modalities once, as (first, second) in alphabetical order."""
        return tuple(dict.fromkeys(self._pair(*d) for d in self._directions))

    def extra_repr(self) -> str:
        """Options and directions."""
        shown = [f"{k}={v!r}" for k, v in self.options.items()] + [f"{s}->{t}" for s, t in self._directions]
        return ", ".join(shown)

    def _fit_pair(self, first: str, second: str, rows: PairedRows) -> None:
        """Fit one unordered pair from centred rows and `_keep` the result."""
        raise NotImplementedError

    def _offset(self, x: Tensor, source: str, target: str) -> Tensor:
        """Centred rows `(B, D)` -> where the refined rows lie relative to the target's centroid, `(B, D_target)`."""
        raise NotImplementedError

    def _features(self, x: Tensor, modality: str, source: str, target: str) -> Tensor:
        """Centred rows `(N, D)` -> score features `(N, F)`."""
        raise NotImplementedError

    def _start(self, directions: Iterable[Direction], dims: dict[str, int]) -> None:
        """Forget an earlier fit and take over directions and dimensions."""
        for name in list(self._buffers):
            del self._buffers[name]
        self._directions, self.dims = tuple(directions), dims
        for first, second in self.pairs if self.equal_dims else ():
            if dims[first] != dims[second]:
                raise ValueError(
                    f"{type(self).__name__}: {first} has dimension {dims[first]} and {second} {dims[second]}, but this "
                    "bridge needs equal ones; use RidgeBridge, CCABridge or another that maps between dimensions"
                )

    @staticmethod
    def _pair(a: str, b: str) -> Direction:
        return (a, b) if a < b else (b, a)

    def _same_dims(self, source: str, target: str) -> bool:
        return self.dims[source] == self.dims[target]

    def _tensor_names(self) -> set[str]:
        names = {f"mean:{m}" for d in self._directions for m in d}
        for first, second in self.pairs:
            names |= {f"{name}:{first}->{second}" for name in (*self.pair_tensors, *self.direction_tensors)}
            names |= {f"{name}:{second}->{first}" for name in self.direction_tensors}
        return names

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.detach())

    def _get(self, name: str) -> Tensor:
        return self._buffers[name].float()  # type: ignore[union-attr]

    def _check_direction(self, source: str, target: str) -> None:
        if not self._directions:
            raise ValueError(f"{type(self).__name__}: not fitted yet; call fit(embeddings, ids) first")
        if (source, target) not in self._directions:
            known = ", ".join(f"{s}->{t}" for s, t in self._directions)
            raise ValueError(f"source={source!r}, target={target!r}: this {type(self).__name__} knows {known}")


def _check_directions(directions: Sequence[Direction] | None, embeddings: Mapping[str, Tensor]) -> list[Direction]:
    if directions is None:
        directions = list(permutations(embeddings, 2))
    if not directions:
        raise ValueError(
            f"directions: got none (modalities: {', '.join(embeddings) or 'none'}), expected two modalities"
        )
    for direction in directions:
        if len(direction) != 2 or direction[0] == direction[1] or not set(direction) <= set(embeddings):
            raise ValueError(
                f"directions: got {tuple(direction)}, expected (source, target), two different ones of "
                f"{', '.join(embeddings)}"
            )
    return list(dict.fromkeys((s, t) for s, t in directions))


def repeat_samples(out: Tensor, num_samples: int) -> Tensor:
    """`(B, D)`, or `(B, num_samples, D)` for more than one."""
    return out if num_samples == 1 else out[:, None].repeat(1, num_samples, 1)
