"""ESPNet and ESPNetv2, for the weights of the data folder.

Sources: ESPNet (Mehta et al., ECCV 2018, arXiv:1803.06815), ESPNetv2 (Mehta et al., CVPR 2019, arXiv:1811.11431).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CITYSCAPES_TO_CAMVID = (3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10)
"""The class of CamVid for each of the 19 of Cityscapes."""


def _conv(c_in: int, c_out: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(c_in, c_out, size, stride, padding, dilation, groups, bias=False)


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 2, 1)


# --- ESPNet


class _Conv(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = _conv(c_in, c_out, size, stride, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _NormAct(nn.Module):
    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.act = nn.PReLU(channels) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class _ConvNormAct(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = _conv(c_in, c_out, size, stride)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.act = nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class _Spread(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, stride: int) -> None:
        super().__init__()
        n = c_out // 5
        self.c1 = _Conv(c_in, n, size, stride)
        self.d1 = _Conv(n, c_out - 4 * n, 3)
        self.d2, self.d4, self.d8, self.d16 = (_Conv(n, n, 3, 1, d) for d in (2, 4, 8, 16))

    def spread(self, x: Tensor) -> Tensor:
        x = self.c1(x)
        d2 = self.d2(x)
        d4 = d2 + self.d4(x)
        d8 = d4 + self.d8(x)
        return torch.cat([self.d1(x), d2, d4, d8, d8 + self.d16(x)], 1)


class _Down(_Spread):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, 2)
        self.bn, self.act = nn.BatchNorm2d(c_out, eps=1e-3), nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.spread(x)))


class _Block(_Spread):
    def __init__(self, c_in: int, c_out: int, add: bool = True) -> None:
        super().__init__(c_in, c_out, 1, 1)
        self.bn, self.add = _NormAct(c_out), add

    def forward(self, x: Tensor) -> Tensor:
        found = self.spread(x)
        return self.bn(found + x if self.add else found)


class _Encoder(nn.Module):
    def __init__(self, classes: int, p: int, q: int) -> None:
        super().__init__()
        self.level1 = _ConvNormAct(3, 16, 3, 2)
        self.b1 = _NormAct(19)
        self.level2_0 = _Down(19, 64)
        self.level2 = nn.ModuleList(_Block(64, 64) for _ in range(p))
        self.b2 = _NormAct(131)
        self.level3_0 = _Down(131, 128)
        self.level3 = nn.ModuleList(_Block(128, 128) for _ in range(q))
        self.b3 = _NormAct(256)
        self.classifier = _Conv(256, classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = _halved(x)
        quarter = _halved(half)
        a = self.b1(torch.cat([self.level1(x), half], 1))
        first = here = self.level2_0(a)
        for block in self.level2:
            here = block(here)
        b = self.b2(torch.cat([here, first, quarter], 1))
        first = here = self.level3_0(b)
        for block in self.level3:
            here = block(here)
        return a, b, self.classifier(self.b3(torch.cat([first, here], 1)))


class ESPNet(nn.Module):
    """Pictures (B, 3, H, W), H and W multiples of 8 -> logits (B, classes, H, W)."""

    def __init__(self, classes: int = 12, p: int = 2, q: int = 8) -> None:
        super().__init__()
        c = classes
        self.encoder = _Encoder(c, p, q)
        self.br = nn.BatchNorm2d(c, eps=1e-3)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(c, c, 2, 2, bias=False))
        self.level3_C = _Conv(131, c, 1)
        self.combine_l2_l3 = nn.Sequential(_NormAct(2 * c), _Block(2 * c, c, add=False))
        self.up_l2 = nn.Sequential(nn.ConvTranspose2d(c, c, 2, 2, bias=False), _NormAct(c))
        self.conv = _ConvNormAct(19 + c, c, 3)
        self.classifier = nn.ConvTranspose2d(c, c, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b, coarse = self.encoder(x)
        coarse = self.up_l3(self.br(coarse))
        middle = self.combine_l2_l3(torch.cat([self.level3_C(b), coarse], 1))
        fine = self.conv(torch.cat([self.up_l2(middle), a], 1))
        return self.classifier(fine)


# --- ESPNetv2


class _Unit(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = _conv(c_in, c_out, size, stride, groups=groups)
        self.bn, self.act = nn.BatchNorm2d(c_out), nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class _ConvNorm(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = _conv(c_in, c_out, size, groups=groups), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class _NormPReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(channels), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class _EESP(nn.Module):
    def __init__(self, c_in: int, c_out: int, rates: tuple[int, ...], stride: int = 1) -> None:
        super().__init__()
        n = c_out // 4
        self.proj_1x1 = _Unit(c_in, n, 1, groups=4)
        self.spp_dw = nn.ModuleList(_Conv2(n, rate, stride) for rate in rates)
        self.br_after_cat = _NormPReLU(c_out)
        self.conv_1x1_exp = _ConvNorm(c_out, c_out, 1, groups=4)
        self.module_act = nn.PReLU(c_out)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.proj_1x1(x)
        parts = [self.spp_dw[0](narrow)]
        for conv in list(self.spp_dw)[1:]:
            parts.append(conv(narrow) + parts[-1])
        found = self.conv_1x1_exp(self.br_after_cat(torch.cat(parts, 1)))
        return found if self.stride == 2 else self.module_act(found + x)


class _Conv2(nn.Module):
    """Depthwise."""

    def __init__(self, channels: int, rate: int, stride: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, stride, rate, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Down2(nn.Module):
    def __init__(self, c_in: int, c_out: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.eesp = _EESP(c_in, c_out - c_in, rates, 2)
        self.inp_reinf = nn.Sequential(_Unit(3, 3, 3), _ConvNorm(3, c_out, 1))
        self.act = nn.PReLU(c_out)

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        found = torch.cat([_halved(x), self.eesp(x)], 1)
        while picture.shape[-2] > found.shape[-2]:
            picture = _halved(picture)
        return self.act(found + self.inp_reinf(picture))


class _Encoder2(nn.Module):
    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        w0, w1, w2, w3 = widths
        rates, last = (1, 2, 3, 4), (1, 1, 2, 3)
        self.level1 = _Unit(3, w0, 3, 2)
        self.level2_0 = _Down2(w0, w1, rates)
        self.level3_0 = _Down2(w1, w2, rates)
        self.level3 = nn.ModuleList(_EESP(w2, w2, rates) for _ in range(3))
        self.level4_0 = _Down2(w2, w3, rates)
        self.level4 = nn.ModuleList(_EESP(w3, w3, last) for _ in range(7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        e1 = self.level1(x)
        e2 = self.level2_0(e1, x)
        e3 = self.level3_0(e2, x)
        for block in self.level3:
            e3 = block(e3)
        e4 = self.level4_0(e3, x)
        for block in self.level4:
            e4 = block(e4)
        return e1, e2, e3, e4


class _CBR(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.cbr = nn.Sequential(_conv(c_in, c_out, size, groups=groups), nn.BatchNorm2d(c_out), nn.PReLU(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.cbr(x)


class _BR(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.br = nn.Sequential(nn.BatchNorm2d(channels), nn.PReLU(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.br(x)


class _Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 5, c // 5, h, w).transpose(1, 2).reshape(b, c, h, w)


_SCALES = (2.0, 1.5, 1.0, 0.5, 0.1)
_P = 10


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class _Pool(nn.Module):
    def __init__(self, c_in: int, c_out: int, last: bool = False) -> None:
        super().__init__()
        self.projection_layer = _CBR(c_in, _P, 1)
        self.stages = nn.ModuleList(_conv(_P, _P, 3, groups=_P) for _ in _SCALES)
        self.merge_layer = nn.Sequential(
            _BR(5 * _P), _Shuffle(), _CBR(5 * _P, _P, 3, groups=_P), nn.Conv2d(_P, c_out, 1, bias=last)
        )
        self.br = nn.Identity() if last else _BR(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection_layer(x)
        own = (int(x.shape[-2]), int(x.shape[-1]))
        found = []
        for scale, stage in zip(_SCALES, self.stages, strict=True):
            size = (max(5, math.ceil(own[0] * scale)), max(5, math.ceil(own[1] * scale)))
            if scale > 1:
                found.append(F.adaptive_avg_pool2d(stage(_resized(x, size)), own))
            elif scale < 1:
                found.append(_resized(stage(F.adaptive_avg_pool2d(x, size)), own))
            else:
                found.append(stage(x))
        return self.br(self.merge_layer(torch.cat(found, 1)))


class _Gate(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.wt_layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c_in, c_out, 1, bias=False), nn.Sigmoid())
        self.expansion_layer = _CBR(c_in, c_out, 3, math.gcd(c_in, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.expansion_layer(x) * self.wt_layer(x)


_WIDTHS = {
    "050": (16, 32, 64, 128), "100": (32, 64, 128, 256), "150": (32, 96, 192, 384), "200": (32, 128, 256, 512)
}  # fmt: skip


class ESPNetv2(nn.Module):
    """Pictures (B, 3, H, W), H and W multiples of 16 -> logits (B, classes, H, W).

    Args:
        width: `050`, `100`, `150` or `200`: hundredths of the channels.
    """

    def __init__(self, width: str = "150", classes: int = 20) -> None:
        super().__init__()
        w0, w1, w2, w3 = _WIDTHS[width]
        self.base_net = _Encoder2(_WIDTHS[width])
        self.bu_dec_l1, self.bu_dec_l2 = _Pool(w3, 64), _Pool(64, 48)
        self.bu_dec_l3, self.bu_dec_l4 = _Pool(48, 32), _Pool(32, classes, last=True)
        self.merge_enc_dec_l2, self.merge_enc_dec_l3 = _Gate(w2, 64), _Gate(w1, 48)
        self.merge_enc_dec_l4 = _Gate(w0, 32)
        self.bu_br_l2, self.bu_br_l3, self.bu_br_l4 = _BR(64).br, _BR(48).br, _BR(32).br

    def forward(self, x: Tensor) -> Tensor:
        e1, e2, e3, e4 = self.base_net(x)
        y = self.bu_dec_l1(e4)
        for k, encoded in ((2, e3), (3, e2), (4, e1)):
            gate, norm, decode = (getattr(self, f"{name}_l{k}") for name in ("merge_enc_dec", "bu_br", "bu_dec"))
            larger = _resized(y, (2 * int(y.shape[-2]), 2 * int(y.shape[-1])))
            y = decode(norm(gate(encoded) + larger))
        return _resized(y, (int(x.shape[-2]), int(x.shape[-1])))


class OnCamVid(nn.Module):
    """A network of Cityscapes' classes on pictures of CamVid: (B, 3, 360, 480) -> logits (B, 11, 360, 480).

    A class of CamVid has the largest logit of those of Cityscapes that are mapped to it, which gives the same map as
    mapping the answer.
    """

    size = (480, 640)

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        larger = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        logits = self.net(larger)[:, :19]
        logits = F.interpolate(logits, (int(x.shape[-2]), int(x.shape[-1])), mode="bilinear", align_corners=False)
        parts = [[i for i, to in enumerate(CITYSCAPES_TO_CAMVID) if to == c] for c in range(11)]
        return torch.stack([logits[:, part].amax(1) for part in parts], 1)
