"""VGGish (Hershey et al. 2017): 128 features of every 0.96 s, the rows of the Frechet audio distance.

Kilgour et al. 2019 and the field after them: 16 kHz mono, magnitudes of a 25 ms Hann window every 10 ms, 64 mel bands
(HTK, triangles in mel) from 125 to 7500 Hz, log(x + 0.01), patches of 96 frames without overlap; the last layer without
its activation, without PCA and quantisation. A rest shorter than a patch is dropped.

Checkpoint: the PyTorch port's `vggish-10086976.pth` (github.com/harritaylor/torchvggish, release v0.1; the file of
github.com/w-hc/torch_audioset has the same keys). Why no package: torchvggish, frechet-audio-distance and fadtk build
the network through a download, unpickle without restriction and resample with a package of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffgap_lightning.encoders.weights import read_weights
from diffgap_lightning.evaluation.classifier_weights import file_sha256, fill, need_key
from diffgap_lightning.evaluation.features import FeatureExtractor, Features

SAMPLE_RATE = 16000
WINDOW, HOP, FFT = 400, 160, 512
BANDS, PATCH = 64, 96
_BATCH = 64  # patches at a time
_CONV = (0, 3, 6, 8, 11, 13)  # places of the convolutions in `features`
_POOL_AFTER = (0, 1, 3, 5)  # which of them are followed by pooling


class VGGish(FeatureExtractor):
    """The network with its spectrogram.

    Args:
        channels: Of the six convolutions.
        hidden: Width of the two hidden layers.
        dim: D.

    Example:
        >>> extractor = VGGish(channels=(4, 4, 8, 8, 8, 8), hidden=16).eval()
        >>> extractor([torch.zeros(32000)]).rows.shape  # 2 s
        torch.Size([2, 128])
    """

    sample_rate = SAMPLE_RATE
    min_seconds = (WINDOW + (PATCH - 1) * HOP) / SAMPLE_RATE
    frechet = "fad"
    mel: Tensor
    window: Tensor

    def __init__(
        self, channels: Sequence[int] = (64, 128, 256, 256, 512, 512), hidden: int = 4096, dim: int = 128
    ) -> None:
        super().__init__()
        self.name, self.dim = "vggish (random)", dim
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((1, *channels[:-1]), channels, strict=True)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i in _POOL_AFTER else []
        self.features = nn.Sequential(*layers)
        flat = channels[-1] * (PATCH // 16) * (BANDS // 16)
        self.embeddings = nn.Sequential(
            nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
        )
        self.register_buffer("mel", mel_matrix(), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW, dtype=torch.float64), persistent=False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> VGGish:
        """Load a local checkpoint.

        Raises:
            FileNotFoundError, ValueError: no such file, or not one of VGGish.
        """
        state = read_weights(Path(path))
        channels = [need_key(state, f"features.{i}.weight", 4, path, cls.__name__).shape[0] for i in _CONV]
        last = need_key(state, "embeddings.4.weight", 2, path, cls.__name__)
        network = cls(channels, hidden=last.shape[1], dim=last.shape[0])
        fill(network, state, path, ignore=("classifier.", "pproc."))
        network.name, network.sha256 = f"vggish ({Path(path).name})", file_sha256(path)
        return network.eval()

    @torch.no_grad()
    def forward(self, waveforms: Sequence[Tensor]) -> Features:
        """See `FeatureExtractor.forward`: one row for each patch of 0.96 s."""
        patches = [self.patches(w.to(self.device)) for w in waveforms]
        rows = [self.network(part).float().cpu() for part in torch.cat(patches).split(_BATCH)]
        return Features(torch.cat(rows), [len(p) for p in patches])

    def patches(self, waveform: Tensor) -> Tensor:
        """`(T,)` samples to `(n, 96, 64)` log-mel patches.

        Raises:
            ValueError: shorter than one patch.
        """
        if len(waveform) < self.min_seconds * SAMPLE_RATE:
            raise ValueError(f"{len(waveform)} samples at 16 kHz, expected at least {self.min_seconds:g} s")
        frames = waveform.to(self.window.dtype).unfold(0, WINDOW, HOP)
        magnitude = torch.fft.rfft(frames * self.window, n=FFT).abs()
        log_mel = torch.log(magnitude @ self.mel + 0.01).float()
        whole = len(log_mel) // PATCH * PATCH
        return log_mel[:whole].reshape(-1, PATCH, BANDS)

    def network(self, patches: Tensor) -> Tensor:
        """`(n, 96, 64)` to `(n, D)`. The features are flattened frame, band, channel, as TensorFlow does."""
        x = self.features(patches[:, None])
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))


def mel_matrix() -> Tensor:
    """`(257, 64)` float64: HTK mel bands whose triangles are linear in mel; the constant component has no weight."""

    def to_mel(hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    bins = to_mel(torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1, dtype=torch.float64))[:, None]
    low, high = (1127.0 * math.log1p(hz / 700.0) for hz in (125.0, 7500.0))
    edges = torch.linspace(low, high, BANDS + 2, dtype=torch.float64)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    matrix = torch.minimum(rising, falling).clamp_min(0)
    matrix[0] = 0
    return matrix
