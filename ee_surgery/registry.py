"""Name -> object tables that users can extend and that suggest close names on a miss."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoints, entry_points, packages_distributions
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
    that no list of names elsewhere has to be complete. Installed packages add objects by entry points: a name that is
    not registered is looked up in the group, and what is found there is imported, which registers it.

    >>> HEADS = Registry("head", learns=True)
    >>> @HEADS.register("mean", learns=False)
    ... def mean(x): ...
    >>> HEADS["mean"].__name__, HEADS.property("mean", "learns")
    ('mean', False)

    Args:
        kind: of the objects, for errors.
        group: of entry points, `ee_surgery.branches`; the name of one is the name of its object.
        defaults: known properties with their default values.
    """

    def __init__(self, kind: str, group: str | None = None, **defaults: object) -> None:
        self.kind, self.group = kind, group
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

    def package(self, name: str) -> str | None:
        """The installed package that an object comes from; None for our own, and for code of no package.

        Raises:
            UnknownNameError: there is nothing of that name.
        """
        module = str(getattr(self[name], "__module__", "")).partition(".")[0]
        return None if module in ("", "ee_surgery") else next(iter(packages_distributions().get(module, ())), None)

    def __getitem__(self, name: str) -> T:
        if isinstance(name, str) and name in self._items:
            return self._items[name]
        offered = entry_points(group=self.group) if self.group else EntryPoints()  # slow: looks at all packages
        if isinstance(name, str) and name in offered.names:
            return self._load(name, offered)
        known = [*self._items, *offered.names]
        raise UnknownNameError(f"No {self.kind} {str(name)[:80]!r}. {suggest(str(name)[:80], known)}")

    def _load(self, name: str, offered: EntryPoints) -> T:
        point = next(iter(offered.select(name=name)))
        try:
            found = point.load()
        except Exception as error:
            raise ConfigError(
                f"The {self.kind} {name!r} comes from {point.value!r} of an installed package, which cannot be "
                f"imported: {type(error).__name__}: {error}"
            ) from error
        self._stated.setdefault(name, {})
        return self._items.setdefault(name, found)  # unless its module registers it, with properties

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
