"""The proof that the original is unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from ee_surgery.text import visible


@dataclass(frozen=True)
class Receipt:
    """Proof that the original is unchanged: SHA-256 of every parameter and buffer, then and now, and its structure."""

    before: dict[str, str]
    after: dict[str, str]
    altered: tuple[str, ...] = ()
    """Other changes that affect its computation: modules, hooks, attributes, active adapters."""
    own_base: bool = False
    """Whether the original was trained together with the branches, or came with the adapter."""

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that differ, were added or were removed."""
        return sorted(n for n in self.before.keys() | self.after.keys() if self.before.get(n) != self.after.get(n))

    @property
    def unchanged(self) -> bool:
        """True if every parameter and buffer is equal bit for bit, and nothing else about the model was changed."""
        return not self.changed and not self.altered

    def __str__(self) -> str:
        if self.unchanged:
            what = "the base that came with the branches" if self.own_base else "the original"
            return f"unchanged: all {len(self.before)} parameters and buffers of {what}, bit for bit (SHA-256)"
        tensors = f"{len(self.changed)} of {len(self.before)} tensors of the original: {self.changed[:5]}"
        return f"CHANGED: {tensors}" + (f"; {'; '.join(map(visible, self.altered[:5]))}" if self.altered else "")
