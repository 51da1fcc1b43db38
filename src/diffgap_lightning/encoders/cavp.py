"""`CavpEncoder`: Diff-Foley's contrastive audio-visual space, for video and audio at 4 steps a second.

    pooled      cut into windows of 4 s (16 frames, 256 spectrogram columns); the maximum over a window's steps,
                normalised; of several windows, the normalised mean. A rest of at least 2 s is a window of its own.
    sequence    every step normalised, in passes of 10 s (40 frames, 640 columns), which is how Diff-Foley conditions

A clip of 4 s is thus embedded exactly as the reference embeds it. The weights are those of Diff-Foley's stage 1
(`cavp_epoch66.ckpt`); the inputs are described in `cavp_inputs`, the network in `cavp_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffgap_lightning.data.windows import cut_windows
from diffgap_lightning.encoders.base import ContrastiveEncoder, Transform, unit
from diffgap_lightning.encoders.cavp_audio import TIME_REDUCTION
from diffgap_lightning.encoders.cavp_inputs import SAMPLE_RATE, FrameTransform, MelTransform, mel_filters
from diffgap_lightning.encoders.cavp_model import DIM, POOL, WIDTH, model_from_weights, random_model
from diffgap_lightning.encoders.waveforms import item_means
from diffgap_lightning.encoders.weights import read_weights, weights_digest

FPS = 4.0
_PASS = 40  # steps of a sequence that the network sees at once
_BATCH = 8  # windows at once: 1 GB of activations
_BEFORE_THE_MIDDLE = 0.484  # ffmpeg's filter `fps` takes the last frame before the middle of the interval
_PREPROCESSING = 1  # raise whenever the same input would give other embeddings


class CavpEncoder(ContrastiveEncoder):
    """Diff-Foley's CAVP.

    Args:
        checkpoint: Its `cavp_epoch66.ckpt`, or the same weights in a `.safetensors` file. None draws random weights,
            for tests and dry runs.
        seed: Of random weights.
        width: Channels of the first layers, of random weights; 64 is the released model's, 4 runs 50 times faster.
        dim: D, of random weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file with other tensors than CAVP's; the first ones are named.
        ImportError: the extra `cavp` is not installed.
    """

    modalities = ("audio", "video")
    sequence_modalities = ("audio", "video")
    sample_rate = SAMPLE_RATE
    fps = FPS
    window = POOL / FPS
    frame_phase = _BEFORE_THE_MIDDLE

    def __init__(self, checkpoint: str | None, seed: int = 0, width: int = WIDTH, dim: int = DIM) -> None:
        super().__init__()
        mel_filters()  # says at once if the extra is missing
        if checkpoint is None:
            for name, value in (("width", width), ("dim", dim)):
                if value < 1:
                    raise ValueError(f"{name}: got {value}, expected a positive number")
            self.model = random_model(seed, dim, width)
            self._weights = f"random-seed{seed}-width{width}-dim{dim}"
        else:
            path = Path(checkpoint).expanduser()
            self.model = model_from_weights(read_weights(path), str(path))
            self._weights = f"sha256:{weights_digest(self.model.state_dict())[:16]}"
        self.dim = self.model.dim
        self.eval().requires_grad_(False)

    @property
    def fingerprint(self) -> str:
        """Digest of the weights, or the seed that drew them; version of the preprocessing."""
        return f"cavp/{self._weights}/v{_PREPROCESSING}"

    def transform(self, modality: str) -> Transform | None:
        """Waveform to log-mel spectrogram; frames to 224 x 224."""
        return _prepare(modality) if modality in self.modalities else None

    @torch.no_grad()
    def encode_video(self, video: Tensor, normalize: bool = False, pool: bool = True) -> Tensor:
        """`CavpModel.encode_video`, the reference's own function: `(B, T, 3, H, W)` in [0, 1], any size."""
        return self.model.encode_video(video, normalize, pool)

    @torch.no_grad()
    def encode_spec(self, spec: Tensor, normalize: bool = False, pool: bool = True) -> Tensor:
        """`CavpModel.encode_spec`, the reference's own function: `(B, 128, L)` in [0, 1]."""
        return self.model.encode_spec(spec, normalize, pool)

    @torch.no_grad()
    def embed_audio(self, waveforms: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_audio`; spectrograms `(128, L)` are taken too."""
        return self._pooled("audio", waveforms)

    @torch.no_grad()
    def embed_video(self, clips: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_video`."""
        return self._pooled("video", clips)

    @torch.no_grad()
    def embed_sequence(self, modality: str, items: Sequence[Tensor]) -> Tensor:
        """See `ContrastiveEncoder.embed_sequence`: T frames, or a step for each 0.25 s of sound."""
        if modality not in self.sequence_modalities:
            return super().embed_sequence(modality, items)
        inputs = self._inputs(modality, items)
        lengths = sorted({x.shape[-1] if modality == "audio" else len(x) for x in inputs})
        if len(lengths) > 1:
            unit_name = "columns" if modality == "audio" else "frames"
            raise ValueError(f"embed_sequence: got {lengths[0]} to {lengths[-1]} {unit_name}, expected one length")
        pieces = [list(_split(x, modality, _PASS)) for x in inputs]
        steps = self._steps(modality, [piece for own in pieces for piece in own])
        rows = torch.stack(steps) if len(pieces[0]) == 1 else torch.cat(steps).unflatten(0, (len(items), -1))
        return unit(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])

    def _pooled(self, modality: str, items: Sequence[Tensor]) -> Tensor:
        """`(B, D)`: the mean of each item's windows."""
        windows = [_windows(x, modality) for x in self._inputs(modality, items)]
        steps = self._steps(modality, [window for own in windows for window in own])
        return item_means(torch.stack([s.amax(dim=0) for s in steps]), [len(own) for own in windows])

    def _inputs(self, modality: str, items: Sequence[Tensor]) -> list[Tensor]:
        """Items as the network takes them, whether or not the transform has been applied."""
        if len(items) == 0:
            raise ValueError(f"embed {modality}: got nothing, expected at least one item")
        return [_prepare(modality)(item) for item in items]

    def _steps(self, modality: str, pieces: Sequence[Tensor]) -> list[Tensor]:
        """`(T_i, D)` float32 of each piece; pieces of one length go through the network together."""
        device = self.model.logit_scale.device
        found: list[Tensor | None] = [None] * len(pieces)
        for shape in dict.fromkeys(piece.shape for piece in pieces):
            alike = [i for i, piece in enumerate(pieces) if piece.shape == shape]
            for start in range(0, len(alike), _BATCH):
                chosen = alike[start : start + _BATCH]
                x = torch.stack([pieces[i].to(device, non_blocking=True) for i in chosen])
                if modality == "audio":
                    steps = self.model.encode_spec(x, pool=False)
                else:
                    steps = self.model.encode_video(x.float().div_(255), pool=False)
                for i, rows in zip(chosen, steps.float(), strict=True):
                    found[i] = rows
        return [rows for rows in found if rows is not None]


def _prepare(modality: str) -> Transform:
    return MelTransform() if modality == "audio" else FrameTransform()


def _windows(x: Tensor, modality: str) -> list[Tensor]:
    """The windows of frames `(T, 3, H, W)` or of columns `(128, L)` that pooling is over."""
    axis, a_step = (1, TIME_REDUCTION) if modality == "audio" else (0, 1)
    cuts = cut_windows(x.shape[axis] / a_step, float(POOL))
    ends = [(round(start * a_step), round(length * a_step)) for start, length in cuts]
    return [x.narrow(axis, start, length) for start, length in ends]


def _split(x: Tensor, modality: str, steps: int) -> list[Tensor]:
    """Pieces of at most so many steps; of columns, what does not fill a step is left out."""
    if modality == "video":
        return list(x.split(steps))
    return [piece for piece in x.split(steps * TIME_REDUCTION, dim=1) if piece.shape[1] >= TIME_REDUCTION]
