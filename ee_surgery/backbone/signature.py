"""Detect changes of a model's structure, hooks and attributes at every call.

A captured program outlives the Python state it was captured in: a PEFT adapter switched off, a head replaced, a hook
added or an attribute changed would otherwise go unnoticed. The comparison touches little memory, since it runs at every
call, when CPU caches are full of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

_NONE: frozenset[str] = frozenset()
_BASE = frozenset(vars(nn.Module()))  # tables, hooks and flags that every module has
_LOOKS_ON = "transformers.utils.output_capturing"  # its hooks collect outputs, and change none
# Attributes of configuration objects that do not affect the computation; `save_pretrained` writes several of them.
_LABELS = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "transformers_version",
        "id2label",
        "label2id",
        "dtype",
        "_output_capturing_hooks_installed",
    }  # the last one of models: see `_LOOKS_ON`
)
# Attributes of torch modules that follow from their parameters, or that only `repr` reads.
_DESCRIPTIVE: dict[type, frozenset[str]] = {
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        frozenset(
            {
                "in_channels",
                "out_channels",
                "kernel_size",
                "transposed",
                "output_padding",
                "_reversed_padding_repeated_twice",
            }
        ),
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), frozenset({"num_features", "affine"})),
    nn.Linear: frozenset({"in_features", "out_features"}),
    nn.LayerNorm: frozenset({"elementwise_affine"}),
}
# PEFT's tuners hold the active adapter as a name or as a list of one; its layers, which compute, hold it themselves.
_TUNERS = frozenset({"active_adapter"})

Attributes = dict[str, Any]


class Signature:
    """A snapshot of everything except tensor values that determines what a model computes.

    Modules and their classes, forward hooks, plain attributes (numbers, names, lists, active adapters), and the
    attributes of objects that modules hold, such as a configuration. Training flags are excluded.

    Args:
        volatile: attributes that a forward call itself sets, by module path; they are not compared.
    """

    def __init__(self, model: nn.Module, volatile: Mapping[str, frozenset[str]] | None = None) -> None:
        self.model, self.volatile = model, volatile or {}
        self.modules = dict(model.named_modules())
        self._snapshots = {path: _Snapshot(path, module, self.volatile) for path, module in self.modules.items()}
        self._held = self._holdings()
        self._all = Part([*self._snapshots.values()], self._held)

    def _holdings(self) -> list[_Holding]:
        """The attributes of every object that modules hold, each object once."""
        found: dict[int, _Holding] = {}
        for path, module in self.modules.items():
            for name, value in vars(module).items():
                plain = name in _BASE or isinstance(value, (nn.Module, Tensor, type)) or callable(value)
                if not plain and isinstance(getattr(value, "__dict__", None), dict):
                    found.setdefault(id(value), _Holding(_join(path, name), vars(value)))
        return [*found.values()]

    def current(self) -> bool:
        """Whether the model is unchanged, apart from training flags."""
        if self._all.equal():
            return True
        if self.differences():
            return False
        if any(table != was for each in self._snapshots.values() for table, was in each.hooks):
            for each in self._snapshots.values():  # hooks that only look on: they need no second look at every call
                each.keep_hooks()
            self._all = Part([*self._snapshots.values()], self._held)
        return True

    def parts(self, groups: Sequence[Iterable[str]]) -> list[Part]:
        """The same comparison in parts: one per group of module paths; modules in no group go to the first."""
        places = {path: k for k in range(len(groups) - 1, -1, -1) for path in groups[k]}  # the first group that has it
        pieces: list[list[_Snapshot]] = [[] for _ in groups]
        for path, snapshot in self._snapshots.items():
            pieces[places.get(path, 0)].append(snapshot)
        return [Part(piece, [] if k else self._held) for k, piece in enumerate(pieces)]

    def differences(self) -> list[str]:
        """The changes since then, in words, by module path; empty if there are none."""
        now = dict(self.model.named_modules())
        lines: dict[str, str] = {}
        for path in sorted(self.modules.keys() | now.keys()):
            before, after = self.modules.get(path), now.get(path)
            if before is not after and not any(path.startswith(f"{other}.") for other in lines):
                lines[path] = f"{_kind(before)} -> {_kind(after)}"
        for holding in (*self._snapshots.values(), *self._held):
            lines |= holding.differences()
        return [f"{path or 'the model'}: {change}" for path, change in lines.items()]


class _Holding:
    """The attributes of an object, then and now."""

    def __init__(self, path: str, live: Attributes, left_out: frozenset[str] = _NONE) -> None:
        self.path, self.live, self.left_out = path, live, left_out | _LABELS | _BASE
        self.frozen = self.compared()

    def compared(self) -> Attributes:
        """The attributes to compare, with containers copied."""
        return {name: _copied(value) for name, value in [*self.live.items()] if name not in self.left_out}

    def differences(self) -> dict[str, str]:
        """Changed attributes, by path."""
        now = self.compared()
        return {
            _join(self.path, name): f"{_short(self.frozen, name)} -> {_short(now, name)}"
            for name in _changed(self.frozen, now)
        }


class _Snapshot(_Holding):
    """A module, then and now."""

    def __init__(self, path: str, module: nn.Module, volatile: Mapping[str, frozenset[str]]) -> None:
        told = _TUNERS if hasattr(type(module), "inject_adapter") else _DESCRIPTIVE.get(type(module), _NONE)
        super().__init__(path, vars(module), volatile.get(path, _NONE) | told)
        self.module, self.type = module, type(module)
        self.steady = path not in volatile
        self.keep_hooks()
        self.children = (module._modules, dict(module._modules)) if module._modules else None
        self.absent = [(module._parameters, name) for name, value in module._parameters.items() if value is None]

    def keep_hooks(self) -> None:
        """Take the hooks of now for those to compare with."""
        # They are stored in dicts that change in place.
        tables = (self.module._forward_pre_hooks, self.module._forward_hooks)
        self.hooks = [(table, dict(table)) for table in tables]

    def differences(self) -> dict[str, str]:
        lines = super().differences()
        if type(self.module) is not self.type:
            lines[self.path] = f"{self.type.__name__} -> {type(self.module).__name__}"
        if any(_active(table) != _active(was) for table, was in self.hooks):
            lines[_join(self.path, "hooks")] = "forward hooks added or removed"
        for table, name in self.absent:
            if table.get(name) is not None:
                lines[_join(self.path, name)] = "nothing -> a parameter"
        return lines


def _active(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Hooks without those that transformers puts on with the first call that asks for hidden states or attentions."""
    return {key: hook for key, hook in hooks.items() if getattr(hook, "__module__", "") != _LOOKS_ON}


