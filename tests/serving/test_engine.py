"""`ee.Engine`: each request gets what `predict` gives it alone, whatever runs beside it, fails or is called off."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.backbone.inputs import Batch
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.runtime.router import InFlight, Router
from ee_surgery.serving import engine as module
from ee_surgery.serving.routes import Route
from tests.zoo import BY_NAME, POLICIES, SPECIAL, branched, two_exits


def split(model: ee.EarlyExitModel, *inputs: Any, score: str = "max_prob", fallback: str = "last") -> None:
    """Thresholds that half of these samples reach at each exit, where no score is near."""
    rows = torch.cat([ee.record(model, [each], batch_size=64).scores(score) for each in inputs], 1)
    taus = []
    for row in rows.double():
        ranked = row.sort().values
        middle = ranked[len(ranked) // 4 : -len(ranked) // 4 or None]
        at = int(middle.diff().argmax())
        taus.append(middle[at : at + 2].mean().item())
    model.operate(replace(OperatingPoint.by_hand(taus, score), fallback=fallback))


def agree(found: ee.ExitOutput, alone: ee.ExitOutput) -> None:
    assert type(found) is type(alone)
    assert torch.equal(found.exit_index, alone.exit_index)
    assert torch.equal(found.macs, alone.macs)
    assert found.original_macs == alone.original_macs
    torch.testing.assert_close(found.logits, alone.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.score, alone.score, rtol=1e-3, atol=1e-4, equal_nan=True)


class Held:
    """A stage of an engine that stops until it is told to go on, so that requests pile up behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Route]) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.sizes: list[tuple[int, int]] = []
        visit = kind.visit

        def held(route: Any, k: int, flight: Any, *observe: Any) -> Any:
            self.reached.set()
            assert self.go_on.wait(60)
            self.sizes.append((k, len(flight.live[0])))
            return visit(route, k, flight, *observe)

        monkeypatch.setattr(kind, "visit", held)


# --- the same answers


def _traffic(
    model: ee.EarlyExitModel, inputs: list[Tensor], clients: int, requests: int, **options: Any
) -> ee.EngineStats:
    def client(number: int, engine: ee.Engine) -> list[tuple[Tensor, Any]]:
        choose, found = random.Random(number), []
        for _ in range(requests):
            x = choose.choice(inputs)
            rows = [choose.randrange(len(x)) for _ in range(choose.randint(1, 7))]
            found.append((x[rows], engine.submit(x[rows], wait_s=60)))
        return [(given, future.result(60)) for given, future in found]

    with ee.Engine(model, **options) as engine, ThreadPoolExecutor(clients) as pool:
        jobs = [pool.submit(client, number, engine) for number in range(clients)]
        for job in jobs:
            for given, found in job.result():
                agree(found, model.predict(given))
    return engine.stats()


def test_answers_of_many_clients_are_those_of_each_request_alone() -> None:
    model = branched("test_resnet")
    inputs = [torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in (64, 96)]
    split(model, *inputs)
    stats = _traffic(model, inputs, clients=8, requests=12, max_batch=16)
    model.operate(None)
    assert (stats.answered, stats.failed, stats.pending) == (96, 0, 0)
    assert sum(stats.exits) == stats.stages[0].samples
    assert all(each.batches < stats.answered for each in stats.stages)  # they shared


