"""`branched.compile`: compiled routed runs answer as eager ones do, copy no weights and compile once."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import shutil
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.policies.operating_point import OperatingPoint
from tests.zoo import BY_NAME, POLICIES, SPECIAL, graph, two_exits

INF = math.inf
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", sysconfig.get_config_var("CXX").split()[0]))),
    reason="torch.compile's inductor needs a C++ compiler: install g++",
)
once_compiled = partial(torch.compiler.set_stance, "fail_on_recompile")


def split(model: ee.EarlyExitModel, x: Tensor, score: str = "max_prob") -> None:
    """Thresholds between two scores of the batch, so that it is split at each exit."""
    records = ee.record(model, [x], batch_size=len(x))
    taus = [(row.sort().values[len(row) // 2 - 1 : len(row) // 2 + 1]).mean().item() for row in records.scores(score)]
    model.operate(thresholds=taus, score=score)


def agree(model: ee.EarlyExitModel, x: Tensor, expected: ee.ExitOutput, rows: slice = slice(None)) -> None:
    found = model.predict(x[rows])
    assert torch.equal(found.exit_index, expected.exit_index[rows])
    torch.testing.assert_close(found.logits, expected.logits[rows], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.score, expected.score[rows], rtol=1e-3, atol=1e-4, equal_nan=True)
    assert torch.equal(found.macs, expected.macs[rows])


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("cifar-resnet20", "pool"),
        ("cifar-resnet20", "shortcut"),
        ("test_vit", "pool"),
        pytest.param("densenet121", "conv", marks=pytest.mark.slow),
        pytest.param("hf-Swin", "pool", marks=pytest.mark.slow),
        pytest.param("hf-Beit", "shortcut", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_run_answers_as_an_eager_one_at_every_batch_size(name: str, branch: str) -> None:
    model, x = ee.attach(graph(name), ee.place(graph(name), 2), branch), BY_NAME[name].sample(8)
    split(model, x)
    expected = model.predict(x)
    model.compile(backend="eager")
    agree(model, x, expected)
    with once_compiled():
        for rows in (slice(1), slice(2), slice(1, 4), slice(7, 8), slice(3, 8)):
            agree(model, x, expected, rows)


@pytest.mark.parametrize(("name", "branch"), [("cifar-resnet20", "shortcut"), ("hf-Swin", "pool")])
def test_padded_batches_answer_alike_and_run_at_powers_of_two(name: str, branch: str) -> None:
    """CUDA graphs are of one size: there are few sizes to record, and the samples that pad change nothing."""
    model, x = ee.attach(graph(name), ee.place(graph(name), 2), branch), BY_NAME[name].sample(8)
    split(model, x)
    expected = model.predict(x)
    sizes: list[int] = []

    def backend(module: Any, inputs: list[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            sizes.extend({value for value in values if isinstance(value, int)})
            return module.forward(*values)

        return run

    model.compile(backend=backend, pad=True)
    agree(model, x, expected)
    sizes.clear()
    with once_compiled():
        for rows in (slice(1), slice(5), slice(1, 4), slice(2, 8)):
            agree(model, x, expected, rows)
    assert {2, 4, 8} <= set(sizes)
    assert not {3, 5, 6, 7} & set(sizes)


@pytest.mark.parametrize(
    ("branch", "score", "fallback", "confidence"),
    POLICIES,
)
@pytest.mark.parametrize("pad", [False, True])
def test_scores_with_state_chains_and_fallbacks(
    branch: str, score: str, fallback: str, confidence: bool, pad: bool
) -> None:
    model, x = two_exits(branch, confidence), torch.randn(12, 3, 16, 16)
    point = OperatingPoint.by_hand([INF, INF], score, 2)
    rows = ee.record(model, [x], batch_size=12).scores(score)
    middle = [(row.sort().values[5] + 1e-6).item() for row in rows]
    model.compile(backend="eager", pad=pad)
    for thresholds in ((middle[0], INF), (INF, middle[1]), tuple(middle), (-INF, INF)):
        model.operate(replace(point, thresholds=thresholds, fallback=fallback))
        found = [model.predict(x[:1]), model.predict(x)]
        chosen, model.engine.compilation = model.engine.compilation, None
        eager = [model.predict(x[:1]), model.predict(x)]
        model.engine.compilation = chosen
        for one, other in zip(found, eager, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("method", ["eenet", "classwise", "scaled", "stopping"])
def test_fitted_scores_are_inputs_so_that_another_operating_point_compiles_nothing(method: str) -> None:
    model, x = two_exits(), torch.randn(96, 3, 16, 16)
    frontier = ee.calibrate(model, [(x, torch.randint(10, (96,)))], method=method)
    points = [point for point in frontier if not point.policy.closed]
    expected = []
    for point in points:
        model.operate(point)
        expected.append(model.predict(x))
    model.compile(backend="eager")
    visited: set[tuple[bool, ...]] = set()
    for point, output in zip(points, expected, strict=True):
        model.operate(point)
        if (visits := point.policy.visits()) in visited:
            with once_compiled():
                agree(model, x, output)
        else:
            agree(model, x, output)
        visited.add(visits)


def _random_sizes(model: ee.EarlyExitModel, times: int, largest: int) -> None:
    x = torch.randn(largest, 3, 16, 16)
    split(model, x)
    expected = model.predict(x)
    choose = random.Random(0)
    with once_compiled():
        for _ in range(times):
            start = choose.randrange(largest)
            agree(model, x, expected, slice(start, start + choose.randint(1, largest)))


def test_nothing_is_compiled_after_the_first_calls() -> None:
    model = two_exits()
    model.compile(backend="eager")
    _random_sizes(model, 50, 40)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_nothing_is_compiled_in_a_thousand_random_batches(freeze: bool) -> None:
    model = two_exits("conv2")
    model.compile(freeze=freeze)
    _random_sizes(model, 1000, 70)


def _storages() -> dict[int, int]:
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and type(thing).__name__ != "FakeTensor"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.layout is torch.strided}


@pytest.mark.filterwarnings("ignore")  # the garbage collector's list has deprecated objects of torch
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_no_weight_is_copied(backend: str) -> None:
    model, x = two_exits(), torch.randn(2, 3, 16, 16)
    model.operate(thresholds=2.0)
    model.predict(x)
    before = _storages()
    model.compile(backend=backend)
    model.predict(x)
    new = {place: size for place, size in _storages().items() if place not in before}
    assert sum(new.values()) < 0.1 * sum(tensor.nbytes for tensor in model.state_dict().values())
    assert model.engine.frozen_mib == 0


def _changed(module: nn.Module, assign: bool = False) -> None:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)


@pytest.mark.parametrize(
    ("backend", "freeze"), [("eager", False), pytest.param("inductor", True, marks=[pytest.mark.slow, needs_compiler])]
)
def test_weights_that_change_are_those_of_the_next_call(backend: str, freeze: bool) -> None:
    model, x = two_exits(), torch.randn(6, 3, 16, 16)
    model.compile(backend=backend, freeze=freeze)
    split(model, x)
    model.predict(x)
    assert (model.engine.frozen_mib > 0) is freeze
    changes: list[Callable[[], object]] = [
        lambda: _changed(model.unload()),
        lambda: _changed(model.unload(), assign=True),
        lambda: _changed(model.branches),
        model.double,  # which no processor has packed convolutions for
    ]
    for change in changes[: 3 if freeze else 4]:
        change()
        inputs = x.to(next(model.parameters()).dtype)
        eager = model.copy()
        eager.compile(disable=True)
        agree(model, inputs, eager.predict(inputs))


def test_torch_compile_of_the_model_says_what_to_do_or_runs_the_compiled_parts() -> None:
    model, x = two_exits(), torch.randn(4, 3, 16, 16)
    split(model, x)
    expected = model(x)
    for fullgraph in (False, True):
        wrapped = torch.compile(model, backend="eager", fullgraph=fullgraph)
        with pytest.raises(ee.ConfigError, match=r"call branched\.compile\(\)"):
            wrapped(x)
    assert model.compile(backend="eager") is None
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    inside: Any = torch.compile(lambda x: model(x).softmax(-1), backend="eager")
    torch.testing.assert_close(inside(x), expected.softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mod": "default"}, "no option 'mod'. Did you mean 'mode'"),
        ({"dynamic": False}, "symbolic batch"),
        ({"fullgraph": False}, "one graph"),
        ({"backend": "inductro"}, "does not take"),
        ({"backend": "eager", "freeze": True}, "freeze=True is for the backend 'inductor'"),
        ({"freeze": 1}, "freeze"),
        ({"mode": "default", "options": {"cpp_wrapper": True}}, "does not take"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    model = two_exits()
    with pytest.raises(ee.ConfigError, match=message):
        model.compile(**options)
    assert model.engine.compilation is None


def _refuse(module: torch.fx.GraphModule, inputs: object) -> Any:
    class InvalidCxxCompiler(RuntimeError):
        pass

    raise InvalidCxxCompiler("no g++")


def _broken(module: torch.fx.GraphModule, inputs: object) -> Any:
    raise RuntimeError("an unknown operator")


def test_what_cannot_be_compiled_at_all_is_an_error_that_says_why() -> None:
    model, x = two_exits(), torch.randn(4, 3, 16, 16)
    model.operate(thresholds=0.5)
    model.compile(backend=_refuse)
    with pytest.raises(ee.ConfigError, match=r"install g\+\+"):
        model.predict(x)
    model.compile(backend=_broken)
    with pytest.warns(ee.SurgeryWarning, match="runs eagerly"), pytest.raises(ee.ConfigError, match="unknown operator"):
        model.predict(x)
    model.compile(disable=True)
    assert model.predict(x).logits.shape == (4, 10)


class _Unread(nn.Module):
    """Code that dynamo does not read."""

    def forward(self, x: Tensor) -> Tensor:
        return _unread(x)


_unread: Any = torch.compiler.disable(torch.relu)


@pytest.mark.parametrize(("exits", "named"), [(["1", "3"], "1"), (["0", "3"], "3")], ids=str)
def test_a_part_that_cannot_be_compiled_runs_eagerly_and_is_named(exits: list[str], named: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), _Unread(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = ee.augment(nn.Sequential(*layers).eval(), exits, branch="pool", sample=torch.randn(4, 8), opaque=["1"])
    x = torch.randn(8, 8)
    split(model, x)
    expected = model.predict(x)
    model.compile(backend="eager")
    with pytest.warns(ee.SurgeryWarning, match=f"The stage up to {named} and its branch runs eagerly"):
        agree(model, x, expected)
    with once_compiled():
        for start, stop in ((0, 1), (1, 2), (2, 3), (3, 4), (0, 3), (0, 8)):
            agree(model, x, expected, slice(start, stop))


def test_copies_carry_the_choice_and_compile_on_their_own() -> None:
    model, x = two_exits(), torch.randn(6, 3, 16, 16)
    split(model, x)
    expected = model.predict(x)
    model.compile(backend="eager")
    agree(model, x, expected)
    for other in (model.copy(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.engine.compilation is not None
        assert other.engine.compilation.options == {"backend": "eager"}
        agree(other, x, expected)
    assert model.with_exits(model.exits[:1]).engine.compilation is model.engine.compilation
    model.compile(disable=True)
    assert model.engine.compilation is None
    agree(model, x, expected)


def test_a_changed_original_observers_and_disabled_exits() -> None:
    model, x = two_exits(), torch.randn(6, 3, 16, 16)
    split(model, x)
    model.compile(backend="eager")
    expected = model.predict(x)
    seen: list[int] = []
    model.engine.observers = (
        lambda k, arrived, leaving, staying: seen.append(0 if leaving is None else len(leaving.logits)),
    )
    agree(model, x, expected)
    agree(model, x, expected, slice(1))
    assert sum(seen) == 7
    model.engine.observers = ()
    with model.exits_disabled(), torch.no_grad():
        assert torch.equal(model(x), model.unload()(x))
    hook = model.unload().register_forward_hook(lambda module, inputs, output: torch.mul(output, 2))
    model.operate(thresholds=2.0)
    torch.testing.assert_close(model.predict(x).logits, model.unload()(x))
    hook.remove()
    torch.testing.assert_close(model.predict(x).logits, model.unload()(x))


def test_threads_share_what_is_compiled() -> None:
    model, x = two_exits(), torch.randn(24, 3, 16, 16)
    split(model, x)
    expected = model.predict(x)
    model.compile(backend="eager")
    choose = random.Random(0)
    rows = [slice(start := choose.randrange(20), start + choose.randint(1, 20)) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda each: agree(model, x, expected, each), rows):
            pass


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("special", "freeze"), [("hf-BertForSequenceClassification", True), ("headless-timm", False)])
def test_inductor_compiles_texts_and_new_heads(special: str, freeze: bool) -> None:
    found = next(each for each in SPECIAL if each.name == special)
    model = found.augment()
    batch = model.engine.backbone.own_batch()
    model.operate(thresholds=[0.5, 0.0])
    expected = model.predict(batch.arguments)
    model.compile(freeze=freeze)
    output = model.predict(batch.arguments)
    assert torch.equal(output.exit_index, expected.exit_index)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-4)