class Part:
    """The comparison of some modules in one pass, since reading each module's memory is slow."""

    def __init__(self, modules: Sequence[_Snapshot], held: Sequence[_Holding]) -> None:
        self._rows = [_row(snapshot) for snapshot in modules]
        self._held = [(holding.live, *_values(holding)) for holding in held if holding.frozen]
        hooks = [pair for snapshot in modules for pair in snapshot.hooks]
        self._same = [snapshot.children for snapshot in modules if snapshot.children]
        self._same += [(table, was) for table, was in hooks if was]
        self._absent = [place for snapshot in modules for place in snapshot.absent]

    def equal(self) -> bool:
        """Whether they are unchanged; also False if that needs a closer comparison."""
        try:
            for module, kind, live, size, get, values, before, after in self._rows:
                if before or after or type(module) is not kind or (size and len(live) != size):
                    return False
                if get is not None and get(live) != values:  # fast for identical objects
                    return False
            return (
                all(table[name] is None for table, name in self._absent)
                and all(get is None or get(live) == values for live, get, values in self._held)
                and all(table == was for table, was in self._same)
            )
        except Exception:  # tensors and arrays have no truth value, and a key may be missing
            return False


_NO_HOOKS: dict[int, Any] = {}


def _row(snapshot: _Snapshot) -> tuple[Any, ...]:
    """The fast checks of a module: hook tables that were empty; others are compared separately."""
    size = len(snapshot.live) if snapshot.steady else 0
    hooks = (_NO_HOOKS if was else table for table, was in snapshot.hooks)
    return snapshot.module, snapshot.type, snapshot.live, size, *_values(snapshot), *hooks


def _values(holding: _Holding) -> tuple[Any, Any]:
    """A getter of the compared attributes, and their old values."""
    get = itemgetter(*holding.frozen) if holding.frozen else None
    return get, get and get(holding.frozen)


def attributes(model: nn.Module) -> dict[str, Attributes]:
    """The current attributes of every module, by path, to find those that a call sets."""
    return {path: _copied(vars(module)) for path, module in model.named_modules()}


def set_since(model: nn.Module, before: Mapping[str, Attributes]) -> dict[str, frozenset[str]]:
    """Attributes that differ from `before`, by module path; unchanged modules are left out."""
    found = {path: _changed(before.get(path, {}), vars(module)) for path, module in model.named_modules()}
    return {path: frozenset(names) for path, names in found.items() if names}


def _changed(before: Attributes, after: Attributes) -> list[str]:
    """Names of attributes that differ, apart from those of every module."""
    names = (before.keys() | after.keys()) - _BASE
    return sorted(n for n in names if n not in before or n not in after or not _same(before[n], after[n]))


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    try:
        return bool(left == right)
    except Exception:  # arrays: treat different objects as different values
        return False


def _copied(value: Any) -> Any:
    """Copy containers, which can change in place; return anything else unchanged."""
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
