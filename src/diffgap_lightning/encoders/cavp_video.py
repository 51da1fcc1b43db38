"""CAVP's video tower: SlowOnly, a ResNet-50 over frames that looks along time only in its last two stages.

    (B, 3, T, H, W) -> stem 1x7x7 / 2, max pool / 2 -> stages of 3, 4, 6, 3 bottlenecks -> mean over space -> (B, C, T)

Time is never reduced: every frame keeps a feature. A bottleneck is 1x1x1 (3x1x1 in stages 3 and 4), 1x3x3, 1x1x1, each
with batch normalisation, around a shortcut; the first of stages 2, 3 and 4 halves height and width in its 1x3x3.
C = 32 w, and w = 64 in the released model. Feichtenhofer et al. 2019 (SlowFast), its slow pathway alone. The names of
the submodules are those of Diff-Foley's checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn

_BLOCKS = (3, 4, 6, 3)
_TEMPORAL = (1, 1, 3, 3)  # kernel along time of a stage's first convolutions
_EXPANSION = 4


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, and ReLU unless told otherwise."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int, int], spatial_stride: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        stride = (1, spatial_stride, spatial_stride)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm3d(outputs)
        self.activation = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, C', T, H', W')`."""
        return self.activation(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Three convolutions around a shortcut, which is a convolution of its own where the shape changes."""

    def __init__(self, inputs: int, planes: int, temporal: int, spatial_stride: int) -> None:
        super().__init__()
        outputs = planes * _EXPANSION
        self.conv1 = ConvNorm(inputs, planes, (temporal, 1, 1))
        self.conv2 = ConvNorm(planes, planes, (1, 3, 3), spatial_stride)
        self.conv3 = ConvNorm(planes, outputs, (1, 1, 1), relu=False)
        same = inputs == outputs and spatial_stride == 1
        self.downsample = None if same else ConvNorm(inputs, outputs, (1, 1, 1), spatial_stride, relu=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, C', T, H', W')`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)


class SlowOnly(nn.Module):
    """The tower.

    Args:
        width: w, channels of the stem.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width, (1, 7, 7), spatial_stride=2)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        inputs = width
        for stage, (blocks, temporal) in enumerate(zip(_BLOCKS, _TEMPORAL, strict=True)):
            planes = width * 2**stage
            layers = []
            for block in range(blocks):
                layers.append(Bottleneck(inputs, planes, temporal, 2 if stage and not block else 1))
                inputs = planes * _EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.features = inputs

    def forward(self, video: Tensor) -> Tensor:
        """`(B, 3, T, H, W)` -> `(B, 32 w, T)`."""
        x = self.maxpool(self.conv1(video))
        for stage in range(len(_BLOCKS)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.mean(dim=(-2, -1))
