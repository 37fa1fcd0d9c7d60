"""Run as a program: load an adapter from the Hub at some revisions and save what it answers."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import ee_surgery as ee

X = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _block(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, stride=2), nn.BatchNorm2d(c_out), nn.ReLU())


class Net(nn.Module):
    """Three blocks and a head: a base that is captured in no time."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_block(3, 24), _block(24, 32), _block(32, 48))
        self.head = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 16, 16) -> logits (B, classes)."""
        return self.head(self.blocks(x).mean((2, 3)))


def base(seed: int = 7, classes: int = 10) -> Net:
    """The base, the same one in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(classes).eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return net


def main(out: str, repo: str, revisions: list[str]) -> None:
    """Write logits (B, C) and exits (B,) of each revision."""
    torch.set_num_threads(1)
    answers = [ee.from_pretrained(repo, base(), revision=revision).predict(X) for revision in revisions]
    torch.save([(answer.logits, answer.exit_index) for answer in answers], out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
