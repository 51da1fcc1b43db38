"""Spectrograms as PNG pictures that can be compared: the same axes and the same colours for the same level.

Power in 128 mel bands (m = 2595 log10(1 + f / 700)) in dB below the loudest point of all waveforms that are drawn
together, from -80 dB (black) to 0 dB.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.data.media import need

BANDS, RANGE_DB = 128, 80.0
_COLUMNS = 640
_TICKS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # kHz


def mel_power(waveform: Tensor, sample_rate: int) -> Tensor:
    """`(T,)` -> `(BANDS, frames)` power, with about as many frames as a picture has columns."""
    size = 2 ** math.ceil(math.log2(0.04 * sample_rate))
    hop = max(size // 8, math.ceil(len(waveform) / _COLUMNS))
    window = torch.hann_window(size)
    padded = torch.nn.functional.pad(waveform.float(), (size // 2, size // 2))
    power = torch.stft(padded, size, hop, window=window, center=False, return_complex=True).abs().square()
    functional: Any = need("torchaudio.functional")
    bands = functional.melscale_fbanks(size // 2 + 1, 0.0, sample_rate / 2, BANDS, sample_rate)
    return bands.T @ power


def spectrogram_pngs(waveforms: Sequence[Tensor], sample_rate: int) -> list[bytes]:
    """One PNG for each waveform `(T,)`, on a common scale of level and time."""
    powers = [mel_power(waveform, sample_rate) for waveform in waveforms]
    loudest = max(max(float(power.max()) for power in powers), 1e-12)
    seconds = max(len(waveform) for waveform in waveforms) / sample_rate
    pictures = []
    for waveform, power in zip(waveforms, powers, strict=True):
        level = 10 * torch.log10(power / loudest + 10 ** (-RANGE_DB / 10))
        pictures.append(_draw(level, len(waveform) / sample_rate, seconds, sample_rate))
    return pictures


def _draw(level: Tensor, length: float, seconds: float, sample_rate: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.3), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    axes.imshow(
        level.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-RANGE_DB, vmax=0,
        extent=(0, length, 0, _mel(sample_rate / 2)), interpolation="nearest",
    )  # fmt: skip
    axes.set_facecolor("black")
    axes.set_xlim(0, seconds)
    ticks = [khz for khz in _TICKS if khz * 1000 <= sample_rate / 2]
    axes.set_yticks([_mel(1000 * khz) for khz in ticks], [f"{khz:g}" for khz in ticks])
    axes.set_ylabel("kHz", fontsize=11)
    axes.set_xlabel("s", fontsize=11, labelpad=0)
    axes.tick_params(labelsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=125)
    return stream.getvalue()


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)
