"""Audits of a model in service: losses are the true ones, answers stay as they are, and an alarm is never silent."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ee_surgery as ee
from ee_surgery.runtime.router import Router
from tests import zoo
from tests.zoo import POLICIES, two_exits


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 6e7

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _split(model: ee.EarlyExitModel, x: Any, score: str = "max_prob", fallback: str = "last") -> ee.ExitRecords:
    """Thresholds between the scores of the batch, so that it is split at each exit."""
    records = ee.record(model, [x])
    taus = tuple(row.median().item() for row in records.scores(score))
    model.operate(ee.OperatingPoint(taus, score, 1.0, 0.0, 1.0, (), 0, "by hand", fallback=fallback))
    return records


def _true(model: ee.EarlyExitModel, answers: Tensor, *inputs: Any, **named: Any) -> Tensor:
    """Which answers are not the original's."""
    with model.exits_disabled():
        return ~model.task.agrees(model.predict(*inputs, **named).logits, answers)


@pytest.mark.parametrize(("branch", "score", "fallback", "units"), POLICIES)
@pytest.mark.parametrize("size", [1, 7])
def test_losses_are_the_true_ones_and_answers_stay_bit_for_bit(
    branch: str, score: str, fallback: str, units: bool, size: int, clock: Clock
) -> None:
    model, x = two_exits(branch, units), torch.randn(28, 3, 16, 16)
    _split(model, x, score, fallback)
    plain = [model.predict(part) for part in x.split(size)]
    with ee.Audit(model, epsilon=0.999, q=1.0, waiting=5, clock=clock) as audit:
        found = [model.predict(part) for part in x.split(size)]
    for a, b in zip(found, plain, strict=True):
        if size > 1:  # a batch of one has a path of its own where none is watched
            assert torch.equal(a.logits, b.logits)
        torch.testing.assert_close(a.logits, b.logits)
        assert torch.equal(a.exit_index, b.exit_index)
    exits, logits = (torch.cat([getattr(each, name) for each in found]) for name in ("exit_index", "logits"))
    state = audit.state
    (stream,) = state.streams.values()
    assert state.risk().losses == stream.served == 28
    assert state.risk().total == int(_true(model, logits, x).sum())
    trunk = model.trunk_macs
    assert stream.audit_macs == sum(trunk[-1] - trunk[k] for k in exits.tolist() if k < 2)
    assert stream.routed_macs == sum(int(each.macs.sum()) for each in found)
    assert stream.original_macs == 28 * trunk[-1]
    assert stream.traffic is not None
    assert stream.traffic.exits == torch.bincount(exits, minlength=3).tolist()
    assert model.receipt().unchanged


