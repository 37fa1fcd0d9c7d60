"""Small CIFAR-10 networks whose pretrained weights the recipes use. Plain torch modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: subsampled, zero-padded channels (He et al., option A)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6 n + 2 for 32 px images (He et al., CVPR 2016): n blocks each of w, 2w, 4w channels."""

    def __init__(self, depth: int, num_classes: int = 10, width: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        n, a, b, c = (depth - 2) // 6, width, 2 * width, 4 * width
        self.conv1 = nn.Conv2d(in_channels, a, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = nn.Sequential(*(Block(a, a, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(*(Block(a if i == 0 else b, b, 2 if i == 0 else 1) for i in range(n)))
        self.layer3 = nn.Sequential(*(Block(b if i == 0 else c, c, 2 if i == 0 else 1) for i in range(n)))
        self.linear = nn.Linear(c, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, 32, 32) -> logits (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
