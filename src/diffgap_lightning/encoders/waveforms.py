"""What CLAP models take of a waveform, chosen the same way every time.

A model hears n samples (10 s). Its authors repeat what is shorter until less than one repetition is missing, fill with
zeros, and cut what is longer at a *random* place, so that two calls differ. Here long audio is cut where `data.windows`
cuts it, and an embedding is either that of the first window or the normalised mean over all windows.

Models with feature fusion hear the whole recording at once: its log-mel spectrogram shrunk to n samples, and three
pieces of n samples of it, one in the middle of each third of all places (the authors draw the place at random).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffgap_lightning.data.windows import cut_windows
from diffgap_lightning.encoders.base import unit
from diffgap_lightning.encoders.precision import without_autocast

LongAudio = Literal["mean", "first"]


@dataclass(frozen=True)
class FitWaveform:
    """A waveform as a model takes it; for data-loading workers. Applied twice it changes nothing.

    Args:
        samples: n, that the model hears.
        sample_rate: In Hz.
        long_audio: `"mean"`, `"first"`, or `"whole"` for models with feature fusion.
    """

    samples: int
    sample_rate: int
    long_audio: Literal["mean", "first", "whole"]

    def __call__(self, waveform: Tensor) -> Tensor:
        """`(T,)` -> `(n,)`; `(W, 1, n)` for a recording of several windows; `(T,)` if it stays whole.

        Raises:
            ValueError: not one channel of samples.
        """
        if waveform.ndim == 3 and waveform.shape[1:] == (1, self.samples):
            return waveform
        if waveform.ndim != 1 or len(waveform) == 0:
            raise ValueError(f"waveform: got shape {tuple(waveform.shape)}, expected (T,), mono, with T > 0")
        if len(waveform) <= self.samples:
            return repeat_pad(waveform, self.samples)
        if self.long_audio == "whole":
            return waveform
        if self.long_audio == "first":
            return waveform[: self.samples]
        cuts = cut_windows(len(waveform) / self.sample_rate, self.samples / self.sample_rate)
        starts = [round(start * self.sample_rate) for start, _ in cuts]
        windows = [repeat_pad(waveform[start : start + self.samples], self.samples) for start in starts]
        return torch.stack(windows)[:, None] if len(windows) > 1 else windows[0]


def repeat_pad(waveform: Tensor, samples: int) -> Tensor:
    """Repeat `(T,)`, T <= n, as often as it fits, then fill with zeros: `(n,)`."""
    repeated = waveform.repeat(samples // len(waveform))
    return torch.nn.functional.pad(repeated, (0, samples - len(repeated)))


def item_means(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """`(sum(counts), D)` unit rows -> `(B, D)`: the normalised mean of each item's rows."""
    if all(count == 1 for count in counts):
        return unit(rows)
    return unit(torch.stack([part.mean(dim=0) for part in unit(rows).split(list(counts))]))


def log_mel(waveforms: Tensor, filters: Tensor, n_fft: int, hop: int) -> Tensor:
    """`(N, T)` -> `(N, frames, mel)` in dB, `10 log10(max(1e-10, |STFT|^2 filters))`, in float32.

    Args:
        waveforms: At the model's sample rate.
        filters: `(n_fft / 2 + 1, mel)`.
        n_fft: Samples of the periodic Hann window.
        hop: Samples from frame to frame.
    """
    x = waveforms.float()
    with without_autocast(x.device):
        window = torch.hann_window(n_fft, device=x.device)
        spectrum = torch.stft(x, n_fft, hop, window=window, center=True, pad_mode="reflect", return_complex=True)
        power = spectrum.abs().square().transpose(1, 2) @ filters.to(x)
        return 10 * power.clamp_min(1e-10).log10()


def fused_mel(mel: Tensor, frames: int) -> tuple[Tensor, bool]:
    """`(F, mel)` -> `(4, frames, mel)` and whether the recording is longer than the model hears.

    Args:
        mel: Of the whole recording.
        frames: That the model hears.
    """
    if len(mel) <= frames:
        return mel.expand(4, *mel.shape), False
    places = torch.arange(len(mel) - frames + 1).tensor_split(3)
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in places]
    shrunk = torch.nn.functional.interpolate(
        mel[None, None], size=[frames, mel.shape[1]], mode="bilinear", align_corners=False
    )[0, 0]
    return torch.stack([shrunk, *(mel[start : start + frames] for start in starts)]), True
