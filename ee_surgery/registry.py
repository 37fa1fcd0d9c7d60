"""Name -> object tables that users can extend and that suggest close names on a miss."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from ee_surgery.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest of `known`, or listing some of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return f"Known: {', '.join(map(repr, known[:20]))}{' ...' if len(known) > 20 else ''}."


class Registry(Mapping[str, T], Generic[T]):
    """An open table of named objects; registering a name twice is an error.

    >>> HEADS = Registry("head")
    >>> @HEADS.register("pool")
    ... class Pool: ...
    >>> HEADS["pool"].__name__
    'Pool'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers its argument under `name`.

        Raises:
            ConfigError: the name is taken, or is not a non-empty string.
        """
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"The name of a {self.kind} must be a non-empty string, got {name!r}.")

        def add(item: T) -> T:
            if name in self._items:
                raise ConfigError(f"A {self.kind} named {name!r} is already registered: {self._items[name]!r}.")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if isinstance(name, str) and name in self._items:
            return self._items[name]
        raise UnknownNameError(f"No {self.kind} {str(name)[:80]!r}. {suggest(str(name)[:80], self._items)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
