"""Backends: every one runs a segment to the same numbers, at any batch size, over the original's own tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import ee_surgery as ee
from ee_surgery.graph.backends import BACKENDS, BoundWeights, Run
from ee_surgery.graph.backends.base import bind
from ee_surgery.graph.backends.graph_module import to_graph_module
from ee_surgery.graph.segments import Segment, compact, cut
from tests.zoo import BY_NAME, graph, original

NAMES = ["cifar-resnet20", "test_vit", "test_efficientnet", "densenet121", "hf-Swin", "hf-Beit"]


def _segments(name: str) -> list[Segment]:
    found = graph(name)
    return cut(found.capture, found.liveness, [point.index for point in ee.place(found, 2).points])


def _run(segments: list[Segment], name: str, backend: str, x: Tensor, keep: list[list[int]]) -> Tensor:
    """The logits where only the samples `keep` go on behind each cut."""
    live = (x,)
    for k, segment in enumerate(segments):
        live = bind(backend, segment, lambda _: original(name))(*live)
        if k < len(keep):
            live = compact(live, segments[k + 1].axes, torch.tensor(keep[k]))
    return live[0]


@pytest.mark.parametrize("name", NAMES)
def test_all_backends_give_the_same_logits_for_small_batches_one_sample_and_after_compaction(name: str) -> None:
    segments = _segments(name)
    with torch.no_grad():
        for x, keep in (
            (BY_NAME[name].sample(5), [[4, 0, 2], [1]]),
            (BY_NAME[name].sample(2), [[1, 0], [0, 1]]),
            (BY_NAME[name].sample(1), [[0], [0]]),
        ):
            expected = _run(segments, name, "python", x, keep)
            torch.testing.assert_close(_run(segments, name, "graph_module", x, keep), expected, rtol=1e-4, atol=1e-5)


def test_a_graph_module_holds_none_of_the_originals_tensors_and_takes_them_as_inputs() -> None:
    for segment in _segments("cifar-resnet20"):
        module = to_graph_module(segment)
        assert not list(module.parameters())
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        assert len(placeholders) == len(segment.given) + len(segment.weights)
        assert set(segment.weights.values()) <= {name for name, _ in graph("cifar-resnet20").backbone.tensors()}


@pytest.mark.parametrize("backend", ["python", "graph_module"])
def test_weights_that_the_owner_replaces_are_bound_at_the_next_call(backend: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    branched = ee.augment(model, ["0"], branch="pool", sample=torch.randn(3, 8))
    branched.engine.backend = backend
    branched.operate(thresholds=2.0)
    x = torch.randn(4, 8)
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(changed, assign=True)
    torch.testing.assert_close(branched.predict(x).logits, model(x))
    branched.double()
    torch.testing.assert_close(branched.predict(x.double()).logits, model(x.double()))


@pytest.mark.parametrize("training", [False, True])
def test_both_backends_learn_alike_through_the_segments_of_a_shortcut(training: bool) -> None:
    found = graph("cifar-resnet20")
    live = found.live[found["layer1"].index]
    segment = Segment.of(
        found.capture, found.liveness, live, [found.capture.output], found["layer1"].index + 1,
        len(found.capture.nodes), learning=True,
    )  # fmt: skip
    x, answers = torch.randn(4, *found["layer1"].shape), []
    for backend in ("python", "graph_module"):
        model = copy.deepcopy(original("cifar-resnet20"))
        (logits,) = bind(backend, segment, lambda _, model=model: model)(x, op_training=training)
        logits.sum().backward()
        buffers = [buffer.float() for name, buffer in model.named_buffers() if "running" in name]
        answers.append([logits.detach(), *buffers, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)


def test_a_backend_of_the_users_own_serves_a_whole_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(BACKENDS, "_items", dict(BACKENDS._items))  # so that others do not see it
    calls: list[str] = []

    @BACKENDS.register("interpreted")
    def interpreted(segment: Segment, weights: BoundWeights) -> Run:
        interpreter = fx.Interpreter(to_graph_module(segment))

        def run(*live: Tensor) -> tuple[Tensor, ...]:
            calls.append("interpreted")
            return interpreter.run(*live, *weights())

        return run

    branched = ee.attach(graph("cifar-resnet20"), ee.place(graph("cifar-resnet20"), 2), "pool")
    branched.operate(thresholds=0.12)
    x = BY_NAME["cifar-resnet20"].sample(6)
    expected = branched.predict(x)
    branched.engine.backend = "interpreted"
    calls.clear()
    found = branched.predict(x)
    assert calls
    assert torch.equal(found.exit_index, expected.exit_index)
    torch.testing.assert_close(found.logits, expected.logits)
    assert branched.with_exits(branched.exits[:1]).engine.backend == "interpreted"
    data = [(x, torch.arange(6))]
    ee.train(branched, data, ee.TrainConfig(epochs=1, progress=False))
    ee.calibrate(branched, data)
    branched.operate(max_accuracy_drop=1.0)
    again = ee.from_pretrained(branched.save_pretrained(tmp_path), branched.unload())
    assert torch.equal(again.predict(x).exit_index, branched.predict(x).exit_index)


def test_unknown_and_failing_backends_leave_the_one_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS, "_items", dict(BACKENDS._items))

    @BACKENDS.register("wrong")
    def wrong(segment: Segment, weights: BoundWeights) -> Run:
        exact = BACKENDS["python"](segment, weights)
        return lambda *live: tuple(2 * tensor for tensor in exact(*live))

    branched = ee.attach(graph("cifar-resnet20"), ee.place(graph("cifar-resnet20"), 2), "pool")
    with pytest.raises(ee.UnknownNameError, match=r"No backend 'pyhton'. Did you mean 'python'"):
        branched.engine.backend = "pyhton"
    with pytest.raises(ee.ExitPointError, match="does not give its own logits"):
        branched.engine.backend = "wrong"
    assert branched.engine.backend == "python"
    branched.operate(thresholds=2.0)
    assert branched.predict(BY_NAME["cifar-resnet20"].sample(2)).logits.shape == (2, 10)
