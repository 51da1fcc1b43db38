"""CAVP, the contrastive audio-visual pretraining model of Diff-Foley (Luo et al. 2023), as its checkpoint names it.

    video (B, T, 3, H, W) -> SlowOnly -> linear -> (B, T, D)
    spectrogram (B, 128, L) -> CNN14 -> (B, L // 16, D)

Both are sequences at 4 steps a second. Pooled, they are the maximum over windows of 16 steps, normalised after pooling.
`encode_video` and `encode_spec` have the arguments, defaults and results of the reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffgap_lightning.encoders.cavp_audio import MEL_BANDS, TIME_REDUCTION, Cnn14
from diffgap_lightning.encoders.cavp_video import SlowOnly

POOL = 16  # steps in a window
DIM = 512
WIDTH = 64
_ANCHOR = "video_encoder.conv1.conv.weight"
_COUNTER = "num_batches_tracked"


class CavpModel(nn.Module):
    """Two towers into one space.

    Args:
        dim: D of the space.
        width: w of both towers; the released model has 64.
    """

    def __init__(self, dim: int = DIM, width: int = WIDTH) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.video_encoder = SlowOnly(width)
        self.video_project_head = nn.Linear(self.video_encoder.features, dim)
        self.spec_encoder = Cnn14(dim, width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_video(self, video: Tensor, normalize: bool = False, pool: bool = True) -> Tensor:
        """Embed videos.

        Args:
            video: `(B, T, 3, H, W)` float RGB in [0, 1], 4 frames a second, 224 x 224 in training.
            normalize: To unit norm over the last dimension.
            pool: Maximum over each whole window of 16 frames; what is left over is dropped.

        Returns:
            `(B, T, D)`, or `(B, D)` pooled. As in the reference, n > 1 pooled windows come as `(B, D, n)` and are
            normalised over n; `CavpEncoder.embed_video` gives one unit vector for any length.

        Raises:
            ValueError: another shape or dtype, or pooling of fewer than 16 frames.
        """
        if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
            raise ValueError(f"video: got {_described(video)}, expected (B, T, 3, H, W) floats in [0, 1]")
        features = self.video_encoder(video.transpose(1, 2)).transpose(1, 2)
        return _finish(self.video_project_head(features), normalize, pool)

    def encode_spec(self, spec: Tensor, normalize: bool = False, pool: bool = True) -> Tensor:
        """Embed log-mel spectrograms.

        Args:
            spec: `(B, 128, L)` in [0, 1], 64 columns a second (see `cavp_inputs`).
            normalize: To unit norm over the last dimension.
            pool: Maximum over each whole window of 16 steps, that is 256 columns.

        Returns:
            `(B, L // 16, D)`, or pooled as `encode_video`.

        Raises:
            ValueError: another shape, fewer than 16 columns, or pooling of fewer than 16 steps.
        """
        if spec.ndim != 3 or spec.shape[1] != MEL_BANDS or not spec.is_floating_point():
            raise ValueError(f"spec: got {_described(spec)}, expected (B, {MEL_BANDS}, L) floats in [0, 1]")
        if spec.shape[2] < TIME_REDUCTION:
            raise ValueError(f"spec: got {spec.shape[2]} columns, expected at least {TIME_REDUCTION} (0.25 s)")
        return _finish(self.spec_encoder(spec.transpose(1, 2)), normalize, pool)

    def forward(self, video: Tensor, spec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled unit vectors `(B, D)` of both, and the factor of their similarities."""
        return self.encode_video(video, normalize=True), self.encode_spec(spec, normalize=True), self.logit_scale.exp()


def _finish(features: Tensor, normalize: bool, pool: bool) -> Tensor:
    """Pool and normalise `(B, T, D)`, in that order."""
    if pool:
        if features.shape[1] < POOL:
            raise ValueError(f"got {features.shape[1]} steps, expected at least {POOL} to pool; use pool=False")
        features = nn.functional.max_pool1d(features.transpose(1, 2), POOL).squeeze(2)
    return nn.functional.normalize(features, dim=-1) if normalize else features


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def random_model(seed: int, dim: int = DIM, width: int = WIDTH) -> CavpModel:
    """A model with random weights (He et al. 2015) from a seed; the global generator stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = CavpModel(dim, width)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            scale = math.sqrt(2 / tensor[0].numel())
            state[key] = torch.randn(tensor.shape, generator=generator) * scale
        elif key == "logit_scale":
            state[key] = torch.tensor(math.log(1 / 0.07))
        else:
            ones = key.endswith(("running_var", "weight"))
            state[key] = (torch.ones if ones else torch.zeros)(tensor.shape, dtype=tensor.dtype)
    model.load_state_dict(state, assign=True)
    return model


def model_from_weights(weights: Mapping[str, Tensor], source: str) -> CavpModel:
    """The model that holds a checkpoint's weights; dim and width are read from their shapes.

    Whatever wrappers put before every name (`module.`, `model.`) is taken off, and tensors that belong to neither tower
    are left aside: training checkpoints hold more than the model.

    Args:
        weights: Name -> tensor.
        source: Where they come from, for messages.

    Raises:
        ValueError: a tensor is missing, unexpected in a tower, or of another shape; the first ones are named.
    """
    state = _own_names(weights, source)
    head = state.get("video_project_head.weight")
    dim = len(head) if head is not None and head.ndim == 2 else DIM
    with torch.device("meta"):
        model = CavpModel(dim, len(state[_ANCHOR]))
    expected = model.state_dict()
    for key, tensor in expected.items():
        if key.endswith(_COUNTER):  # how many batches training saw decides nothing, and old files lack it
            state.setdefault(key, torch.zeros((), dtype=tensor.dtype))
    _refuse(f"{source}: lacks", sorted(expected.keys() - state.keys()), "is this a CAVP checkpoint?")
    _refuse(f"{source}: has unexpected", sorted(state.keys() - expected.keys()), "it is of another architecture")
    wrong = [key for key, tensor in expected.items() if tensor.shape != state[key].shape]
    listed = [f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}" for key in wrong]
    _refuse(f"{source}: has", listed, "it is of another architecture")
    model.load_state_dict({key: state[key].to(tensor.dtype) for key, tensor in expected.items()}, assign=True)
    return model


def _own_names(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The towers' tensors under the model's own names."""
    anchors = [key for key in weights if key == _ANCHOR or key.endswith(f".{_ANCHOR}")]
    if not anchors:
        raise ValueError(f"{source}: lacks {_ANCHOR} (it holds {_some(list(weights))}); is this a CAVP checkpoint?")
    prefix = min(anchors, key=len).removesuffix(_ANCHOR)
    parts = ("video_encoder.", "video_project_head.", "spec_encoder.", "logit_scale")
    names = {key: key.removeprefix(prefix) for key in weights if key.startswith(prefix)}
    return {name: weights[key] for key, name in names.items() if name.startswith(parts)}


def _refuse(start: str, keys: list[str], end: str) -> None:
    if keys:
        raise ValueError(f"{start} {_some(keys)}; {end}")


def _some(keys: list[Any], limit: int = 3) -> str:
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return (", ".join(map(str, keys[:limit])) or "nothing") + rest
