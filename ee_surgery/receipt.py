"""The proof that the original is what it was."""

from __future__ import annotations

from dataclasses import dataclass

from ee_surgery.text import visible


@dataclass(frozen=True)
class Receipt:
    """Proof that the original was not touched: SHA-256 of every parameter and buffer then and now; its function."""

    before: dict[str, str]
    after: dict[str, str]
    altered: tuple[str, ...] = ()
    """What else its owner changed that decides what it computes: modules, hooks, attributes, active adapters."""
    own_base: bool = False
    """Whether the original is one that was trained along with the branches, or came with the adapter."""

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that differ, are new or are gone."""
        return sorted(n for n in self.before.keys() | self.after.keys() if self.before.get(n) != self.after.get(n))

    @property
    def unchanged(self) -> bool:
        """True when every parameter and buffer is equal bit for bit, and nothing else about the model was altered."""
        return not self.changed and not self.altered

    def __str__(self) -> str:
        if self.unchanged:
            what = "the base that came with the branches" if self.own_base else "the original"
            return f"unchanged: all {len(self.before)} parameters and buffers of {what}, bit for bit (SHA-256)"
        tensors = f"{len(self.changed)} of {len(self.before)} tensors of the original: {self.changed[:5]}"
        return f"CHANGED: {tensors}" + (f"; {'; '.join(map(visible, self.altered[:5]))}" if self.altered else "")
