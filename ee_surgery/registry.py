"""Name -> object tables that users can extend and that suggest close names on a miss."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ee_surgery.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest of `known`, or listing some of them.

    >>> suggest("entropi", ["max_prob", "entropy"])
    "Did you mean 'entropy'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return f"Known: {', '.join(map(repr, known[:20]))}{' ...' if len(known) > 20 else ''}."


class Registry(Mapping[str, T], Generic[T]):
    """An open table of named objects; registering a name twice is an error.

    Facts about an object that the package needs and the object cannot tell are properties, given at registration, so
    that no list of names elsewhere has to be complete.

    >>> HEADS = Registry("head", learns=True)
    >>> @HEADS.register("mean", learns=False)
    ... def mean(x): ...
    >>> HEADS["mean"].__name__, HEADS.property("mean", "learns")
    ('mean', False)

    Args:
        kind: of the objects, for errors.
        defaults: known properties with their default values.
    """

    def __init__(self, kind: str, **defaults: object) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._defaults = defaults
        self._stated: dict[str, dict[str, object]] = {}

    def register(self, name: str, **properties: object) -> Callable[[T], T]:
        """Decorator that registers its argument under `name`.

        Args:
            name: not taken yet.
            properties: of the object, as documented by the registry.
        Raises:
            ConfigError: the name is taken, is not a non-empty string, or a property is unknown.
        """
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"The name to register as {self.kind} must be a non-empty string, got {name!r}.")
        for unknown in properties.keys() - self._defaults.keys():
            raise ConfigError(f"A {self.kind} has no property {unknown!r}. {suggest(unknown, self._defaults)}")

        def add(item: T) -> T:
            if name in self._items:
                raise ConfigError(f"A {self.kind} named {name!r} is already registered: {self._items[name]!r}.")
            self._items[name] = item
            self._stated[name] = properties
            return item

        return add

    def property(self, name: str, which: str) -> Any:
        """A property of what is registered under `name`, or its default.

        Raises:
            UnknownNameError: there is nothing of that name.
        """
        self[name]
        return self._stated[name].get(which, self._defaults[which])

    def __getitem__(self, name: str) -> T:
        if isinstance(name, str) and name in self._items:
            return self._items[name]
        raise UnknownNameError(f"No {self.kind} {str(name)[:80]!r}. {suggest(str(name)[:80], self._items)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
