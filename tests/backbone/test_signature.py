"""An original that changes after it got its exits: answers are its own now, or refused, never an old program's."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import ee_surgery as ee
from ee_surgery.backbone.signature import Signature
from ee_surgery.backbone.twin import twin
from tests.zoo import BY_NAME


class Block(nn.Module):
    """With what programs depend on beside weights: a number, a list, a shared configuration, a branch."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.extra = nn.Conv2d(8, 8, 1)
        self.scale = 1.0
        self.active: list[str] = ["extra"]
        self.options = {"shift": 0.0}
        self.config = config
        self.mask = torch.ones(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if "extra" in self.active:
            y = y + self.extra(x)
        y = torch.relu(y) if self.config.activation == "relu" else torch.tanh(y)
        return x + self.scale * y * self.mask + self.options["shift"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(activation="relu")
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(Block(self.config) for _ in range(4)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def branched_net() -> tuple[Any, ee.EarlyExitModel, Tensor]:
    net = Net().eval()
    branched = ee.augment(net, 2, sample=torch.randn(2, 3, 8, 8))
    branched.operate(thresholds=2.0)  # above every score: routed, and no sample leaves
    return net, branched, torch.randn(5, 3, 8, 8)


def _append(net: Any) -> None:
    net.blocks.append(Block(net.config).eval())


def _reclassed(net: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    net.head.__class__ = Doubled


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda net: setattr(net.blocks[1], "scale", 0.3),
    "a list in place": lambda net: net.blocks[1].active.clear(),
    "a dict in place": lambda net: net.blocks[2].options.update(shift=0.5),
    "a configuration": lambda net: setattr(net.config, "activation", "tanh"),
    "a tensor attribute": lambda net: setattr(net.blocks[0], "mask", torch.zeros(8, 1, 1)),
    "an option of a torch module": lambda net: setattr(net.blocks[0].norm, "eps", 0.5),
    "a replaced head": lambda net: setattr(net, "head", nn.Linear(8, 5)),
    "a replaced block": lambda net: net.blocks.__setitem__(0, nn.Identity()),
    "an appended block": _append,
    "a removed block": lambda net: net.blocks.__delitem__(3),
    "a forward hook": lambda net: net.blocks[1].register_forward_hook(lambda m, i, o: o * 0.5),
    "a forward pre-hook": lambda net: net.head.register_forward_pre_hook(lambda m, i: (i[0] + 1.0,)),
    "a replaced forward": lambda net: setattr(net.blocks[0], "forward", lambda x: x),
    "another class": _reclassed,
    "a bias where there was none": lambda net: setattr(net.stem, "bias", nn.Parameter(torch.ones(8))),
    "a bias that is gone": lambda net: setattr(net.head, "bias", None),
    "pruning": lambda net: prune.l1_unstructured(net.blocks[1].conv, "weight", amount=0.5),
    "a parametrization": lambda net: parametrizations.weight_norm(net.blocks[1].conv),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_routed_run_answers_as_the_changed_original_does(change: str) -> None:
    net, branched, x = branched_net()
    before = branched(x)
    CHANGES[change](net)
    with torch.no_grad():
        expected = net(x)
    assert change == "a parametrization" or not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(branched(x), expected)
    torch.testing.assert_close(branched(x[:1]), expected[:1])
    with branched.exits_disabled():
        assert torch.equal(branched(x), expected)
    receipt = branched.receipt()
    assert receipt.altered or receipt.changed
    assert not receipt.unchanged
    assert "CHANGED" in str(receipt)


def test_changing_back_and_forth_captures_each_state_once() -> None:
    net, branched, x = branched_net()
    first = branched(x)
    for _ in range(3):
        net.blocks[1].active.clear()
        second = branched(x)
        net.blocks[1].active.append("extra")
        assert torch.equal(branched(x), first)
    assert not torch.allclose(first, second)
    assert len(branched.engine.programs) == 2
    assert branched.receipt().unchanged


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda net: setattr(net, "head", nn.Linear(8, 7)), "head: Linear -> Linear"),
        (lambda net: setattr(net, "blocks", nn.Sequential(nn.Identity())), "blocks: Sequential -> Sequential"),
    ],
    ids=["other classes", "the exits are gone"],
)
def test_a_change_that_the_exits_do_not_fit_is_refused_and_named(change: Callable[[Any], None], told: str) -> None:
    net, branched, x = branched_net()
    change(net)
    with pytest.raises(ee.ExitPointError, match="was changed after it got its exits") as refused:
        branched(x)
    assert told in str(refused.value)
    assert "ee.augment again" in str(refused.value)


def test_flags_new_weights_and_dtypes_are_no_change_of_function() -> None:
    net, branched, x = branched_net()
    net.train()
    net.requires_grad_(False)
    branched(x)
    assert len(branched.engine.programs) == 1
    net.load_state_dict(deepcopy(net.state_dict()), assign=True)
    with torch.no_grad():
        net.head.bias.add_(1.0)
        torch.testing.assert_close(branched(x), deepcopy(net).eval()(x))
    assert len(branched.engine.programs) == 1
    assert branched.receipt().altered == ()
    assert branched.receipt().changed == ["head.bias"]


class Counting(nn.Module):
    """Keeps what it saw last, as many modules do: for a loss, a plot, a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.scale = 1.0
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach()
        return x + self.scale * self.linear(x)


def test_saving_the_original_is_no_change_of_function(tmp_path: Path) -> None:
    entry = BY_NAME["hf-ViT"]
    model = entry.make().eval()
    branched = ee.augment(model, 2, sample=entry.sample())
    model.config.dtype = None
    branched.predict(entry.sample())
    known = len(branched.engine.programs)
    model.save_pretrained(tmp_path)  # transformers writes several attributes of the configuration
    assert model.config.dtype is not None
    branched.predict(entry.sample())
    assert branched.receipt().unchanged
    assert len(branched.engine.programs) == known


def test_attributes_that_a_call_itself_sets_are_no_change() -> None:
    net = nn.Sequential(*(Counting() for _ in range(3)), nn.Linear(6, 4)).eval()
    branched = ee.augment(net, 1, sample=torch.randn(2, 6))
    branched.operate(thresholds=2.0)
    x = torch.randn(3, 6)
    for _ in range(3):
        with torch.no_grad():
            expected = net(x)  # the owner's call counts on
        torch.testing.assert_close(branched(x), expected)
    assert len(branched.engine.programs) == 1
    net[1].scale = 0.1  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with torch.no_grad():
        torch.testing.assert_close(branched(x), net(x))
    assert len(branched.engine.programs) == 2


def test_the_original_never_sees_what_running_sets() -> None:
    net = nn.Sequential(Counting(), nn.Linear(6, 4)).train()
    branched = ee.augment(net, 1, sample=torch.randn(2, 6))
    branched(torch.randn(3, 6))
    assert net[0].calls == 0
    assert all(module.training for module in net.modules())


def test_a_twin_shares_tensors_and_nothing_else() -> None:
    net = Net().train()
    other: Any = twin(net)
    live: Any = twin(net, live=True)
    assert not any(module.training for module in [*other.modules(), *live.modules()])
    assert all(module.training for module in net.modules())
    assert all(a is b for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert other.blocks[0].mask is net.blocks[0].mask
    other.blocks[0].scale, other.head = 3.0, nn.Identity()
    assert net.blocks[0].scale == 1.0
    net.double()
    assert all(tensor.dtype == torch.float64 for tensor in live.state_dict().values() if tensor.is_floating_point())


def test_what_cannot_be_copied_is_shared_with_the_twin() -> None:
    net: Any = Net()
    net.lock = threading.Lock()
    assert twin(net).lock is net.lock
    branched = ee.augment(net.eval(), 1, sample=torch.randn(2, 3, 8, 8))
    assert branched(torch.randn(2, 3, 8, 8)).shape == (2, 5)


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(output)


def test_hooks_of_an_object_outside_the_model_still_reach_that_object() -> None:
    net, recorder = Net().eval(), Recorder()
    net.head.register_forward_hook(recorder.keep)
    branched = ee.augment(net, 1, sample=torch.randn(2, 3, 8, 8))
    recorder.seen.clear()
    answer = branched(torch.randn(2, 3, 8, 8))
    assert len(recorder.seen) == 1
    assert torch.equal(recorder.seen[0], answer)


def test_a_signature_names_what_changed() -> None:
    net = Net()
    signature = Signature(net)
    assert signature.current()
    assert signature.differences() == []
    net.blocks[1].scale = 2.0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    net.config.activation = "tanh"
    net.blocks[2].register_forward_hook(lambda *_: None)
    assert not signature.current()
    told = "\n".join(signature.differences())
    assert "blocks.1.scale: 1.0 -> 2.0" in told
    assert "config.activation: 'relu' -> 'tanh'" in told
    assert "blocks.2.hooks" in told


def test_a_pickled_or_copied_model_reads_its_own_original() -> None:
    net, branched, x = branched_net()
    again = pickle.loads(pickle.dumps(branched))
    copied = branched.copy()
    net.blocks[1].scale = 0.0
    torch.testing.assert_close(again(x), copied.backbone(x), rtol=1e-4, atol=1e-4)
    again.operate(thresholds=2.0)
    again.backbone.blocks[1].scale = 0.0  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue, reportOptionalSubscript]
    torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-4)


def test_hooks_of_transformers_that_only_look_on_are_no_change() -> None:
    model = BY_NAME["hf-ViT"].make().eval()
    x = BY_NAME["hf-ViT"].sample()
    branched = ee.augment(model, 1, sample=x)
    branched.operate(thresholds=2.0)
    before = branched.predict(x).logits
    assert model(x, output_hidden_states=True).hidden_states is not None
    assert any(module._forward_hooks for module in model.modules())
    assert branched.receipt().unchanged
    assert torch.equal(branched.predict(x).logits, before)
    assert len(branched.engine.programs) == 1  # nothing was captured anew
    model.classifier.register_forward_hook(lambda module, given, answer: answer + 1)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert not branched.receipt().unchanged
    torch.testing.assert_close(branched.predict(x).logits, before + 1, rtol=1e-4, atol=1e-4)
