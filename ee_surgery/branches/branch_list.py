"""All branches of a model, as one module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ee_surgery.branches.base import Branch, ExitLogits, run_branch


class BranchBank(nn.Module):
    """The trainable part: one branch per exit, and a head if the original has none.

    Call it on the features of all exits at once, so that DDP can wrap it; it is also a sequence of the branches.
    """

    def __init__(self, branches: Sequence[Branch], head: Branch | None = None) -> None:
        super().__init__()
        self.exits = nn.ModuleList(branches)
        self.head = head
        self.chained = any(branch.chained for branch in branches)
        """Whether a branch reads the log-probabilities of earlier ones."""

    @property
    def units(self) -> list[bool]:
        """Which branches have a confidence unit."""
        return [branch.confidence is not None for branch in self]

    def __len__(self) -> int:
        return len(self.exits)

    def __iter__(self) -> Iterator[Branch]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Branch:
        branch = self.exits[index]
        assert isinstance(branch, Branch)
        return branch

    def split(self, answers: list[ExitLogits], original: Tensor) -> tuple[list[ExitLogits], Tensor]:
        """What a call gave, as the branches' answers and the last logits: the original's, or those of a new head."""
        return (answers, original) if self.head is None else (answers[:-1], answers[-1].logits)

    def forward(self, features: Sequence[tuple[Tensor, ...]]) -> list[ExitLogits]:
        """Features (B, *shape) of each branch, with an optional mask -> logits of each, the head's last."""
        answers: list[ExitLogits] = []
        previous: Tensor | None = None
        for branch, given in zip(self, features, strict=False):
            answers.append(run_branch(branch, given, previous) if self.chained else branch(*given))
            previous = answers[-1].log_probs
        return answers if self.head is None else [*answers, self.head(*features[-1])]
