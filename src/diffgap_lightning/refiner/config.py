"""What a refiner is, apart from its tensors: its directions, architecture, defaults and fitted weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from diffgap_lightning.diffusion.prediction import Prediction
from diffgap_lightning.diffusion.schedule import ScheduleName
from diffgap_lightning.refiner.checks import check_values

Direction = tuple[str, str]
Start = Literal["posterior_mean", "source"]
Sampler = Literal["dpmpp_2m", "ddim", "ddpm"]


def check_start(start: str) -> None:
    """Refuse an unknown start with a `ValueError`."""
    if start not in get_args(Start):
        raise ValueError(f"start: got {start!r}, expected one of {', '.join(get_args(Start))}")


def direction_name(source: str, target: str) -> str:
    """How a direction, or a pair, is named in a configuration."""
    return f"{source}->{target}"


@dataclass(frozen=True)
class RefinerConfig:
    """Everything about a refiner that is not a tensor; JSON-able, and saved as `config.json`.

    Attributes:
        pairs: Ordered (source, target) pairs; each also brings its reverse.
        dims: Embedding dimension of each modality.
        ranks: Coordinates that are diffused, of each modality.
        width: Of the denoisers.
        depth: Residual blocks of the denoisers.
        dropout: Of the denoisers, in training.
        prediction: What the denoisers' outputs stand for.
        schedule: Noise schedule.
        start: Where `refine` starts by default.
        strength: How far back that start is noised by default.
        num_steps: Sampler steps by default.
        sampler: Sampler by default.
        blend: Share of the centred source in the posterior-mean start, where dimensions allow it. None: 0 where the
            mean is a kernel regression around the centred source, which holds its share already, and 0.3 elsewhere.
        restore: Fitted factor of each direction, "source->target", that gives the start the target's variance.
        fusion: Fitted weights of each pair's score components.
        fusion_prior: What `calibrate` holds the weights to: those fitted out of fold on the training rows, or nothing.
        fusion_queries: How many training queries stand behind them.
        bridges: What the bridges are, by name.
        encoder: Fingerprint of the encoder whose space this is, if known; of a refiner between the spaces of two
            encoders (video of one, audio of another) both, joined by " + ".
        typical: Fitted scale of each modality's distances from the training rows; see `novelty.py`.
        frames: T of sequences `(B, T, D)` that are refined as wholes; 0 for embeddings `(B, D)`.
    """

    pairs: tuple[Direction, ...]
    dims: dict[str, int]
    ranks: dict[str, int]
    width: int = 512
    depth: int = 3
    dropout: float = 0.1
    prediction: Prediction = "x0"
    schedule: ScheduleName = "cosine"
    start: Start = "posterior_mean"
    strength: float = 0.2
    num_steps: int = 10
    sampler: Sampler = "dpmpp_2m"
    blend: float | None = None
    restore: dict[str, float] = field(default_factory=dict)
    fusion: dict[str, dict[str, float]] = field(default_factory=dict)
    fusion_prior: dict[str, dict[str, float]] = field(default_factory=dict)
    fusion_queries: dict[str, float] = field(default_factory=dict)
    bridges: dict[str, dict[str, Any]] = field(default_factory=dict)
    encoder: str | None = None
    typical: dict[str, list[float]] = field(default_factory=dict)
    frames: int = 0

    def __post_init__(self) -> None:
        """Check every value, because a configuration may come from somebody else's file.

        Raises:
            ValueError: a value of another type or out of range, or pairs, dimensions and ranks that do not fit.
        """
        check_values(self)
        object.__setattr__(self, "pairs", tuple((str(s), str(t)) for s, t in self.pairs))
        if not self.pairs:
            raise ValueError("pairs: got none, expected at least one [source, target], e.g. [[text, audio]]")
        for pair in self.pairs:
            unknown = [m for m in pair if m not in self.dims]
            if unknown or pair[0] == pair[1]:
                raise ValueError(f"pairs: got {list(pair)}, expected two different ones of {', '.join(self.dims)}")
        if len({frozenset(p) for p in self.pairs}) < len(self.pairs):
            raise ValueError(f"pairs: got {[list(p) for p in self.pairs]}; a pair brings its reverse, name it once")
        for name, allowed in (("start", Start), ("sampler", Sampler)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(get_args(allowed))}")

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Each pair followed by its reverse."""
        return tuple(d for s, t in self.pairs for d in ((s, t), (t, s)))
