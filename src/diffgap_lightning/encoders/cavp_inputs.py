"""What CAVP's towers take of audio and video, as Diff-Foley prepares it.

Audio at 16 kHz becomes 128 mel bands, 64 columns a second:

    S = clip((20 log10(max(1e-5, M |STFT(x)|)) + 80) / 100, 0, 1)

with a periodic Hann window of 1024 samples every 250, centred on its column and mirrored at the ends, and M Slaney's
mel filters from 125 to 7600 Hz, each of unit area. The last sample is left out, so that 4 s are 256 columns and not
257. (Diff-Foley's published `wav2spec.py` says 256 samples, its training code 250: only 250 gives 16 columns to a video
frame at 4 a second, and the 640 columns in 10 s that both speak of.)

Video frames are resized to 224 x 224 whatever their shape was, bilinear with antialiasing, and scaled to [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.encoders.cavp_audio import MEL_BANDS, TIME_REDUCTION
from diffgap_lightning.encoders.optional import need

SAMPLE_RATE = 16000
HOP = 250
FRAME = 224
_N_FFT = 1024
_LOWEST, _HIGHEST = 125.0, 7600.0  # Hz


@lru_cache(maxsize=1)
def mel_filters() -> Tensor:
    """M, `(513, 128)`."""
    functional: Any = need("torchaudio.functional", "cavp")
    return functional.melscale_fbanks(
        _N_FFT // 2 + 1, _LOWEST, _HIGHEST, MEL_BANDS, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )


def mel_spectrogram(waveform: Tensor, hop_length: int = HOP) -> Tensor:
    """S of a whole waveform.

    Args:
        waveform: `(N,)` at 16 kHz, N > 512.
        hop_length: Samples from column to column.

    Returns:
        `(128, 1 + N // hop_length)` float32 in [0, 1].
    """
    x = (waveform.cpu() if waveform.device.type == "mps" else waveform).double()
    with torch.autocast(x.device.type, enabled=False):
        window = torch.hann_window(_N_FFT, dtype=x.dtype, device=x.device)
        spectrum = torch.stft(x, _N_FFT, hop_length, window=window, pad_mode="reflect", return_complex=True).abs()
        mel = mel_filters().to(x).T @ spectrum
        return ((20 * mel.clamp_min(1e-5).log10() + 80) / 100).clamp(0, 1).float().to(waveform.device)


@dataclass(frozen=True)
class MelTransform:
    """A waveform as the audio tower takes it; for data-loading workers. Applied twice it changes nothing."""

    def __call__(self, item: Tensor) -> Tensor:
        """`(N,)` at 16 kHz -> `(128, L)`, L = ceil(N / 250); what is shorter than 0.25 s is filled with silence.

        Raises:
            ValueError: neither a waveform nor a spectrogram.
        """
        if item.ndim == 2 and item.shape[0] == MEL_BANDS and item.shape[1] >= TIME_REDUCTION:
            return item
        if item.ndim != 1 or len(item) == 0 or not item.is_floating_point():
            raise ValueError(f"audio: got {item.dtype} {tuple(item.shape)}, expected float (N,), mono at 16 kHz, N > 0")
        missing = max(0, TIME_REDUCTION * HOP - len(item))
        return mel_spectrogram(torch.nn.functional.pad(item, (0, missing))[:-1])


@dataclass(frozen=True)
class FrameTransform:
    """Frames as the video tower takes them, still in 8 bits; for data-loading workers. Twice it changes nothing."""

    def __call__(self, frames: Tensor) -> Tensor:
        """`(T, 3, H, W)` uint8 -> `(T, 3, 224, 224)` uint8.

        Raises:
            ValueError: not 8-bit RGB frames.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
            raise ValueError(f"video: got {frames.dtype} {tuple(frames.shape)}, expected uint8 RGB (T, 3, H, W)")
        if frames.shape[-2:] == (FRAME, FRAME):
            return frames
        on_cpu = frames.device.type == "cpu"  # where 8 bits are resized as such, as fast as they are by Pillow-SIMD
        x = torch.nn.functional.interpolate(
            frames if on_cpu else frames.float(), (FRAME, FRAME), mode="bilinear", antialias=True, align_corners=False
        )
        return x if on_cpu else x.round().clamp(0, 255).to(torch.uint8)
