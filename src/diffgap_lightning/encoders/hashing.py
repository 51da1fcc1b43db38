"""`HashingEncoder`: an encoder without learning, for tests and dry runs.

Each modality is described by a fixed function of the signal, and a seeded random projection R takes it to D dimensions:

- audio: mean and standard deviation over time of the log energy in 40 bands spaced evenly on the mel scale
  (m = 2595 log10(1 + f / 700)), 64 ms frames;
- video: mean over frames of a 4 x 4 x 4 colour histogram, and of the change from frame to frame per channel;
- text: signed counts of character 1- to 3-grams, each hashed to one of 4096 rows of R.

Near signals get near vectors within a modality (Johnson & Lindenstrauss 1984). Across modalities nothing is shared, so
retrieval with it is at chance: it proves that a pipeline runs, not that it is any good.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffgap_lightning.encoders.base import ContrastiveEncoder, unit

_BANDS = 40
_FRAME = 0.064  # s
_TEXT_ROWS = 4096
_PREPROCESSING = 1  # raise whenever a function below changes its output


class HashingEncoder(ContrastiveEncoder):
    """Deterministic stand-in for a contrastive encoder.

    Args:
        dim: D, the width of the space.
        sample_rate: In Hz.
        fps: Frames a second.
        seed: Of the random projections.
        window: Preferred length of media in seconds; None takes them whole.

    Raises:
        ValueError: a size that is not positive.
    """

    modalities = ("audio", "text", "video")

    def __init__(
        self, dim: int = 64, sample_rate: int = 16000, fps: float = 4.0, seed: int = 0, window: float | None = 10.0
    ) -> None:
        super().__init__()
        for name, value in {"dim": dim, "sample_rate": sample_rate, "fps": fps, "window": window}.items():
            if value is not None and not value > 0:
                raise ValueError(f"HashingEncoder: {name} is {value}, expected a positive number")
        self.dim, self.sample_rate, self.fps, self.seed, self.window = dim, sample_rate, fps, seed, window
        self.frame_size = 64
        for modality, rows in (("audio", 2 * _BANDS), ("video", 64 + 3), ("text", _TEXT_ROWS)):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{modality}:{seed}".encode()))
            matrix = torch.randn(rows, dim, generator=generator) / math.sqrt(dim)
            self.register_buffer(f"{modality}_projection", matrix, persistent=False)

    @property
    def fingerprint(self) -> str:
        """Everything that decides its output."""
        assert self.fps is not None
        return f"hashing/dim{self.dim}/sr{self.sample_rate}/fps{self.fps:g}/seed{self.seed}/v{_PREPROCESSING}"

    @torch.no_grad()
    def embed_audio(self, waveforms: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_audio`."""
        projection: Tensor = self.get_buffer("audio_projection")
        assert self.sample_rate is not None
        rows = [_band_statistics(w.to(projection.device), self.sample_rate) for w in waveforms]
        return unit(torch.stack(rows) @ projection)

    @torch.no_grad()
    def embed_video(self, clips: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_video`."""
        projection: Tensor = self.get_buffer("video_projection")
        return unit(torch.stack([_colour_statistics(c.to(projection.device)) for c in clips]) @ projection)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """See `ContrastiveEncoder.embed_text`.

        Raises:
            ValueError: an empty text.
        """
        projection: Tensor = self.get_buffer("text_projection")
        rows = []
        for text in texts:
            if not text.strip():
                raise ValueError("HashingEncoder: got an empty text, expected at least one character")
            hashes = torch.tensor(_gram_hashes(text), device=projection.device)
            sign = 1.0 - 2.0 * (hashes >> 31).float()
            rows.append(sign @ projection[hashes % _TEXT_ROWS].float())
        return unit(torch.stack(rows))


def _gram_hashes(text: str) -> list[int]:
    """CRC-32 of every character 1-, 2- and 3-gram of the lower-cased text, its ends marked."""
    marked = f" {text.lower().strip()} "
    return [zlib.crc32(marked[i : i + n].encode()) for n in (1, 2, 3) for i in range(len(marked) - n + 1)]


def _band_statistics(waveform: Tensor, sample_rate: int) -> Tensor:
    """`(T,)` -> `(2 * _BANDS,)`: mean and standard deviation of log band energies over time, in fp32."""
    size = int(_FRAME * sample_rate)
    x = waveform.float()
    x = torch.nn.functional.pad(x, (0, max(0, size - len(x))))
    frames = x.unfold(0, size, size // 2)
    with torch.autocast(x.device.type, enabled=False):
        power = torch.fft.rfft(frames * torch.hann_window(size, device=x.device)).abs().square()
        hz = torch.linspace(0, sample_rate / 2, power.shape[1], device=x.device)
        mel = 2595 * torch.log10(1 + hz / 700)
        band = (mel / mel[-1] * _BANDS).long().clamp(max=_BANDS - 1)
        energy = x.new_zeros(len(frames), _BANDS).index_add_(1, band, power)
        level = torch.log(energy + 1e-6)
        return torch.cat([level.mean(0), level.std(0, correction=0)])


def _colour_statistics(frames: Tensor) -> Tensor:
    """`(T, 3, H, W)` uint8 -> `(64 + 3,)`: mean colour histogram, and mean absolute change between frames."""
    bins = (frames >> 6).long()
    index = (bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]).flatten()
    histogram = torch.bincount(index, minlength=64).float() / max(len(index), 1)
    x = frames.float() / 255
    change = (x[1:] - x[:-1]).abs().mean(dim=(0, 2, 3)) if len(x) > 1 else x.new_zeros(3)
    return torch.cat([histogram, change])
