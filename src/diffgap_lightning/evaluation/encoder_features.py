"""A contrastive encoder's audio embeddings as features: CLAP score, and FD and KAD in the encoder's own space."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffgap_lightning.encoders.base import ContrastiveEncoder
from diffgap_lightning.evaluation.features import FeatureExtractor, Features

_BATCH = 32


class EncoderFeatures(FeatureExtractor):
    """Wraps an encoder of audio.

    Args:
        encoder: Embeds audio; text too for the CLAP score.

    Raises:
        ValueError: it does not embed audio.
    """

    def __init__(self, encoder: ContrastiveEncoder) -> None:
        super().__init__()
        if "audio" not in encoder.modalities or not encoder.sample_rate:
            raise ValueError(
                f"{type(encoder).__name__} embeds {', '.join(encoder.modalities) or 'nothing'}; the generation metrics "
                "need an encoder of audio"
            )
        self.encoder = encoder.eval()
        self.name, self.dim, self.sample_rate = encoder.fingerprint, encoder.dim, encoder.sample_rate
        self.knows_text = "text" in encoder.modalities
        self.sha256 = hashlib.sha256(encoder.fingerprint.encode()).hexdigest()

    @torch.no_grad()
    def forward(self, waveforms: Sequence[Tensor]) -> Features:
        """See `FeatureExtractor.forward`: one unit row a clip."""
        transform = self.encoder.transform("audio")
        items = [waveform if transform is None else transform(waveform) for waveform in waveforms]
        parts = [self.encoder.embed_audio(items[k : k + _BATCH]).cpu() for k in range(0, len(items), _BATCH)]
        return Features(torch.cat(parts), [1] * len(items))

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """See `FeatureExtractor.embed_captions`."""
        parts = [self.encoder.embed_text(captions[k : k + _BATCH]).cpu() for k in range(0, len(captions), _BATCH)]
        return torch.cat(parts)
