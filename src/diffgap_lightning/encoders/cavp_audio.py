"""CAVP's audio tower: CNN14 on log-mel spectrograms, kept as a sequence of sixteenths of its time steps.

    (B, L, 128) -> batch norm per mel band -> six blocks of two 3x3 convolutions, averaged 2x2 in the first four and
    over mel alone in the fifth -> mean over mel -> max + mean over 3 neighbours in time -> fc1, ReLU, fc1, ReLU -> D

so that L columns give L // 16 steps of D = 512. Block i has w 2^i channels, w = 64 in the released model. Kong et al.
2020 (PANNs) describe CNN14; that one layer `fc1` is applied twice is Diff-Foley's, and its weights rely on it. The
names of the submodules are those of Diff-Foley's checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

MEL_BANDS = 128
TIME_REDUCTION = 16  # spectrogram columns that become one step
_POOLS = ((2, 2), (2, 2), (2, 2), (2, 2), (1, 2), (1, 1))  # (time, mel)
_DROPOUT = 0.2


class ConvBlock(nn.Module):
    """Two convolutions with batch normalisation and ReLU, and an average pool."""

    def __init__(self, inputs: int, outputs: int, pool: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, L, M)` -> `(B, C', L', M')`; columns that do not fill a pool are dropped."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return functional.avg_pool2d(x, self.pool)


class Cnn14(nn.Module):
    """The tower.

    Args:
        dim: D.
        width: w, channels of the first block.
    """

    def __init__(self, dim: int = 512, width: int = 64) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(MEL_BANDS)
        inputs = 1
        for block, pool in enumerate(_POOLS):
            self.add_module(f"conv_block{block + 1}", ConvBlock(inputs, width * 2**block, pool))
            inputs = width * 2**block
        self.fc1 = nn.Linear(inputs, inputs)
        self.final_project = nn.Linear(inputs, dim)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """`(B, L, 128)` -> `(B, L // 16, D)`."""
        x = self.bn(spectrogram.transpose(1, 2)[..., None])  # mel bands as channels: (B, M, L, 1)
        x = x.permute(0, 3, 2, 1)
        for block in range(len(_POOLS)):
            x = self.get_submodule(f"conv_block{block + 1}")(x)
            x = functional.dropout(x, _DROPOUT, self.training)
        x = x.mean(dim=3)
        x = functional.max_pool1d(x, 3, stride=1, padding=1) + functional.avg_pool1d(x, 3, stride=1, padding=1)
        x = functional.relu(self.fc1(x.transpose(1, 2)))
        return self.final_project(functional.relu(self.fc1(x)))
