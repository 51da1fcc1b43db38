"""PANNs Cnn14 (Kong et al. 2020): 2048 features and 527 AudioSet classes of a clip, for FD, KL and the inception score.

Mono at 32 kHz (or 16, 8 kHz: the checkpoint's own rate), power spectrogram of a periodic Hann window of 32 ms every
10 ms, 64 mel bands, dB with floor 1e-10, six pairs of convolutions, maximum plus mean over time. As audioldm_eval does,
from whose conventions the published FD, KL and IS of text-to-audio come: the mean of the waveform is removed and a clip
of fewer than 32000 samples is padded with zeros. It takes the first channel, we average channels.

Checkpoints: `Cnn14_mAP=0.431.pth` (32 kHz), `Cnn14_16k_mAP=0.438.pth` (16 kHz, what AudioLDM reports), `Cnn14_8k_...`
(zenodo.org/records/3987831); the mel bands are in the file. Why no package: panns-inference and audioldm_eval run wget
when they are imported or built, and unpickle without restriction.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, relu

from diffgap_lightning.data.media import need
from diffgap_lightning.encoders.weights import read_weights
from diffgap_lightning.evaluation.classifier_weights import file_sha256, fill, need_key
from diffgap_lightning.evaluation.features import FeatureExtractor, Features

MIN_SAMPLES = 32000
BANDS = 64
_RATES = {129: 8000, 257: 16000, 513: 32000}  # bins of the spectrogram -> Hz
_TOP = {8000: 4000.0, 16000: 8000.0, 32000: 14000.0}  # upper edge of the mel bands, Hz
_FLOOR = 1e-10
_BATCH = 16  # clips of equal length at a time


class PannsCnn14(FeatureExtractor):
    """The network with its spectrogram.

    Args:
        sample_rate: 32000, 16000 or 8000 Hz.
        channels: Of the six pairs of convolutions.
        classes: C.

    Example:
        >>> extractor = PannsCnn14(16000, channels=(4, 4, 4, 8, 8, 16)).eval()
        >>> features = extractor([torch.zeros(48000)])  # 3 s
        >>> features.rows.shape, features.logits.shape
        (torch.Size([1, 16]), torch.Size([1, 527]))
    """

    window: Tensor

    def __init__(
        self,
        sample_rate: int = 32000,
        channels: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
        classes: int = 527,
    ) -> None:
        super().__init__()
        if sample_rate not in _TOP:
            raise ValueError(f"sample_rate: got {sample_rate}, Cnn14 exists for {', '.join(map(str, _TOP))} Hz")
        self.name, self.sample_rate, self.dim = "panns-cnn14 (random)", sample_rate, channels[-1]
        self.logmel_extractor = _MelBands(sample_rate)
        self.bn0 = nn.BatchNorm2d(BANDS)
        for i, (before, after) in enumerate(zip((1, *channels[:-1]), channels, strict=True), 1):
            self.add_module(f"conv_block{i}", _ConvBlock(before, after))
        self.fc1 = nn.Linear(channels[-1], channels[-1])
        self.fc_audioset = nn.Linear(channels[-1], classes)
        self.register_buffer("window", torch.hann_window(sample_rate * 32 // 1000), persistent=False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> PannsCnn14:
        """Load a local checkpoint; its sample rate is seen from the shape of its mel bands.

        Raises:
            FileNotFoundError, ValueError: no such file, or not one of Cnn14.
        """
        state = read_weights(Path(path))
        bands = need_key(state, "logmel_extractor.melW", 2, path, cls.__name__)
        if bands.shape[0] not in _RATES:
            raise ValueError(f"{path}: mel bands of shape {tuple(bands.shape)}, expected 129, 257 or 513 rows")
        keys = [f"conv_block{i}.conv2.weight" for i in range(1, 7)]
        channels = [need_key(state, key, 4, path, cls.__name__).shape[0] for key in keys]
        classes = need_key(state, "fc_audioset.weight", 2, path, cls.__name__).shape[0]
        network = cls(_RATES[bands.shape[0]], channels, classes)
        fill(network, state, path, ignore=("spectrogram_extractor.",))  # a Fourier matrix, which torch.stft knows
        network.name, network.sha256 = f"panns-cnn14 ({Path(path).name})", file_sha256(path)
        return network.eval()

    @torch.no_grad()
    def forward(self, waveforms: Sequence[Tensor]) -> Features:
        """See `FeatureExtractor.forward`: one row a clip; clips of equal length go through the network together."""
        rows = torch.empty(len(waveforms), self.dim)
        logits = torch.empty(len(waveforms), self.fc_audioset.out_features)
        by_length: dict[int, list[int]] = {}
        for i, waveform in enumerate(waveforms):
            by_length.setdefault(max(len(waveform), MIN_SAMPLES), []).append(i)
        for length, places in by_length.items():
            for k in range(0, len(places), _BATCH):
                part = places[k : k + _BATCH]
                batch = torch.stack([_prepared(waveforms[i], length) for i in part]).to(self.device)
                features, scores = self.network(self.log_mel(batch))
                rows[part], logits[part] = features.float().cpu(), scores.float().cpu()
        return Features(rows, [1] * len(waveforms), logits)

    def log_mel(self, waveforms: Tensor) -> Tensor:
        """`(B, T)` samples to `(B, frames, 64)` decibels."""
        size = len(self.window)
        spectrum = torch.stft(
            waveforms, size, self.sample_rate // 100, window=self.window, pad_mode="reflect", return_complex=True
        )
        power = spectrum.abs().square().transpose(1, 2)
        return 10 * torch.log10((power @ self.logmel_extractor.melW).clamp_min(_FLOOR))

    def network(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, frames, 64)` to features `(B, D)` and logits `(B, C)`."""
        x = self.bn0(log_mel[..., None].transpose(1, 2)).transpose(1, 2)  # normalised band by band
        x = x.permute(0, 3, 1, 2)
        for i in range(1, 7):
            x = self.get_submodule(f"conv_block{i}")(x)
            x = avg_pool2d(x, 2) if i < 6 else x
        x = x.mean(3)
        features = relu(self.fc1(x.amax(2) + x.mean(2)))
        return features, self.fc_audioset(features)


class _MelBands(nn.Module):
    """Holds the mel bands `(bins, 64)` under the checkpoint's key: Slaney's scale and area."""

    melW: Tensor  # noqa: N815

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        bins, top = sample_rate * 16 // 1000 + 1, _TOP[sample_rate]
        with torch.device("cpu"):
            bands = need("torchaudio.functional").melscale_fbanks(
                bins, 50.0, top, BANDS, sample_rate, norm="slaney", mel_scale="slaney"
            )
        self.register_buffer("melW", bands)


class _ConvBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))


def _prepared(waveform: Tensor, length: int) -> Tensor:
    """Mean removed, zeros behind up to `length` samples."""
    x = waveform.float()
    return pad(x - x.mean(), (0, length - len(x)))