def test_the_chosen_are_a_random_share_and_other_runs_are_not_observed(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    model, x = two_exits(), torch.randn(1, 3, 16, 16)
    model.operate(thresholds=-1.0)
    observed: list[int] = []
    call = Router.__call__

    def spy(self: Router, inputs: Any, batch: int, observers: Any = ()) -> ee.ExitOutput:
        observed.append(len(observers))
        return call(self, inputs, batch, observers)

    monkeypatch.setattr(Router, "__call__", spy)
    audit = ee.Audit(model, epsilon=0.999, q=0.2, seed=1, clock=clock)
    for _ in range(300):
        model.predict(x)
    report = audit.report()
    assert set(observed) == {0, 1}
    assert 35 <= sum(observed) == report.audited <= 85
    assert report.served == 300
    audit.close()
    observed.clear()
    model.predict(x)
    assert observed == [0]
    assert model.engine.audit is None


def test_every_sample_of_a_batch_is_as_likely_to_be_chosen() -> None:
    model = two_exits()
    audit = ee.Audit(model, epsilon=0.5, q=0.3, seed=0)
    counts = torch.zeros(10)
    for _ in range(2000):
        watch = audit._watch(None, 10)
        if watch is not None:
            counts[[*watch.chosen]] += 1
    assert ((counts / 2000 - 0.3).abs() < 0.05).all()


def test_samples_of_several_sizes_texts_and_tasks_are_followed(clock: Clock) -> None:
    special = zoo.TEXTS[0].augment()
    texts = {"input_ids": torch.randint(1, 99, (12, 9)), "attention_mask": torch.ones(12, 9, dtype=torch.long)}
    texts["attention_mask"][::2, 5:] = 0
    _split(special, texts)
    pictures = two_exits()
    small, large = torch.randn(9, 3, 16, 16), torch.randn(9, 3, 24, 24)
    _split(pictures, small)
    for model, batches in ((special, [texts]), (pictures, [small, large, small])):
        audit = ee.Audit(model, epsilon=0.999, q=1.0, waiting=1000, clock=clock)
        wrong = sum(int(_true(model, model.predict(batch).logits, batch).sum()) for batch in batches)
        audit.close()
        assert audit.state.risk().total == wrong


def test_what_all_samples_share_is_not_mixed_over_runs(clock: Clock) -> None:
    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (torch.nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            x = self.first(x + shift).relu()
            x = self.second(x + shift).relu()
            return self.last(x * shift)

    torch.manual_seed(0)
    sample = {"x": torch.randn(3, 6), "shift": torch.randn(6)}
    model = ee.augment(Shifted().eval(), ["first", "second"], sample=sample)
    batches = [{"x": torch.randn(8, 6), "shift": torch.randn(6)} for _ in range(3)]
    _split(model, batches[0])
    audit = ee.Audit(model, epsilon=0.999, q=1.0, waiting=1000, clock=clock)
    wrong = 0
    for batch in batches:
        wrong += int(_true(model, model.predict(**batch).logits, **batch).sum())
        assert not audit._waiting.groups
    assert audit.state.risk().total == wrong


def test_maps_count_by_the_share_of_pixels(clock: Clock) -> None:
    torch.manual_seed(0)
    body = [torch.nn.Sequential(torch.nn.Conv2d(c, 6, 3, padding=1), torch.nn.ReLU()) for c in (3, 6, 6)]
    original = torch.nn.Sequential(*body, torch.nn.Conv2d(6, 4, 1, bias=False)).eval()
    x = 10 * torch.randn(6, 3, 8, 8)
    model = ee.augment(original, ["0", "1"], sample=x, task="segmentation")
    model.operate(thresholds=-1.0)
    audit = ee.Audit(model, epsilon=0.999, q=1.0, loss="outcome", clock=clock)
    answers = model.predict(x).logits
    audit.close()
    with torch.no_grad():
        expected = (answers.argmax(1) != original(x).argmax(1)).double().mean((1, 2)).sum()
    assert audit.state.risk().total == pytest.approx(expected.item(), abs=1e-6)
    assert 0 < audit.state.risk().mean < 1


def test_compiled_runs_autocast_and_inference_mode_are_followed_as_they_ran(clock: Clock) -> None:
    model, x = two_exits(), torch.randn(12, 3, 16, 16)
    _split(model, x)
    audit = ee.Audit(model, epsilon=0.999, q=1.0, waiting=1000, clock=clock)
    wrong = 0
    with torch.inference_mode():
        wrong += int(_true(model, model.predict(x).logits, x).sum())
    with torch.autocast("cpu", torch.bfloat16):
        wrong += int(_true(model, model.predict(x).logits, x).sum())
    model.compile(backend="eager")
    wrong += int(_true(model, model.predict(x).logits, x).sum())
    audit.close()
    assert audit.state.risk()[:2] == (36, wrong)


def test_samples_of_an_original_that_was_changed_are_let_go(clock: Clock) -> None:
    model, x = two_exits(), torch.randn(12, 3, 16, 16)
    _split(model, x)
    audit = ee.Audit(model, epsilon=0.999, q=1.0, waiting=1000, clock=clock)
    model.predict(x)
    model.backbone.layer3.register_forward_hook(lambda module, inputs, output: output * 2)
    audit.flush()
    assert audit.state.risk().losses == 0
    wrong = int(_true(model, model.predict(x).logits, x).sum())
    audit.flush()
    assert audit.state.risk()[:2] == (12, wrong)


# --- alarms


@pytest.fixture
def wrong() -> tuple[ee.EarlyExitModel, Tensor]:
    """A model whose early answers are mostly wrong, with a frontier."""
    model, x = two_exits(), torch.randn(64, 3, 16, 16)
    ee.calibrate(model, [x])
    model.operate(model.frontier[0])
    return model, x


def _serve(model: ee.EarlyExitModel, x: Tensor, audit: ee.Audit, clock: Clock, alarms: int = 1) -> None:
    """Until there are so many alarms, or for 100 batches."""
    for _ in range(100):
        if len(audit.alarms) == alarms:
            return
        model.predict(x)
        clock.now += 30


def test_an_alarm_warns_calls_back_and_is_raised_once(wrong: tuple[ee.EarlyExitModel, Tensor], clock: Clock) -> None:
    model, x = wrong
    heard: list[ee.Alarm] = []
    audit = ee.Audit(model, epsilon=0.01, q=0.2, callback=heard.append, seed=0, clock=clock)
    point = model.operating_point
    with pytest.warns(ee.SurgeryWarning, match="above its limit"):
        _serve(model, x, audit, clock)
    assert heard == list(audit.alarms)
    (alarm,) = heard
    assert alarm.log_evidence >= 2.99
    assert model.operating_point is point
    model.predict(x)
    audit.flush()
    assert len(audit.alarms) == 1
    assert audit.report().answers.broken
    assert "Nothing was changed" in str(audit)
    audit.reset()
    assert not audit.report().answers.broken
    assert audit.report().audited == 0
    with pytest.warns(ee.SurgeryWarning, match="above its limit"):
        _serve(model, x, audit, clock, 2)
    assert len(audit.alarms) == 2


def test_tightening_goes_up_the_frontier_and_ends_with_the_original(
    wrong: tuple[ee.EarlyExitModel, Tensor], clock: Clock
) -> None:
    model, x = wrong
    points = list(model.frontier)
    audit = ee.Audit(model, epsilon=0.01, q=0.5, on_alarm="tighten", seed=0, clock=clock)
    for step in range(1, len(points)):
        with pytest.warns(ee.SurgeryWarning, match="Next safer|Exits are disabled"):
            _serve(model, x, audit, clock, step)
        assert model.operating_point is points[step]
        if points[step].accuracy > 0.95:  # kept often enough
            break
    audit.close()
    model.operate(thresholds=-1.0)  # nothing to compare by
    audit = ee.Audit(model, epsilon=0.01, q=0.5, on_alarm="tighten", seed=0, clock=clock)
    with pytest.warns(ee.SurgeryWarning, match="no operating point is safer"):
        _serve(model, x, audit, clock)
    assert model.operating_point is None


def test_disabling_gives_the_original_answers(wrong: tuple[ee.EarlyExitModel, Tensor], clock: Clock) -> None:
    model, x = wrong
    audit = ee.Audit(model, epsilon=0.01, q=0.5, on_alarm="disable", seed=0, clock=clock)
    with pytest.warns(ee.SurgeryWarning, match="as asked"):
        _serve(model, x, audit, clock)
    with torch.no_grad():
        assert torch.equal(model(x), model.backbone(x))
    assert audit.report().audited == 0  # bets on other answers begin anew


def test_an_error_of_the_callback_is_a_warning_and_the_answer_is_given(
    wrong: tuple[ee.EarlyExitModel, Tensor], clock: Clock
) -> None:
    def fail(alarm: ee.Alarm) -> None:
        raise RuntimeError("no network")

    model, x = wrong
    audit = ee.Audit(model, epsilon=0.01, q=0.5, callback=fail, seed=0, clock=clock)
    with pytest.warns(ee.SurgeryWarning, match="above its limit"), pytest.warns(ee.SurgeryWarning, match="no network"):
        _serve(model, x, audit, clock)
    assert len(audit.alarms) == 1


def test_a_kept_promise_is_renewed_without_alarm(clock: Clock) -> None:
    model, x = two_exits(), torch.randn(32, 3, 16, 16)
    model.operate(thresholds=2.0)  # no sample leaves: all answers are the original's
    audit = ee.Audit(model, epsilon=0.1, q=1.0, clock=clock)
    for _ in range(20):
        model.predict(x)
        clock.now += 60
    report = audit.report()
    assert report.answers.renewals >= 3
    assert report.answers.renewed is not None
    assert report.answers.bounds[1] < 0.1
    assert (report.audited, report.overhead, report.alarms) == (640, 0.0, ())


# --- labels, workers, restarts


def test_late_labels_have_bets_of_their_own(clock: Clock) -> None:
    model, x = two_exits(), torch.randn(40, 3, 16, 16)
    model.operate(thresholds=-1.0)
    audit = ee.Audit(model, epsilon=0.999, label_epsilon=0.2, clock=clock)
    output = model.predict(x)
    right = output.logits.argmax(1)
    audit.labels(output, torch.where(torch.arange(40) < 4, -100, right))
    state = audit.state
    assert (state.risk("labels"), state.risk("answers").losses) == ((36, 0.0), 0)
    with pytest.warns(ee.SurgeryWarning, match="late labels"):
        audit.labels(output.logits, ((right + 1) % 10).tolist())
    assert audit.alarms[0].kind == "labels"
    assert audit.report().labels.broken
    with pytest.raises(ee.DataError):
        audit.labels(output.logits, torch.full((40,), 77))
    with pytest.raises(ee.DataError, match="answers"):
        audit.labels("cat", right)
    audit.close()
    with pytest.raises(ee.ConfigError, match="label_epsilon"):
        ee.Audit(model, epsilon=0.5).labels(output, right)


def test_workers_find_together_what_none_finds_alone(clock: Clock) -> None:
    models, x = [two_exits() for _ in range(4)], torch.randn(8, 3, 16, 16)
    audits = []
    for model in models:
        model.operate(thresholds=-1.0)
        audits.append(ee.Audit(model, epsilon=0.3, q=1.0, alpha=0.001, clock=clock))
        model.predict(x)
        audits[-1].flush()
        assert not audits[-1].alarms
    states = [ee.AuditState.from_dict(json.loads(json.dumps(audit.state.to_dict()))) for audit in audits]
    whole = ee.AuditState.merge(*states)
    assert whole.risk().losses == 32
    assert whole.broken()
    with pytest.warns(ee.SurgeryWarning, match="above its limit"):
        audits[0].join(*states)
    audits[0].join(*states)
    assert len(audits[0].alarms) == 1
    assert audits[0].state.log_evidence() == whole.log_evidence()
    audits[0].reset()
    audits[0].join(*states)  # of what came before the reset
    assert audits[0].report().audited == 0


def test_a_restarted_worker_goes_on_where_it_was(tmp_path: Path, clock: Clock) -> None:
    model, x = two_exits(), torch.randn(8, 3, 16, 16)
    model.operate(thresholds=2.0)
    path = tmp_path / "audit.json"
    with ee.Audit(model, epsilon=0.2, q=1.0, path=path, clock=clock) as audit:
        model.predict(x)
    before = audit.state
    clock.now += 3600
    with ee.Audit(model, epsilon=0.2, q=1.0, path=path, clock=clock) as audit:
        assert audit.state.to_dict() == before.to_dict()
        model.predict(x)
        saved = ee.AuditState.load(path).risk().losses
        clock.now += 61
        model.predict(x)
        assert saved == 8
        assert ee.AuditState.load(path).risk().losses == 24  # what waited was run, this run's among it, and saved
    assert ee.AuditState.load(path).risk().losses == 24
    assert ee.AuditState.merge(before, ee.AuditState.load(path)).risk().losses == 24
    with ee.Audit(model, epsilon=0.2, q=1.0, path=path, clock=clock) as audit:
        audit.reset()
        assert ee.AuditState.load(path).risk().losses == 0
    with pytest.raises(ee.DataError, match="another promise"):
        ee.Audit(model, epsilon=0.1, path=path)
    path.write_text("{}")
    with pytest.raises(ee.DataError, match=r"audit\.json"):
        ee.Audit(model, epsilon=0.2, path=path)
    assert model.engine.audit is None


def test_a_file_that_cannot_be_written_is_said_and_answers_are_given(tmp_path: Path, clock: Clock) -> None:
    model, x = two_exits(), torch.randn(4, 3, 16, 16)
    model.operate(thresholds=-1.0)
    path = tmp_path / "folder" / "audit.json"
    ee.Audit(model, epsilon=0.999, q=1.0, waiting=1, path=path, clock=clock)
    (tmp_path / "folder").write_text("in the way")
    with pytest.warns(ee.SurgeryWarning, match="was not saved"):
        assert len(model.predict(x).logits) == 4


def test_threads_are_counted_once_each(clock: Clock) -> None:
    model, x = two_exits(), torch.randn(6, 3, 16, 16)
    _split(model, x)
    wrong = int(_true(model, model.predict(x).logits, x).sum())
    audit = ee.Audit(model, epsilon=0.999, q=1.0, waiting=7, clock=clock)
    threads = [threading.Thread(target=lambda: [model.predict(x) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    assert audit.state.risk()[:2] == (240, 40 * wrong)


# --- drift, settings


def test_drift_compares_exit_shares_and_scores_with_calibration(clock: Clock) -> None:
    torch.manual_seed(0)
    model, x = two_exits(), torch.randn(200, 3, 16, 16)
    frontier = ee.calibrate(model, [x])
    records = ee.record(model, [x])
    model.operate(next(point for point in frontier if 0.2 < point.exit_shares[0] < 0.9))
    with ee.Audit(model, epsilon=0.999, q=1.0, records=records, clock=clock) as audit:
        model.predict(x)
        same = audit.report().drift
        assert same is not None
        assert same.moved == pytest.approx(0, abs=1e-9)
        assert [each for each in same.scores_moved if each] == []
        model.predict(3 * x)
        model.predict(3 * x)
        moved = audit.report().drift
        assert moved is not None
        assert moved.moved > 0.02
        assert moved.scores_moved[0] > 0.02
        assert "leave elsewhere" in str(moved)
        assert sum(moved.counts) == 600
        model.operate(thresholds=-1.0)
        model.predict(x)
        other = audit.report().drift
        assert other is not None
        assert other.counts == (200, 0, 0)  # of the point in force
        assert other.moved == 0  # by the records, all would have left there then, too
        model.operate(None)
        assert model.predict(x).exit_index.unique().tolist() == [2]
        assert audit.report().served == 800


def test_copies_and_pickles_have_no_audit() -> None:
    model = two_exits()
    audit = ee.Audit(model, epsilon=0.5)
    assert model.copy().engine.audit is None
    assert model.with_exits(model.exits[:1]).engine.audit is None
    assert copy.deepcopy(model.engine).audit is None
    assert pickle.loads(pickle.dumps(ee.AuditState(audit.promise))).promise == audit.promise
    with pytest.raises(ee.ConfigError, match="has an audit"):
        ee.Audit(model, epsilon=0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epsilon": 0}, r"epsilon must be a number in \(0, 1\)"),
        ({"epsilon": 1}, "epsilon"),
        ({"epsilon": "1%"}, "epsilon"),
        ({"alpha": 0}, "alpha"),
        ({"q": 0}, r"q must be a number in \(0, 1\]"),
        ({"q": 1.1}, "q"),
        ({"loss": "agreement"}, "Did you mean 'disagreement'"),
        ({"on_alarm": "stop"}, "on_alarm must be one of"),
        ({"callback": "mail"}, "callback"),
        ({"label_epsilon": 2}, "label_epsilon"),
        ({"records": []}, "records must be an ExitRecords"),
        ({"waiting": 0}, "waiting"),
        ({"period": 0}, "period"),
        ({"path": ""}, "path"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], said: str) -> None:
    model = two_exits()
    with pytest.raises(ee.ConfigError, match=said):
        ee.Audit(model, **{"epsilon": 0.1, **settings})
    assert model.engine.audit is None


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
