"""What a refiner consists of and how it is kept: coordinates, denoisers, bridges; `save_pretrained`, `from_pretrained`.

A checkpoint folder holds the configuration and the tensors (see `checkpoint.py`). The kinds and shapes of the parts are
read off both, the tensors are loaded into them, and nothing in the folder is executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffgap_lightning.bridges import Bridge
from diffgap_lightning.cdm import ContrastiveDiffusion
from diffgap_lightning.checkpoint import load_folder, save_folder
from diffgap_lightning.denoiser import MLPDenoiser
from diffgap_lightning.diffusion.schedule import NoiseSchedule
from diffgap_lightning.functional.checks import check_embeddings, frames_as_rows
from diffgap_lightning.gaussian import GaussianDenoiser
from diffgap_lightning.mixture_denoiser import MixtureDenoiser
from diffgap_lightning.refiner.checks import check_claims
from diffgap_lightning.refiner.closed_forms import BRIDGES, HUB_BRIDGE
from diffgap_lightning.refiner.config import Direction, RefinerConfig, direction_name
from diffgap_lightning.refiner.hubness import HubCorrection
from diffgap_lightning.sequence_denoiser import SequenceDenoiser
from diffgap_lightning.space import EmbeddingSpace

R = TypeVar("R", bound="RefinerBase")
_NO_BRIDGE = ("forward", "backward", "hub")  # components of the fused score beside the bridges


class RefinerBase(nn.Module):
    """The parts of a refiner.

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

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Ordered (source, target) pairs."""
        return self.config.directions

    def save_pretrained(self, folder: str | os.PathLike[str], state: Mapping[str, Tensor] | None = None) -> Path:
        """Write a checkpoint folder (see `checkpoint.py`), atomically.

        Args:
            folder: Where to write; an older checkpoint there is replaced.
            state: Tensors to save instead of the present ones, e.g. averaged weights.
        """
        return save_folder(folder, type(self).__name__, asdict(self.config), state or self.state_dict())

    @classmethod
    def from_pretrained(cls: type[R], folder: str | os.PathLike[str], encoder: Any = None) -> R:
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
            encoder: An encoder, its fingerprint, or None where that is not known; of a refiner between two encoders'
                spaces either of them.
            name: Of this refiner, for the message.

        Raises:
            ValueError: both are known and they differ; the message names both.
        """
        given, trained = getattr(encoder, "fingerprint", encoder), self.config.encoder
        if given is not None and trained is not None and given not in (trained, *trained.split(" + ")):
            raise ValueError(
                f"{name}: was trained in the space of encoder {trained!r}, got {given!r}; "
                "use that encoder or train a refiner for this one"
            )

    @classmethod
    def from_state(cls: type[R], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> R:
        """Rebuild a refiner from its configuration's values and its `state_dict`.

        Raises:
            ValueError: unknown or missing fields, or tensors that do not fit them.
        """
        try:
            built = RefinerConfig(**config)
        except TypeError as error:
            raise ValueError(f"refiner: the configuration does not fit this version ({error})") from error
        wrong = {direction_name(*d) for d in built.directions} - set(built.restore)
        wrong |= {direction_name(*p) for p in built.pairs} - set(built.fusion) | set(built.bridges) - set(BRIDGES)
        if wrong:
            raise ValueError(f"refiner: restore, fusion or bridges lack or do not know {', '.join(sorted(wrong))}")
        for pair, weights in built.fusion.items():
            known = {*built.bridges, *_NO_BRIDGE}
            if set(weights) - known or not any(weights.values()):
                raise ValueError(f"refiner: fusion {pair}: got {weights}, expected a positive weight and only {known}")
        check_claims(built, lambda: cls._assemble(built, tensors), tensors)
        with torch.random.fork_rng(devices=[]):  # the networks' first weights are replaced at once
            refiner = cls._assemble(built, tensors).eval()
        refiner.load_state_dict(dict(tensors))
        return refiner

    @classmethod
    def _assemble(cls: type[R], config: RefinerConfig, tensors: Mapping[str, Tensor]) -> R:
        """A refiner of the kind and shape that a configuration and a state say, with no weights that count."""
        closed_forms = {d: _empty_closed_form(config.ranks, d, tensors) for d in config.directions}
        prefix = "bridges."
        states = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        bridges = {n: BRIDGES[n].from_parts(record, _part(states, n)) for n, record in config.bridges.items()}
        hubs = {}
        for pair in config.pairs:
            bank = [f"hubs.{direction_name(*pair)}.{side}" for side in ("source", "target")]
            if all(name in tensors and tensors[name].ndim == 2 for name in bank) and HUB_BRIDGE in bridges:
                sizes = (_rows_of(tensors, bank[0]), _rows_of(tensors, bank[1]))
                hubs[pair] = HubCorrection(sizes, tensors[bank[0]].shape[1])
        return cls(config, EmbeddingSpace(config.dims, config.ranks), closed_forms, bridges, hubs)

    def cdm_of(self, source: str, target: str) -> ContrastiveDiffusion:
        """The contrastive diffusion module of a direction.

        Raises:
            ValueError: a direction that this refiner does not have.
        """
        if (source, target) not in self.directions:
            known = ", ".join(direction_name(*d) for d in self.directions)
            raise ValueError(f"source={source!r}, target={target!r}: this refiner knows {known}")
        return self.cdm[direction_name(source, target)]  # type: ignore[return-value]

    def rows(self, embedding: Tensor, modality: str, per_frame: bool = False) -> Tensor:
        """Checked rows `(B, D)` of unit norm, float32, where the refiner is; of sequences their frames `(B T, D)`."""
        if modality not in self.config.dims:
            raise ValueError(f"modality: got {modality!r}, expected one of {', '.join(self.config.dims)}")
        embedding = frames_as_rows(embedding, modality, self.config.frames, per_frame)
        check_embeddings(embedding, modality, dim=self.config.dims[modality])
        return nn.functional.normalize(embedding.to(self.space.mean(modality).device, torch.float32), dim=1)

    def whole(self, rows: Tensor, most: int | None = None) -> Tensor:
        """Frames `(B T, ...)` as sequences `(B, T, ...)`, if the refiner takes sequences; of at most so many rows."""
        frames = self.config.frames
        rows = rows if most is None else rows[: most - most % max(frames, 1)]
        return rows.unflatten(0, (-1, frames)) if frames else rows


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


def _rows_of(tensors: Mapping[str, Tensor], name: str) -> int:
    return len(tensors[name]) if name in tensors and tensors[name].ndim > 0 else 0


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below `name.`, without that prefix."""
    return {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