@pytest.mark.slow
def test_answers_of_eight_clients_with_five_hundred_requests_each() -> None:
    model = branched("test_resnet")
    inputs = [torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in (64, 96)]
    split(model, *inputs)
    stats = _traffic(model, inputs, clients=8, requests=500)
    model.operate(None)
    assert (stats.answered, stats.failed) == (4000, 0)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    most=st.integers(1, 8),
    seed=st.integers(0, 99),
    offline=st.booleans(),
)
def test_any_sizes_of_requests_and_batches_give_the_answers_of_each_alone(
    sizes: list[int], most: int, seed: int, offline: bool
) -> None:
    model = _shared()
    x = torch.randn(sum(sizes), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    split(model, x) if len(x) > 7 else model.operate(thresholds=0.2)
    with ee.Engine(model, max_batch=most) as engine:
        parts = x.split(sizes)
        futures = [engine.submit(part) for part in parts]
        found = [*engine.map(parts)] if offline else [future.result(60) for future in futures]
    scores = ee.record(model, [x], batch_size=len(x)).scores("max_prob")
    taus = torch.tensor(model.operating_point.thresholds)[:, None]
    near = ((scores - taus).abs().amin(0) < 1e-6).split(sizes)
    for part, answer, close in zip(parts, found, near, strict=True):
        if not close.any():
            agree(answer, model.predict(part))


_MODELS: list[ee.EarlyExitModel] = []


def _shared() -> ee.EarlyExitModel:
    if not _MODELS:
        _MODELS.append(two_exits())
    return _MODELS[0]


@pytest.mark.parametrize(("branch", "score", "fallback", "confidence"), POLICIES)
def test_what_is_carried_from_exit_to_exit_stays_with_its_sample(
    branch: str, score: str, fallback: str, confidence: bool
) -> None:
    model, x = two_exits(branch, confidence), torch.randn(40, 3, 16, 16)
    split(model, x, score=score, fallback=fallback)
    with ee.Engine(model, max_batch=8) as engine:
        parts = x.split([1, 7, 3, 20, 9])
        for part, future in [(part, engine.submit(part)) for part in parts]:
            agree(future.result(60), model.predict(part))
        for part, answer in zip(parts, engine.map(parts), strict=True):
            agree(answer, model.predict(part))


@pytest.mark.parametrize("name", ["hf-Swin", "test_vit"])
def test_live_tensors_that_fold_the_batch_are_regrouped(name: str) -> None:
    model, x = branched(name), BY_NAME[name].sample(9)
    split(model, x)
    with ee.Engine(model, max_batch=4) as engine:
        for part, answer in zip(x.split([2, 4, 3]), engine.map(x.split([2, 4, 3])), strict=True):
            agree(answer, model.predict(part))
    model.operate(None)


def test_texts_with_masks_are_served_by_name() -> None:
    model = next(each for each in SPECIAL if each.name == "hf-BertForSequenceClassification").augment()
    ids, mask = torch.randint(1, 99, (12, 8)), torch.ones(12, 8, dtype=torch.long)
    mask[::2, 6:] = 0
    whole = {"input_ids": ids, "attention_mask": mask}
    split(model, whole)
    with ee.Engine(model, max_batch=4) as engine:
        parts = [{name: tensor[i : i + 3] for name, tensor in whole.items()} for i in range(0, 12, 3)]
        for part, future in [(part, engine.submit(part)) for part in parts]:
            agree(future.result(60), model.predict(part))


def test_without_an_operating_point_the_original_answers_in_shared_batches(model: ee.EarlyExitModel) -> None:
    model.operate(None)
    x = torch.randn(12, 3, 16, 16)
    with ee.Engine(model, max_batch=8) as engine:
        for part, future in [(part, engine.submit(part)) for part in x.split(3)]:
            agree(future.result(60), model.predict(part))
        assert engine.submit(x[:0]).result(60).logits.shape == (0, 10)
    stats = engine.stats()
    assert stats.exits == [0, 0, 12]
    assert stats.whole.samples == 12
    assert model.receipt().unchanged


def test_compiled_runs_are_served(model: ee.EarlyExitModel) -> None:
    x = torch.randn(40, 3, 16, 16)
    expected = [model.predict(part) for part in x.split([1, 19, 7, 13])]
    model.compile(backend="eager")
    with ee.Engine(model, max_batch=16) as engine:
        engine.submit(x[:1]).result(60)
        with torch.compiler.set_stance("fail_on_recompile"):  # all sizes were compiled before the first request ran
            found = [*engine.map(x.split([1, 19, 7, 13]))]
    for one, other in zip(found, expected, strict=True):
        agree(one, other)


def test_a_folder_of_onnx_stages_is_served(model: ee.EarlyExitModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")
    from ee_surgery.onnx import OnnxModel, StagedModel

    folder = StagedModel(model.export(tmp_path / "stages", layout="stages"))
    x = torch.randn(40, 3, 16, 16)
    parts = [part.numpy() for part in x.split([1, 19, 7, 13])]
    with ee.Engine(folder, max_batch=8) as engine:
        futures = [engine.submit(part) for part in parts]
        for found in ([future.result(60) for future in futures], [*engine.map(parts)]):
            for part, answer in zip(parts, found, strict=True):
                for one, other in zip(answer, folder.run(part), strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        assert sum(engine.stats().exits) == 80
        wrong = engine.submit(np.zeros((2, 4, 16, 16), np.float32))
        fine = engine.submit(parts[1])
        with pytest.raises(Exception, match=r"INVALID|channel"):
            wrong.result(60)
        assert np.array_equal(fine.result(60).exit_index, folder.run(parts[1]).exit_index)
        for bad in ({}, {"other": parts[0]}, np.float32(1)):
            with pytest.raises(ee.DataError):
                engine.submit(bad)
    with pytest.raises(ee.ConfigError, match="layout"):
        ee.Engine(object.__new__(OnnxModel))  # pyright: ignore[reportArgumentType]


# --- the knob, and changes of the model


def test_requests_keep_the_operating_point_that_they_came_under(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(6, 3, 16, 16)
    with ee.Engine(model) as engine:
        model.operate(thresholds=-1.0)
        first = engine.submit(x)
        assert held.reached.wait(60)
        model.operate(thresholds=2.0)
        second = engine.submit(x)
        model.operate(None)
        third = engine.submit(x)
        model.operate(thresholds=-1.0)
        with model.exits_disabled():
            fourth = engine.submit(x)
        held.go_on.set()
        exits = [future.result(60).exit_index.tolist() for future in (first, second, third, fourth)]
    assert exits == [[0] * 6, [2] * 6, [2] * 6, [2] * 6]


def test_an_original_that_is_changed_meanwhile_is_run_as_it_is_now(model: ee.EarlyExitModel) -> None:
    x = torch.randn(6, 3, 16, 16)
    model.operate(thresholds=2.0)
    with ee.Engine(model) as engine:
        before = engine.submit(x).result(60)
        handle = model.backbone.linear.register_forward_hook(lambda *args: 2 * args[2])
        after = engine.submit(x).result(60)
        torch.testing.assert_close(after.logits, 2 * before.logits, rtol=1e-3, atol=1e-4)
        handle.remove()
        agree(engine.submit(x).result(60), before)


def test_autocast_of_the_caller_holds_for_the_request(model: ee.EarlyExitModel) -> None:
    x = torch.randn(6, 3, 16, 16)
    model.operate(thresholds=2.0)
    with ee.Engine(model) as engine:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast, expected = engine.submit(x).result(60), model.predict(x)
        plain = engine.submit(x).result(60)
    assert cast.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert plain.logits.dtype == torch.float32


# --- failures


def test_a_request_that_fails_fails_alone(
    model: ee.EarlyExitModel, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(20, 3, 16, 16)
    expected = [model.predict(part) for part in x.split(4)]
    x[8, 0, 0, 0] = 77.0
    advance, run = Router._advance, model.engine.run

    def refuse(inputs: Tensor) -> None:
        if inputs.shape[1:] == (3, 16, 16) and (inputs == 77.0).any():
            raise RuntimeError("poisoned")

    def advance_if_sound(router: Router, k: int, flight: InFlight) -> InFlight:
        refuse(flight.live[0])
        return advance(router, k, flight)

    def run_if_sound(batch: Batch, *how: Any) -> ee.ExitOutput:
        refuse(batch.tensors[0])
        return run(batch, *how)

    with ee.Engine(model, max_batch=32) as engine:
        blocker = engine.submit(x[:1])
        assert held.reached.wait(60)
        monkeypatch.setattr(Router, "_advance", advance_if_sound)
        monkeypatch.setattr(model.engine, "run", run_if_sound)
        futures = [engine.submit(part) for part in x.split(4)]  # share one batch
        held.go_on.set()
        blocker.result(60)
        for i, (future, alone) in enumerate(zip(futures, expected, strict=True)):
            if i == 2:
                with pytest.raises(RuntimeError, match="poisoned"):
                    future.result(60)
            else:
                agree(future.result(60), alone)
    stats = engine.stats()
    assert (stats.answered, stats.failed, stats.pending) == (5, 1, 0)


def test_pictures_of_nan_and_of_a_wrong_shape_disturb_no_other_request(model: ee.EarlyExitModel) -> None:
    x = torch.randn(8, 3, 16, 16)
    expected = model.predict(x)
    with ee.Engine(model) as engine:
        futures = [engine.submit(x), engine.submit(torch.full((3, 3, 16, 16), torch.nan)), engine.submit(x)]
        for wrong in (torch.randn(2, 4, 16, 16), torch.randn(3), None, {"pixels": x}, "x"):
            with pytest.raises(ee.SurgeryError):
                engine.submit(wrong)
        agree(futures[0].result(60), expected)
        agree(futures[2].result(60), expected)
        assert futures[1].result(60).exit_index.tolist() == [2] * 3  # what is not finite never leaves early


def test_a_mistake_of_the_worker_leaves_no_caller_waiting(
    model: ee.EarlyExitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    engine = ee.Engine(model)
    time.sleep(0.05)  # it waits for work now
    monkeypatch.setattr(module, "choose", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(ee.ServingError, match="ZeroDivisionError: ours"):
        engine.submit(torch.randn(1, 3, 16, 16)).result(60)
    with pytest.raises(ee.ServingError, match="closed"):
        engine.submit(torch.randn(1, 3, 16, 16))
    engine.close()


# --- limits


def test_a_full_queue_refuses_or_waits(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(4, 3, 16, 16)
    with ee.Engine(model, max_pending=8) as engine:
        first = [engine.submit(x), engine.submit(x)]
        with pytest.raises(ee.QueueFullError, match="max_pending=8"):
            engine.submit(x[:1])
        with pytest.raises(ee.QueueFullError):
            engine.submit(x[:1], wait_s=0.01)
        with pytest.raises(ee.DataError, match="split it"):
            engine.submit(torch.randn(9, 3, 16, 16))

        async def refused() -> None:
            await engine.submit_async(x, wait_s=0.01)

        with pytest.raises(ee.QueueFullError):
            asyncio.run(refused())
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(engine.submit, x, wait_s=60)
            held.go_on.set()
            agree(waiting.result(60).result(60), model.predict(x))
        assert all(future.result(60) for future in first)
        assert engine.stats().refused == 3


def test_a_cancelled_request_frees_its_room_and_runs_no_further(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(4, 3, 16, 16)
    with ee.Engine(model, max_pending=12, max_batch=4) as engine:
        model.operate(thresholds=2.0)
        first = engine.submit(x)
        assert held.reached.wait(60)
        second, third = engine.submit(x), engine.submit(x)
        assert second.cancel()
        fourth = engine.submit(x)
        assert first.cancel()  # in the middle of its first stage
        held.go_on.set()
        assert third.result(60)
        assert fourth.result(60)
    for future in (first, second):
        with pytest.raises(CancelledError):
            future.result(60)
    assert engine.stats().cancelled == 2
    assert engine.stats().pending == 0
    assert sum(size for k, size in held.sizes if k == 2) == 8


def test_a_late_request_fails_in_time_and_runs_no_further(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(4, 3, 16, 16)
    with ee.Engine(model, timeout_s=60) as engine:
        blocker = engine.submit(x[:1])
        assert held.reached.wait(60)
        late = engine.submit(x, timeout_s=0.01)
        fine = engine.submit(x)
        time.sleep(0.02)
        held.go_on.set()
        with pytest.raises(ee.RequestTimeoutError, match=r"0\.01 s"):
            late.result(60)
        assert isinstance(late.exception(), TimeoutError)
        agree(fine.result(60), model.predict(x))
        blocker.result(60)
    assert engine.stats().expired == 1
    assert sum(size for k, size in held.sizes if k == 0) == 5


def test_coroutines_ask_and_cancel(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(8, 3, 16, 16)

    async def main(engine: ee.Engine) -> list[Any]:
        tasks = [asyncio.create_task(engine.submit_async(part, wait_s=60)) for part in x.split(2)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        held.go_on.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with ee.Engine(model, max_pending=6) as engine:
        found = asyncio.run(main(engine))
    assert isinstance(found[1], asyncio.CancelledError)
    for i in (0, 2, 3):
        agree(found[i], model.predict(x[2 * i : 2 * i + 2]))


# --- the end


def test_closing_answers_what_is_in_and_takes_no_more(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(4, 3, 16, 16)
    engine = ee.Engine(model)
    futures = [engine.submit(x) for _ in range(5)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        time.sleep(0.001)
    with pytest.raises(ee.ServingError, match="closed"):
        engine.submit(x)
    held.go_on.set()
    closing.join(60)
    for future in futures:
        agree(future.result(0), model.predict(x))
    engine.close()


@pytest.mark.parametrize("stop", [{"drain": False}, {"timeout_s": 0.01}])
def test_closing_without_draining_fails_what_is_in(model: ee.EarlyExitModel, held: Held, stop: dict[str, Any]) -> None:
    engine = ee.Engine(model)
    futures = [engine.submit(torch.randn(4, 3, 16, 16)) for _ in range(3)]
    assert held.reached.wait(60)
    threading.Timer(0.1, held.go_on.set).start()
    engine.close(**stop)
    for future in futures:
        with pytest.raises(ee.ServingError, match="closed"):
            future.result(0)
    assert engine.stats().pending == 0


def test_an_error_inside_the_with_block_does_not_wait_for_requests(model: ee.EarlyExitModel, held: Held) -> None:
    def leave() -> Future[Any]:
        with ee.Engine(model) as engine:
            nonlocal future
            future = engine.submit(torch.randn(4, 3, 16, 16))
            threading.Timer(0.05, held.go_on.set).start()
            raise KeyError

    future: Any = None
    with pytest.raises(KeyError):
        leave()
    assert future.done()


def test_a_future_may_close_its_engine(model: ee.EarlyExitModel) -> None:
    engine = ee.Engine(model)
    future = engine.submit(torch.randn(4, 3, 16, 16))
    closed = threading.Event()
    future.add_done_callback(lambda _: (engine.close(), closed.set()))
    assert closed.wait(60)
    engine.close()


# --- offline


def test_offline_late_stages_see_full_batches_and_answers_come_in_order(model: ee.EarlyExitModel) -> None:
    x = torch.randn(400, 3, 16, 16)
    split(model, x)
    expected = model.predict(x)
    with ee.Engine(model, max_batch=16) as engine:
        found = [*engine.map(x.split(10))]
        stages = engine.stats().stages
    assert torch.cat([each.exit_index for each in found]).tolist() == expected.exit_index.tolist()
    for each in stages:
        # all full, but where the worker was faster than the loop that feeds it, and at the end
        assert each.batches <= each.samples / 16 + 4, stages


def test_a_loop_that_ends_early_calls_the_rest_off(model: ee.EarlyExitModel) -> None:
    with ee.Engine(model, max_batch=4) as engine:
        for _ in engine.map([torch.randn(4, 3, 16, 16)] * 50):
            break
    stats = engine.stats()
    assert 1 <= stats.answered < 50
    assert stats.cancelled > 0
    assert stats.pending == 0


def test_a_batch_that_fails_raises_where_its_answer_would_come(model: ee.EarlyExitModel) -> None:
    x = torch.randn(4, 3, 16, 16)
    with ee.Engine(model) as engine:
        answers = engine.map([x, torch.randn(4, 5, 16, 16), x])
        with pytest.raises(ee.CaptureError):
            list(answers)


def test_offline_work_lets_requests_go_first(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(200, 3, 16, 16)
    order: list[str] = []
    with ee.Engine(model, max_batch=8) as engine, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: [order.append("offline") for _ in engine.map(x.split(8))])
        assert held.reached.wait(60)
        urgent = engine.submit(x[:8])
        urgent.add_done_callback(lambda _: order.append("urgent"))
        held.go_on.set()
        urgent.result(60)
        answers.result(60)
    assert order.index("urgent") <= 3


# --- arguments


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"max_pending": -1}, {"timeout_s": 0}, {"profile": "fast"}, {"max_batch": 2.5}]
)
def test_invalid_settings_are_refused(model: ee.EarlyExitModel, options: dict[str, Any]) -> None:
    with pytest.raises(ee.ConfigError):
        ee.Engine(model, **options)


def test_a_profile_has_to_fit(model: ee.EarlyExitModel) -> None:
    profile = ee.profile(model, batch_size=4, seconds=0.01)
    with pytest.raises(ee.ConfigError, match="max_batch=8"):
        ee.Engine(model, max_batch=8, profile=profile)
    with pytest.raises(ee.ConfigError, match="3 exits"):
        ee.Engine(branched("cifar-resnet20"), max_batch=4, profile=profile)
    ee.Engine(model, max_batch=4, profile=profile).close()
    ee.calibrate(model, [torch.randn(32, 3, 16, 16)], profile=profile)
    for most, used in ((4, True), (8, False)):
        with ee.Engine(model, max_batch=most) as engine:
            assert (engine._times is not None) is used


@pytest.mark.parametrize("served", [nn.Linear(2, 2), None, "folder"])
def test_other_objects_are_refused(served: object) -> None:
    with pytest.raises(ee.ConfigError, match="EarlyExitModel or a StagedModel"):
        ee.Engine(served)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("call", [lambda e, x: e.submit(x, timeout_s=-1), lambda e, x: e.submit(x, wait_s=-1)])
def test_invalid_times_are_refused(model: ee.EarlyExitModel, call: Callable[[ee.Engine, Tensor], object]) -> None:
    with ee.Engine(model) as engine, pytest.raises(ee.ConfigError):
        call(engine, torch.randn(1, 3, 16, 16))


def test_a_model_with_observers_is_refused(model: ee.EarlyExitModel) -> None:
    model.engine.observers = (lambda *_: None,)
    with ee.Engine(model) as engine, pytest.raises(ee.ServingError, match="observers"):
        engine.submit(torch.randn(1, 3, 16, 16))
