"""`GenerationSettings`: what decides the sounds of a run, apart from the models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from diffgap_lightning.integrations.candidates import By
from diffgap_lightning.integrations.conditions import RefineOptions


@dataclass(frozen=True)
class GenerationSettings:
    """What decides the sounds, apart from the models.

    Attributes:
        seconds: Length of the sound of a text; None: the generator's own.
        num_steps: The generator's sampler steps; None: its default.
        guidance_scale: The generator's; None: its default.
        negative_prompt: What the generator's unconditional branch hears.
        candidates: Waveforms an item and version, of which the best is kept on top.
        rank_by: The score that decides: `"clap"` or `"refiner"`; videos are always ranked by the refiner's.
        seed: Of all noise.
        refine: How to refine.
        window: Seconds of a long video that are generated at a time; None: the generator's own length.
        crossfade: Seconds over which they are mixed; None: as `VideoToAudioPipeline` does.
    """

    seconds: float | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    candidates: int = 1
    rank_by: By = "clap"
    seed: int = 0
    refine: RefineOptions = field(default_factory=RefineOptions)
    window: float | None = None
    crossfade: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the models."""
        if self.candidates < 1:
            raise ValueError(f"candidates: got {self.candidates}, expected at least 1")
        if self.rank_by not in get_args(By):
            raise ValueError(f"rank_by: got {self.rank_by!r}, expected one of {', '.join(get_args(By))}")
        if self.seconds is not None and not 0 < self.seconds <= 3600:
            raise ValueError(f"seconds: got {self.seconds}, expected more than 0 and at most 3600")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps: got {self.num_steps}, expected at least 1")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, expected a finite number")
        if self.window is not None and not 0 < self.window < math.inf:
            raise ValueError(f"window: got {self.window} s, expected more than 0")
        if self.crossfade is not None and not 0 <= self.crossfade < math.inf:
            raise ValueError(f"crossfade: got {self.crossfade} s, expected at least 0")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
