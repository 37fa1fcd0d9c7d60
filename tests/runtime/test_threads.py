"""One model, many threads: every answer belongs to its own call, and no call changes the original."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

import ee_surgery as ee
from benchmarks.threads import Traffic, aftermath, image_subject, text_subject
from ee_surgery.graph import capture
from recipes.networks import CifarResNet
from tests import zoo


def test_every_answer_under_traffic_is_that_of_a_serial_run_and_nothing_is_broken_afterwards() -> None:
    subjects = [image_subject([24, 28]), text_subject([8, 10])]
    tally = Traffic(subjects, threads=4, calls=7, rare=0.15).run()
    assert tally.calls.total() >= 28
    assert {kind for kind in tally.calls if "torch." in kind}  # of another dtype, captured meanwhile
    assert not tally.wrong, (tally.wrong, tally.failures)
    assert aftermath(subjects) == []


def _branched() -> tuple[CifarResNet, ee.EarlyExitModel, Tensor]:
    model = CifarResNet(8).eval()
    branched = ee.augment(model, 2, branch="pool", sample=torch.randn(2, 3, 32, 32))
    branched.operate(thresholds=-1.0)
    return model, branched, torch.randn(5, 3, 32, 32)


class _Paused:
    """torch.export.export, stopped in the middle of a capture until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        export = torch.export.export

        def paused(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            def hold(*_: object) -> None:
                if get_proxy_mode() is None:
                    return  # export has not begun to trace
                self.reached.set()
                assert self.go_on.wait(60)

            module.register_forward_pre_hook(hold)
            return export(module, *args, **kwargs)

        monkeypatch.setattr(capture.torch.export, "export", paused)


def test_calls_of_known_sizes_and_the_original_are_served_while_another_size_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, branched, x = _branched()
    with torch.no_grad():
        routed, plain = branched.predict(x), model(x)
    paused = _Paused(monkeypatch)
    larger = torch.randn(5, 3, 40, 40)
    with ThreadPoolExecutor(3) as pool:
        capturing = pool.submit(branched.predict, larger)
        assert paused.reached.wait(60)
        # export holds the twin's tensors as fake ones now; nothing of that shows here
        assert not any(type(t) is not torch.nn.Parameter for t in model.parameters())
        again = pool.submit(branched.predict, x).result(60)
        assert torch.equal(again.logits, routed.logits)
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        model.train()
        assert torch.equal(pool.submit(branched.predict, x).result(60).logits, routed.logits)
        same_size = pool.submit(branched.predict, larger)
        paused.go_on.set()
        torch.testing.assert_close(capturing.result(60).logits, same_size.result(60).logits)
    assert all(module.training for module in model.modules())
    assert branched.receipt().unchanged
    assert len(branched.engine.programs) == 2


def test_symbolic_sizes_are_compared_while_another_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = zoo.graph("hf-ViT")  # its batch is another symbol
    shapes = [value.shape for node in graph.capture.nodes if isinstance(value := node.meta["val"], Tensor)]
    same = [shape == shapes[0] for shape in shapes]
    paused = _Paused(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        capturing = pool.submit(ee.inspect, CifarResNet(8).eval(), torch.randn(2, 3, 32, 32))
        try:
            assert paused.reached.wait(60)
            assert [shape == shapes[0] for shape in shapes] == same
        finally:
            paused.go_on.set()
        assert capturing.result(60).points


def test_an_original_in_train_mode_answers_as_in_eval_mode_and_keeps_its_statistics_and_flags() -> None:
    model, branched, x = _branched()
    expected = branched.predict(x)
    with torch.no_grad():
        plain = model(x)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model.layer2.eval()  # a part of it, as fine-tuning often has it
    flags = [module.training for module in model.modules()]
    assert torch.equal(branched.predict(x).logits, expected.logits)
    branched.predict(torch.randn(2, 3, 24, 24))  # captured
    branched.operate(None)
    assert torch.equal(branched(x), plain)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def _in_thread(call: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_exits_are_disabled_in_one_thread_alone() -> None:
    _, branched, x = _branched()
    with branched.exits_disabled():
        assert branched.predict(x).exit_index.tolist() == [2] * 5
        assert _in_thread(lambda: branched.predict(x).exit_index).tolist() == [0] * 5
        with branched.exits_disabled():
            pass
        assert branched.policy is None
    assert branched.predict(x).exit_index.tolist() == [0] * 5
    other = branched.with_exits(branched.exits)
    other.operate(thresholds=-1.0)
    with branched.exits_disabled():
        assert other.predict(x).exit_index.tolist() == [0] * 5


def test_exits_are_disabled_in_one_asyncio_task_alone() -> None:
    _, branched, x = _branched()

    async def disabled() -> Tensor:
        with branched.exits_disabled():
            await asyncio.sleep(0.01)
            return (await asyncio.to_thread(branched.predict, x)).exit_index

    async def usual() -> Tensor:
        await asyncio.sleep(0.005)
        return (await asyncio.to_thread(branched.predict, x)).exit_index

    async def both() -> tuple[Tensor, Tensor]:
        return await asyncio.gather(disabled(), usual())

    off, on = asyncio.run(both())
    assert off.tolist() == [2] * 5
    assert on.tolist() == [0] * 5


def test_two_models_augmented_at_once_come_out_as_one_after_the_other() -> None:
    sample = torch.randn(2, 3, 32, 32)
    models = [CifarResNet(depth).eval() for depth in (8, 14, 20, 8)]
    serial = [ee.augment(model, 2, sample=sample) for model in models]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda model: ee.augment(model, 2, sample=sample), models))
    for one, other in zip(serial, together, strict=True):
        assert one.exits == other.exits
        for a, b in zip(one.branches.parameters(), other.branches.parameters(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(one.all_exits(sample), other.all_exits(sample))
