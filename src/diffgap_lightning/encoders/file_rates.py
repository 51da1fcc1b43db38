"""Does a sound keep its place in the space whatever the sample rate of its file?

The same chirp is decoded from files of other rates, and, for comparison, their samples are taken as they are, as if
they were at the encoder's rate: that is what a rate that nobody handled would give. Cosines are to the chirp at the
encoder's own rate.

Each signal gets noise at -50 dB, the floor of a quiet room. Logarithmic spectrograms put digital silence at -100 dB and
the rounding of a 16-bit file at -75 dB: without a floor, what nobody hears decides most of their bands.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffgap_lightning.encoders.base import ContrastiveEncoder
from diffgap_lightning.encoders.probes import chirp

FILE_RATES = (16000, 44100)
_SECONDS = 3.0
_FLOOR = 10 ** (-50 / 20)


def rate_cosines(encoder: ContrastiveEncoder) -> tuple[Tensor, Tensor]:
    """`(F,)` cosines of files of other rates, decoded, and `(F,)` of the same files misread.

    Raises:
        ImportError: the extra `media` is not installed.
    """
    from diffgap_lightning.data.audio import audio_windows
    from diffgap_lightning.data.media import Media

    own_rate = encoder.sample_rate
    assert own_rate is not None
    rates = [rate for rate in FILE_RATES if rate != own_rate]
    misread = [chirp(_SECONDS, rate) for rate in rates]
    files = [Media(_wav(sound, rate), "wav") for sound, rate in zip(misread, rates, strict=True)]
    decoded = [next(audio_windows(file, own_rate))[1] for file in files]
    own = _rows(encoder, [chirp(_SECONDS, own_rate)])[0]
    return _rows(encoder, decoded) @ own, _rows(encoder, misread) @ own


def _rows(encoder: ContrastiveEncoder, waveforms: Sequence[Tensor]) -> Tensor:
    transform = encoder.transform("audio")
    sounds = [w + _FLOOR * torch.randn(len(w), generator=torch.Generator().manual_seed(0)) for w in waveforms]
    return encoder.embed_audio([sound if transform is None else transform(sound) for sound in sounds])


def _wav(waveform: Tensor, rate: int) -> bytes:
    """A 16-bit file in memory."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((waveform.numpy() * 32767).astype(np.int16).tobytes())
    return buffer.getvalue()
