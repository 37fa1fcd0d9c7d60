"""Does a model still compute what it did? Its structure, hooks and attributes, compared at every call.

A captured program outlives the Python state it was captured in: a PEFT adapter switched off, a head replaced, a hook
added or an attribute changed would go unnoticed. The comparison is made of a few lists that are compared in C and touch
little memory, for it runs at every call, on caches that are full of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

_BASE = frozenset(vars(nn.Module()))  # tables, hooks and flags that every module has
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Of configuration objects: says nothing about what is computed.
_LABELS = frozenset({"_name_or_path", "_commit_hash", "architectures", "transformers_version", "id2label", "label2id"})

Attributes = dict[str, Any]


class Signature:
    """A snapshot of everything but tensor values that decides what a model computes.

    Modules and their classes, forward hooks, plain attributes (numbers, names, lists, active adapters), and the
    attributes of objects that modules hold, such as a configuration. Training flags are left out.

    Args:
        volatile: attributes that a forward call itself sets, by module path; they are not compared.
    """

    def __init__(self, model: nn.Module, volatile: Mapping[str, frozenset[str]] | None = None) -> None:
        self.model, self.volatile = model, volatile or {}
        self.modules = dict(model.named_modules())
        self._list = [*self.modules.values()]
        self._types = [*map(type, self._list)]
        containers = [module._modules for module in self._list if module._modules]
        self._children = [(table, dict(table)) for table in containers]
        # Hooks live in dicts that change in place. Most are empty: their truth tells.
        hooks: list[Mapping[int, Any]] = [vars(module)[name] for module in self._list for name in _HOOKS]
        self._unhooked = [table for table in hooks if not table]
        self._hooked = [(table, dict(table)) for table in hooks if table]
        self._absent = [(m._parameters, name) for m in self._list for name, p in m._parameters.items() if p is None]
        self._attributes = [(path, live, self._freeze(path, live)) for path, live in self._watched()]
        self._getters = [(itemgetter(*frozen), live) for _, live, frozen in self._attributes if frozen]
        self._values = [itemgetter(*frozen)(frozen) for _, _, frozen in self._attributes if frozen]
        self._fixed = [live for path, live, _ in self._attributes if path not in self.volatile]
        self._sizes = [*map(len, self._fixed)]

    def _watched(self) -> Iterator[tuple[str, Attributes]]:
        """The attributes of every module, and of every object that they hold, by path."""
        held: dict[int, tuple[str, Attributes]] = {}
        for path, module in self.modules.items():
            yield path, vars(module)
            for name, value in vars(module).items():
                plain = name in _BASE or isinstance(value, (nn.Module, Tensor, type)) or callable(value)
                if not plain and isinstance(getattr(value, "__dict__", None), dict):
                    held.setdefault(id(value), (_join(path, name), vars(value)))
        yield from held.values()

    def _freeze(self, path: str, live: Attributes) -> Attributes:
        """What is compared of some attributes, containers as copies."""
        left_out = self.volatile.get(path, frozenset()) | _LABELS | _BASE
        return {name: _copied(value) for name, value in [*live.items()] if name not in left_out}

    def current(self) -> bool:
        """True when the model is as it was, training flags aside."""
        return self._equal() or not self.differences()

    def _equal(self) -> bool:
        try:
            return (
                not any(self._unhooked)
                and [get(live) for get, live in self._getters] == self._values  # identical values are not looked into
                and [*map(len, self._fixed)] == self._sizes
                and [*map(type, self._list)] == self._types
                and not [name for table, name in self._absent if table[name] is not None]
                and all(table == was for table, was in self._children)
                and all(table == was for table, was in self._hooked)
            )
        except Exception:  # tensors and arrays have no truth, and a key may be gone
            return False

    def differences(self) -> list[str]:
        """What has changed since, in words, by module path; empty where nothing has."""
        now = dict(self.model.named_modules())
        lines: dict[str, str] = {}
        for path in sorted(self.modules.keys() | now.keys()):
            before, after = self.modules.get(path), now.get(path)
            if before is not after and not any(path.startswith(f"{other}.") for other in lines):
                lines[path] = f"{_kind(before)} -> {_kind(after)}"
        for (path, module), was in zip(self.modules.items(), self._types, strict=True):
            if type(module) is not was:
                lines[path] = f"{was.__name__} -> {type(module).__name__}"
        for table in [*(t for t in self._unhooked if t), *(t for t, was in self._hooked if t != was)]:
            lines[_join(self._owner(table), "hooks")] = "forward hooks added or removed"
        for table, name in self._absent:
            if table.get(name) is not None:
                lines[_join(self._owner(table), name)] = "nothing -> a parameter"
        for path, live, frozen in self._attributes:
            now_there = self._freeze(path, live)
            for name in _changed(frozen, now_there):
                lines[_join(path, name)] = f"{_short(frozen, name)} -> {_short(now_there, name)}"
        return [f"{path or 'the model'}: {told}" for path, told in lines.items()]

    def _owner(self, table: object) -> str:
        """The path of the module that holds a table of hooks or parameters."""
        return next(path for path, m in self.modules.items() if any(held is table for held in vars(m).values()))


def attributes(model: nn.Module) -> dict[str, Attributes]:
    """The attributes of every module as they are now, by path: to find those that a call sets."""
    return {path: _copied(vars(module)) for path, module in model.named_modules()}


def set_since(model: nn.Module, before: Mapping[str, Attributes]) -> dict[str, frozenset[str]]:
    """The attributes that are others than in `before`, by module path; modules where none is are left out."""
    found = {path: _changed(before.get(path, {}), vars(module)) for path, module in model.named_modules()}
    return {path: frozenset(names) for path, names in found.items() if names}


def _changed(before: Attributes, after: Attributes) -> list[str]:
    """Names of the attributes that differ, of those that a module has of its own."""
    names = (before.keys() | after.keys()) - _BASE
    return sorted(n for n in names if n not in before or n not in after or not _same(before[n], after[n]))


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    try:
        return bool(left == right)
    except Exception:  # arrays: another object is another value
        return False


def _copied(value: Any) -> Any:
    """Containers, which change in place, as copies; everything else itself."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in [*value.items()]}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return set(value) if type(value) is set else value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _kind(module: nn.Module | None) -> str:
    return "nothing" if module is None else type(module).__name__


def _short(attributes: Attributes, name: str) -> str:
    text = repr(attributes[name]) if name in attributes else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."
