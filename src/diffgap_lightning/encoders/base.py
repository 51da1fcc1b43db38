"""`ContrastiveEncoder`: what turns media into the unit vectors of one contrastive space.

Everything that needs an encoder (embedding a corpus, attaching a refiner, evaluation) uses only the attributes and
methods below. Work is cut in two, so that the processor and the accelerator run at the same time: `transform(modality)`
gives a small picklable function that data-loading workers apply to one decoded item, and `embed_<modality>` runs the
network on a list of such items. Items of a batch may differ in length: padding or cropping is the encoder's own affair,
and a batch must give the same rows as its items one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

Transform = Callable[[Tensor], Tensor]


class ContrastiveEncoder(nn.Module):
    """Base class of encoders; a subclass sets the attributes and overrides the `embed_*` of its modalities.

    Attributes:
        modalities: Which of `"audio"`, `"text"`, `"video"`, `"image"` it embeds.
        sequence_modalities: Which of them `embed_sequence` embeds frame by frame.
        dim: D, the width of the space.
        sample_rate: Of the mono waveforms that `embed_audio` takes, in Hz; None without audio.
        fps: Frames a second of the video that `embed_video` takes; None without video.
        window: The length of media that it was made for, in seconds; None if any length will do.
        frame_phase: Where in its interval of 1 / fps each frame is taken: 0 at the beginning, 0.5 in the middle.
        frame_size: The shorter side to which frames may be reduced at decoding, in pixels; None keeps the size.
        requires: The package that it is built on and the extra that installs it; None without one.
    """

    modalities: tuple[str, ...] = ()
    sequence_modalities: tuple[str, ...] = ()
    dim: int = 0
    sample_rate: int | None = None
    fps: float | None = None
    window: float | None = None
    frame_phase: float = 0.0
    frame_size: int | None = None
    requires: tuple[str, str] | None = None

    @property
    def fingerprint(self) -> str:
        """Name, checkpoint and preprocessing version: equal exactly where embeddings are interchangeable."""
        raise NotImplementedError(f"{type(self).__name__} does not define fingerprint")

    @property
    def vocabulary(self) -> tuple[int, int] | None:
        """Tokens of the tokenizer, and tokens that the network knows; None without a tokenizer."""
        return None

    def embed_audio(self, waveforms: Sequence[Tensor]) -> Tensor:
        """Embed waveforms.

        Args:
            waveforms: B tensors `(T_i,)`, float32 in [-1, 1], mono at `sample_rate`, after `transform("audio")`.

        Returns:
            `(B, D)` float32, unit norm.
        """
        self._refuse("audio")

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts: `(B, D)` float32, unit norm."""
        self._refuse("text")

    def embed_video(self, clips: Sequence[Tensor]) -> Tensor:
        """Embed videos.

        Args:
            clips: B tensors `(T_i, 3, H_i, W_i)`, uint8 RGB at `fps` frames a second, after `transform("video")`.

        Returns:
            `(B, D)` float32, unit norm.
        """
        self._refuse("video")

    def embed_image(self, images: Sequence[Tensor]) -> Tensor:
        """Embed B images `(3, H_i, W_i)`, uint8 RGB, after `transform("image")`: `(B, D)` float32, unit norm."""
        self._refuse("image")

    def embed_sequence(self, modality: str, items: Sequence[Tensor]) -> Tensor:
        """Embed items frame by frame.

        Args:
            modality: One of `sequence_modalities`.
            items: As `embed_<modality>` takes them, all of one length.

        Returns:
            `(B, T, D)` float32, each frame of unit norm.

        Raises:
            ValueError: the encoder has no such sequences, or the items differ in length.
        """
        raise ValueError(
            f"{type(self).__name__} gives sequences of {', '.join(self.sequence_modalities) or 'nothing'}, got "
            f"{modality}; choose another encoder or the pooled embedding"
        )

    def transform(self, modality: str) -> Transform | None:
        """What a data-loading worker applies to one decoded item; None for nothing. It must pickle, without weights."""
        return None

    def embed(self, modality: str, items: Sequence[Tensor] | Sequence[str]) -> Tensor:
        """Embed items of a modality by its name.

        Raises:
            ValueError: the encoder has no such modality.
        """
        method = getattr(self, f"embed_{modality}", None)
        if modality not in self.modalities or method is None:
            self._refuse(modality)
        return method(items)

    def _refuse(self, modality: str) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} embeds {', '.join(self.modalities) or 'nothing'}, got {modality}; "
            "choose another encoder or other modalities"
        )


def unit(x: Tensor) -> Tensor:
    """`(B, D)` rows in float32 at unit norm; zero and non-finite rows stay as they are, for the caller to refuse."""
    x = x.float()
    norm = x.norm(dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))
