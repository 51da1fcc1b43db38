"""`attach`: a refiner in somebody else's generator, in one line, reversible, touching nothing else.

    with attach(refiner, pipe):
        audio = pipe("a dog barks in the rain").audios

    attached = attach(refiner, model, method="get_learned_conditioning", strength=0.3).attach()
    ...
    attached.detach()

The generator is called as ever. Its *conditional* embedding is refined; the unconditional branch of guidance and the
inputs of any reranking are bit for bit those of the plain generator, and after detaching, by an exception too, every
attribute that was replaced is what it was. The refiner draws its noise from a generator of its own, so the audio
generator's random numbers do not shift.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from diffgap_lightning.integrations import audioldm, diff_foley, diffusers, methods
from diffgap_lightning.integrations.conditioner import Conditioner, Refines
from diffgap_lightning.integrations.seam import Seam, class_names

SUPPORTED = (
    "AudioLDMPipeline, MusicLDMPipeline and AudioLDM2Pipeline of diffusers, LatentDiffusion of audioldm and of "
    'Diff-Foley; for another model name its conditioning method, e.g. method="get_learned_conditioning"'
)
# Conditioned on something else than a contrastive embedding: there is nothing to refine.
_NOT_CONTRASTIVE = {
    "StableAudioPipeline": "T5 sequences",
    "StableAudio3Pipeline": "T5 sequences",
    "Tango": "T5 sequences",
    "TangoFlux": "T5 sequences",
    "AudioDiffusionPipeline": "spectrograms",
    "DanceDiffusionPipeline": "nothing",
}


class Attachment:
    """A refiner and a generator, attached or not; made by `attach`, usable as a context manager.

    Attributes:
        conditioner: What refines.
        seam: Where.
    """

    def __init__(self, conditioner: Conditioner, seam: Seam) -> None:
        self.conditioner, self.seam = conditioner, seam
        self._patch: AbstractContextManager[None] | None = None

    @property
    def attached(self) -> bool:
        """Whether the generator refines now."""
        return self._patch is not None

    def attach(self) -> Attachment:
        """Put the refiner in; its noise begins anew.

        Raises:
            ValueError: it is in already, or another one is.
        """
        if self.attached:
            raise ValueError(f"{self.seam.name}: this refiner is attached already; detach it first")
        self.conditioner.reset()
        patch = self.seam.patch(self.conditioner)
        patch.__enter__()
        self._patch = patch
        return self

    def detach(self) -> None:
        """Leave the generator as it was; without effect if it is not attached."""
        patch, self._patch = self._patch, None
        if patch is not None:
            patch.__exit__(None, None, None)

    def __enter__(self) -> Attachment:
        """`attach()`."""
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`detach()`, whatever happened."""
        self.detach()


def attach(
    refiner: Refines,
    generator: Any,
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
    noise: torch.Generator | None = None,
    encoder: Any = None,
    method: str | None = None,
    refine_input: bool = False,
) -> Attachment:
    """Prepare a refiner for a generator; use the result in a `with` statement or call its `attach()`.

    Args:
        refiner: A `DiffGAPRefiner` in inference mode, any bridge, or another object with `refine`.
        generator: One of those named in `docs/generators.md`.
        source: Modality of the embeddings that the generator makes, or is given.
        target: Modality that it should be conditioned on.
        strength: How far back refining starts; default the refiner's.
        num_samples: Samples for each embedding, whose mean conditions: more are more faithful and less diverse.
        guidance_scale: The refiner's own guidance, not the audio generator's.
        num_steps: The refiner's sampler steps.
        start: The refiner's start.
        per_candidate: False: refine, then tile, so that all waveforms of a prompt share one embedding. True: tile, then
            refine, so that each has a sample of its own.
        per_frame: Refine each frame of a sequence as an embedding of its own.
        seed: Of the refiner's noise, begun anew by each `attach()`.
        noise: Source of the refiner's noise instead of `seed`.
        encoder: Fingerprint of the generator's contrastive encoder, or the encoder (its `fingerprint` is read): a
            refiner that was trained in another space is refused.
        method: Path of the conditioning method of a generator that is not known, or of another seam of one that is.
        refine_input: Refine what that method is given instead of what it returns.

    Raises:
        TypeError: a generator that has no contrastive embedding or is not known.
        ValueError: a refiner of another space, dimension or direction, or options out of range.
    """
    seam = _find(generator) if method is None else methods.find(generator, method, refine_input)
    conditioner = Conditioner(
        refiner, source=source, target=target, strength=strength, num_samples=num_samples,
        guidance_scale=guidance_scale, num_steps=num_steps, start=start, per_candidate=per_candidate,
        per_frame=per_frame, seed=seed, generator=noise,
    )  # fmt: skip
    check_space(conditioner, seam, getattr(encoder, "fingerprint", encoder))
    return Attachment(conditioner, seam)


def _find(generator: Any) -> Seam:
    for adapter in (diffusers, audioldm, diff_foley):
        seam = adapter.find(generator)
        if seam is not None:
            return seam
    kind = type(generator).__name__
    for name in sorted(class_names(generator)):
        other = _NOT_CONTRASTIVE.get(name.split(".")[-1])
        if other is not None:
            raise TypeError(
                f"{kind}: it is conditioned on {other}, not on a contrastive embedding, so there is nothing to refine; "
                f"supported are {SUPPORTED}"
            )
    raise TypeError(f"generator: got {kind}, expected one of {SUPPORTED}")


def check_space(conditioner: Conditioner, seam: Seam, fingerprint: str | None) -> None:
    """Refuse a refiner of another encoder's space, by fingerprint where both are known, by dimension otherwise."""
    trained = conditioner.fingerprint
    if trained is not None and fingerprint is not None and fingerprint not in (trained, *trained.split(" + ")):
        raise ValueError(
            f"refiner: was trained in the space of encoder {trained!r}, but {seam.name} uses {fingerprint!r}; "
            "use a refiner that was trained for this generator's encoder"
        )
    dim = conditioner.dims.get(conditioner.target)
    if dim is not None and seam.dim is not None and dim != seam.dim:
        whose = f" of encoder {trained!r}" if trained else ""
        theirs = f" of {seam.encoder}" if seam.encoder else ""
        raise ValueError(
            f"refiner: gives {dim}-d {conditioner.target} embeddings{whose}, but {seam.name} is conditioned on "
            f"{seam.dim}-d ones{theirs}; use a refiner that was trained for this generator's encoder"
        )
