"""What an answer is: several labels through the whole pipeline, what is refused, and tasks that users add."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.data.labels import Labels
from ee_surgery.task import CLASSIFICATION, mean_average_precision
from ee_surgery.training.loss import batch_loss, relative_costs

C = 7  # labels; a size that no other dimension of these models has
PIXELS = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MULTI_HOT = (torch.rand(48, C, generator=torch.Generator().manual_seed(2)) > 0.7).float()
QUICK = ee.TrainConfig(epochs=1, validation=0, progress=False)
_VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def _vit(classes: int = C, problem_type: str | None = "multi_label_classification") -> nn.Module:
    config = transformers.ViTConfig(**_VIT, num_labels=classes, problem_type=problem_type)
    return transformers.ViTForImageClassification(config).eval()


def _timm(classes: int = C) -> nn.Module:
    return timm.create_model("test_resnet", num_classes=classes).eval()


MODELS: dict[str, Callable[[], ee.EarlyExitModel]] = {
    "transformers": lambda: ee.augment(_vit(), 2, branch="mlp"),
    "timm": lambda: ee.augment(_timm(), 2, sample=PIXELS[:2], branch=ee.BranchSpec("mlp"), task="multi_label"),
}


def _batches(labels: Tensor | None = MULTI_HOT, size: int = 16) -> list[Any]:
    if labels is None:
        return list(PIXELS.split(size))
    return list(zip(PIXELS.split(size), labels.split(size), strict=True))


@pytest.fixture
def no_softmax(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that takes one right class of C raises."""
    called: list[str] = []

    def refuse(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            if C in x.shape:
                raise AssertionError(f"{name} saw multi-label logits of shape {tuple(x.shape)}")
            return original(x, *args, **kwargs)

        return guarded

    places = {
        torch: ("softmax", "log_softmax", "logsumexp"),
        F: ("softmax", "log_softmax", "cross_entropy", "nll_loss", "gumbel_softmax"),
        Tensor: ("softmax", "log_softmax", "logsumexp"),
    }
    for place, names in places.items():
        for name in names:
            monkeypatch.setattr(place, name, refuse(name, getattr(place, name)))
    return called


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_several_labels_go_through_the_whole_pipeline_and_no_softmax_sees_them(
    make: Callable[[], ee.EarlyExitModel], no_softmax: list[str], tmp_path: Path
) -> None:
    branched = make()
    assert branched.task == ee.MultiLabel()
    before = ee.record(branched, _batches())
    ee.train(branched, _batches(), replace_config(epochs=3, lr=1e-2, distill=0.3))
    after = ee.record(branched, _batches())
    for k in range(2):
        losses = [branched.task.mean_loss(records.recorded_logits()[k], MULTI_HOT) for records in (before, after)]
        assert losses[1] < losses[0]
    frontier = ee.calibrate(branched, _batches())
    assert frontier.measure == "label accuracy"
    assert "label accuracy" in str(frontier)
    branched.operate(max_accuracy_drop=1.0)
    evaluation = ee.evaluate(branched, _batches())
    output = branched.predict(PIXELS)
    decided = (output.logits > 0).float()
    assert evaluation.accuracy == pytest.approx((decided == MULTI_HOT).float().mean().item(), abs=1e-6)
    expected = mean_average_precision(torch.cat([output.logits, MULTI_HOT], 1))
    assert evaluation.measures["mean_average_precision"] == pytest.approx(expected)
    assert "label accuracy" in str(evaluation)
    assert branched.receipt().unchanged
    folder = branched.save_pretrained(tmp_path / "adapter")
    again = ee.from_pretrained(folder, branched.original, sample=PIXELS[:2])
    assert again.task == ee.MultiLabel()
    assert again.frontier == frontier
    assert torch.equal(again.predict(PIXELS).logits, output.logits)
    assert "label accuracy" in (folder / "README.md").read_text()
    assert branched.copy().task == branched.with_exits(branched.exits[:1]).task == ee.MultiLabel()


def test_a_softmax_over_several_labels_would_be_seen(no_softmax: list[str]) -> None:
    logits = torch.zeros(2, C)
    for task in (lambda: ee.SCORES["max_prob"](logits, None, ()), lambda: logits.softmax(-1),
                 lambda: CLASSIFICATION.loss(logits, torch.zeros(2).long())):  # fmt: skip
        with pytest.raises(AssertionError, match="saw multi-label logits"):
            task()
    assert len(no_softmax) == 3


def replace_config(**settings: Any) -> ee.TrainConfig:
    return replace(QUICK, **settings)


@pytest.mark.parametrize("score", ["max_prob", "margin", "entropy", "patience"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_routed_equals_replayed(make: Callable[[], ee.EarlyExitModel], score: str) -> None:
    branched = make()
    for parameter in branched.branches.parameters():
        parameter.data.mul_(5)
    records = ee.record(branched, _batches())
    for fallback in ("last", "most_confident"):
        scores = records.scores(score)
        tau = scores[0].sort().values[len(PIXELS) // 2 : len(PIXELS) // 2 + 2].mean().item()
        policy = ee.ThresholdPolicy((tau, scores[1].quantile(0.8).item() + 1e-4), score, fallback)
        branched.operate(replace(ee.OperatingPoint.by_hand((tau,), score), **vars_of(policy)))
        replay = records.replay(policy)
        logits = records.recorded_logits()[replay.answer_index, torch.arange(len(PIXELS))]
        for size in (1, 5, len(PIXELS)):
            outputs = [branched.predict(x) for x in PIXELS.split(size)]
            assert torch.cat([out.exit_index for out in outputs]).tolist() == replay.exit_index.tolist()
            torch.testing.assert_close(torch.cat([out.logits for out in outputs]), logits, atol=1e-4, rtol=1e-4)


def vars_of(policy: ee.ThresholdPolicy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in ("thresholds", "score", "fallback")}


def test_scores_of_several_labels_are_those_of_each() -> None:
    p = torch.tensor([[0.9, 0.2], [0.5, 0.99]], dtype=torch.float64)
    logits, task = torch.logit(p), ee.MultiLabel()
    sure = torch.maximum(p, 1 - p)
    assert torch.allclose(ee.SCORES["max_prob"](logits, None, (), task=task)[0], sure.mean(1))  # pyright: ignore[reportCallIssue]
    assert torch.allclose(ee.SCORES["margin"](logits, None, (), task=task)[0], (2 * sure - 1).amin(1))  # pyright: ignore[reportCallIssue]
    h = -(p * p.log() + (1 - p) * (1 - p).log()) / np.log(2)
    assert torch.allclose(ee.SCORES["entropy"](logits, None, (), task=task)[0], (1 - h).mean(1))  # pyright: ignore[reportCallIssue]


def test_without_labels_the_originals_own_decisions_are_the_truth() -> None:
    branched = MODELS["timm"]()
    ee.train(branched, _batches(None), replace_config(teach="original"))
    records = ee.record(branched, _batches(None))
    assert records.labels is None
    assert records.base_accuracy == 1
    decided = records.recorded_logits() > 0
    assert torch.allclose(records.outcomes, (decided == decided[-1]).double().mean(-1))
    ee.calibrate(branched, _batches(None))
    branched.operate(thresholds=0.0)
    evaluation = ee.evaluate(branched, _batches(None))
    assert evaluation.original_accuracy == 1
    assert evaluation.accuracy == evaluation.agreement == pytest.approx(records.accuracies[0], abs=1e-6)
    assert not evaluation.measures
    point = branched.operate(risk=(0.999, 0.05))
    assert point is not None
    assert point.certificate is not None
    assert point.certificate.risk == "disagreement"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.float64])
def test_labels_of_any_type_are_multi_hot(dtype: torch.dtype) -> None:
    found = ee.MultiLabel().check_target(MULTI_HOT.to(dtype), C, 48)
    assert found.is_floating_point()
    assert torch.equal(found.float(), MULTI_HOT)


def test_labels_may_be_probabilities_and_samples_may_be_ignored() -> None:
    task = ee.MultiLabel()
    soft = torch.tensor([[0.2, 0.8], [-100.0, -100.0]])
    target = task.check_target(soft, 2, 2)
    assert task.ignored(target).tolist() == [False, True]
    assert task.hard(target).tolist() == [[0, 1], [-100, -100]]
    labels = MULTI_HOT.clone()
    labels[::2] = -100
    branched = MODELS["timm"]()
    records = ee.record(branched, _batches(labels))
    assert len(records) == len(PIXELS) // 2
    assert torch.equal(records.target, MULTI_HOT[1::2])
    assert not ee.evaluate(branched, _batches(0 * MULTI_HOT)).measures  # no label occurs, so there is no precision
    assert ee.evaluate(branched, _batches(labels)).samples == len(PIXELS) // 2
    exits, original = branched.engine.answers(PIXELS)
    costs, config = relative_costs(branched), replace_config(distill=0.5)
    few, few_original = branched.engine.answers(PIXELS[1::2])
    torch.testing.assert_close(
        batch_loss(exits, original, labels, costs, config, task=task),
        batch_loss(few, few_original, MULTI_HOT[1::2], costs, config, task=task),
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(48) % C, r"multi-hot, of shape \(B, 7\).*got torch.int64 of shape \(16,\)"),
        (MULTI_HOT[:, :3], r"got torch.float32 of shape \(16, 3\)"),
        (MULTI_HOT * 2, "a row is"),
        (torch.where(torch.eye(48, C) > 0, -100.0, MULTI_HOT), "-100 alone is ignored"),
    ],
)
def test_other_labels_are_refused(labels: Tensor, message: str) -> None:
    branched = MODELS["timm"]()
    for verb in (ee.record, ee.evaluate, lambda model, data: ee.train(model, data, QUICK)):
        with pytest.raises(ee.DataError, match=message):
            verb(branched, _batches(labels))


def _risk(name: str) -> Callable[[ee.EarlyExitModel], Any]:
    return lambda branched: ee.risk_control(ee.record(branched, _batches()), 0.5, risk=name)


REFUSED: dict[str, Callable[[ee.EarlyExitModel], Any]] = {
    "branch ztw": lambda b: ee.augment(b.original, 1, sample=PIXELS[:2], branch="ztw", task="multi_label"),
    "preset ztw": lambda b: ee.augment(b.original, sample=PIXELS[:2], preset="ztw", task="multi_label"),
    "calibrator classwise": lambda b: ee.calibrate(b, _batches(), method="classwise"),
    "calibrator eenet": lambda b: ee.Frontier.trace(ee.record(b, _batches()), "eenet"),
    "class_thresholds": lambda b: ee.class_thresholds(ee.record(b, _batches()), 0.1),
    "eenet_scheduler": lambda b: ee.eenet_scheduler(ee.record(b, _batches()), 0.5),
    "objective recursive": lambda b: ee.train(b, _batches(), replace_config(objective="recursive")),
    "cutmix": lambda b: ee.train(b, _batches(), replace_config(cutmix=1.0)),
    "class_map": lambda b: Labels(b.engine, list(range(C))),
    "accuracy_gap": _risk("accuracy_gap"),
    "brier_gap": _risk("brier_gap"),
}


def test_what_a_user_wrote_for_one_right_class_is_refused_for_several_labels_until_it_says_otherwise() -> None:
    def sure(logits: Tensor, confidence: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[()]]:
        return logits.softmax(-1).amax(-1), ()

    def certain(
        logits: Tensor, confidence: Tensor | None, state: tuple[Tensor, ...], task: ee.Task = CLASSIFICATION
    ) -> tuple[Tensor, tuple[()]]:
        return task.certainty(logits), ()

    branched = MODELS["timm"]()
    registered = [ee.SCORES, ee.OBJECTIVES]
    before = [set(registry) for registry in registered]
    try:
        ee.SCORES.register("sure")(sure)
        ee.SCORES.register("certain", tasks=None)(certain)
        ee.OBJECTIVES.register("mine")(lambda a, config: F.cross_entropy(a.exits[0].logits, a.labels))
        with pytest.raises(ee.ConfigError, match=r"'sure'.*'multi_label'"):
            branched.operate(thresholds=0.5, score="sure")
        with pytest.raises(ee.ConfigError, match=r"'mine'.*'multi_label'"):
            ee.train(branched, _batches(), replace_config(objective="mine"))
        records = ee.record(branched, _batches())
        assert torch.equal(records.scores("certain"), records.scores("max_prob"))
        branched.operate(thresholds=0.5, score="certain")
        assert branched.predict(PIXELS).exit_index.max() == 0
    finally:
        for registry, known in zip(registered, before, strict=True):
            for name in set(registry) - known:
                del registry._items[name]


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_for_several_labels_is_refused_by_name(ask: Callable[[ee.EarlyExitModel], Any]) -> None:
    with pytest.raises(ee.ConfigError, match="'multi_label'"):
        ask(MODELS["timm"]())


def test_risks_of_several_labels_are_bounded_without_counting() -> None:
    records = ee.record(MODELS["timm"](), _batches())
    assert ee.risk_control(records, 0.9, risk="outcome_gap", method="ltt-hb").certificate is not None
    point = ee.risk_control(records, 0.999, risk="disagreement")
    assert point.certificate is not None
    decided = records.recorded_logits() > 0
    same = (decided == decided[-1]).all(-1)
    taken = same[records.replay(point.policy).exit_index, torch.arange(len(records))]
    assert 1 - taken.double().mean().item() == pytest.approx(ee.check_certificate(point.certificate, records).observed)


def test_one_logit_is_refused_but_for_a_sigmoid() -> None:
    for make in (lambda: _timm(1), lambda: _vit(1, None)):
        with pytest.raises(ee.CaptureError, match=r'one number per sample.*task="multi_label"'):
            ee.inspect(make())
    with pytest.raises(ee.CaptureError, match=r"problem_type='regression'.*task="):
        ee.inspect(_vit(1, "regression"))
    branched = ee.augment(_timm(1), 2, sample=PIXELS[:2], branch="pool", task="multi_label")
    labels = MULTI_HOT[:, :1]
    ee.train(branched, _batches(labels), QUICK)
    ee.calibrate(branched, _batches(labels))
    branched.operate(thresholds=0.5)
    assert ee.evaluate(branched, _batches(labels)).exit_shares[0] == 1


def test_a_sigmoid_at_the_end_is_refused_with_both_ways_out() -> None:
    with pytest.raises(ee.CaptureError, match="input of the sigmoid"):
        ee.augment(nn.Sequential(_timm(), nn.Sigmoid()).eval(), 1, sample=PIXELS[:2], task="multi_label")


def test_what_the_user_says_is_taken_before_the_configuration() -> None:
    assert ee.augment(_vit(), 1, task="classification").task == CLASSIFICATION
    assert ee.augment(_vit(C, "regression"), 1, task=ee.MultiLabel).task == ee.MultiLabel()
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'multi_label'"):
        ee.inspect(_timm(), task="multilabel")
    with pytest.raises(ee.ConfigError, match="task must be"):
        ee.inspect(_timm(), task=3)  # pyright: ignore[reportArgumentType]


def test_a_new_head_may_have_a_task() -> None:
    headless = timm.create_model("test_resnet", num_classes=0).eval()
    branched = ee.augment(headless, 1, sample=PIXELS[:2], branch="pool", num_classes=C, task="multi_label")
    report = ee.train(branched, _batches(), replace_config(epochs=2, distill=0))
    assert report.epochs[1].loss < report.epochs[0].loss


def test_the_original_may_learn_several_labels_along() -> None:
    branched = MODELS["timm"]()
    report = ee.train(branched, _batches(), replace_config(epochs=2), joint=True)
    assert report.model.task == ee.MultiLabel()
    assert report.epochs[1].loss < report.epochs[0].loss


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000))
def test_mean_average_precision_is_that_of_its_definition(n: int, labels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (n, labels), generator=generator).float()
    target = torch.randint(0, 2, (n, labels), generator=generator).float()
    expected = []
    for z, y in zip(logits.T.tolist(), target.T.tolist(), strict=True):
        if sum(y):
            above = [[(b, t) for b, t in zip(z, y, strict=True) if b >= a] for a, one in zip(z, y, strict=True) if one]
            expected.append(sum(sum(t for _, t in rows) / len(rows) for rows in above) / sum(y))
    found = mean_average_precision(torch.cat([logits, target], 1))
    assert found == pytest.approx(sum(expected) / len(expected)) if expected else found != found


# --- records


def test_records_of_one_right_class_are_written_as_before_and_those_of_old_are_read(tmp_path: Path) -> None:
    logits, labels = torch.randn(3, 20, 5), torch.randint(0, 5, (20,))
    records = ee.ExitRecords(("a", "b"), logits, (1, 2, 4), (1, 1), labels)
    path = records.save(tmp_path / "records.safetensors")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"logits", "labels"}
        assert file.metadata() == {
            "format_version": "1", "exits": '["a", "b"]', "trunk_macs": "[1, 2, 4]", "branch_macs": "[1, 1]",
            "chained": "false",
        }  # fmt: skip
    old = tmp_path / "old.safetensors"
    save_file({"logits": logits}, old, {"format_version": "1", "exits": '["a", "b"]', "trunk_macs": "[1, 2, 4]",
                                        "branch_macs": "[1, 1]"})  # fmt: skip
    assert torch.equal(ee.ExitRecords.load(path).outcomes, records.outcomes)
    assert ee.ExitRecords.load(old).base_accuracy == 1


@pytest.mark.parametrize("task", ["classification", "multi_label"])
def test_records_without_logits_find_the_same_thresholds_and_refuse_what_needs_them(task: str, tmp_path: Path) -> None:
    logits = 3 * torch.randn(3, 60, 5)
    labels = torch.randint(0, 5, (60,)) if task == "classification" else torch.randint(0, 2, (60, 5))
    whole = ee.ExitRecords(("a", "b"), logits, (1, 2, 4), (0, 0), labels, task=ee.TASKS[task])
    small = whole.without_logits(["max_prob", "margin"])
    loaded = ee.ExitRecords.load(small.save(tmp_path / "records.safetensors"))
    for records in (small, loaded.take(torch.arange(60))):
        assert records.logits is None
        for method in ("shared", "most_confident", "cascade"):
            found, expected = (list(ee.Frontier.trace(each, method)) for each in (records, whole))
            assert found == expected
        assert ee.geometric_budget(records, 0.6, "margin") == ee.geometric_budget(whole, 0.6, "margin")
        for needs in (lambda r: r.scores("entropy"), lambda r: r.recorded_logits(), ee.scale_temperatures):
            with pytest.raises(ee.DataError, match=r"hold no logits.*margin, max_prob"):
                needs(records)
        assert ee.risk_control(records, 0.9).thresholds == ee.risk_control(whole, 0.9).thresholds
    assert ee.Frontier.search(small)[-1].macs_fraction <= 1
    assert torch.equal(loaded.keep([1]).outcomes, whole.outcomes[[1, 2]])


def test_other_outcomes_are_refused() -> None:
    for task, bad in (("multi_label", [None, torch.rand(60), torch.full((3, 60), 2.0), torch.full((3, 60), torch.nan)]),
                      ("classification", [torch.full((3, 60), 0.5)])):  # fmt: skip
        for outcomes in bad:
            with pytest.raises(ee.DataError, match=r"in \[0, 1\]|must be 0 or 1"):
                ee.ExitRecords(("a", "b"), None, (1, 2, 4), (0, 0), outcomes=outcomes, task=ee.TASKS[task])  # pyright: ignore[reportArgumentType]


# --- adapters and transformers


def test_adapters_of_one_right_class_are_as_before_and_others_say_their_task(tmp_path: Path) -> None:
    plain = ee.augment(_timm(), 1, sample=PIXELS[:2], branch="pool").save_pretrained(tmp_path / "plain")
    assert "task" not in json.loads((plain / "config.json").read_text())
    several = MODELS["timm"]().save_pretrained(tmp_path / "several")
    assert json.loads((several / "config.json").read_text())["task"] == "multi_label"


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_auto_classes_load_several_labels(make: Callable[[], ee.EarlyExitModel], tmp_path: Path) -> None:
    branched = make()
    branched.save_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, base_model=branched.original)
    assert model.config.problem_type == "multi_label_classification"
    model.train()
    loss = model(pixel_values=PIXELS, labels=MULTI_HOT).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.branches.parameters())
    model.eval()
    model.branched.operate(thresholds=0.0)
    output = model(pixel_values=PIXELS, labels=MULTI_HOT)
    expected = F.binary_cross_entropy_with_logits(branched.all_exits(PIXELS)[0], MULTI_HOT)
    torch.testing.assert_close(output.loss, expected)


# --- tasks that users add


@pytest.fixture
def _tasks_as_before() -> Iterator[None]:
    before = set(ee.TASKS)
    yield
    for name in set(ee.TASKS) - before:
        del ee.TASKS._items[name]  # pyright: ignore[reportAttributeAccessIssue]


def add_ordinal() -> tuple[int, Tensor]:
    @ee.TASKS.register("ordinal")
    class Ordinal(ee.Classification):
        """Classes in order: near misses are worth something."""

        measure = "nearness"
        whole = False

        def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
            """1 less the distance as a share of the largest."""
            off = (logits.argmax(-1) - self.hard(target)).abs() / (logits.shape[-1] - 1)
            return (1 - off).clamp(0, 1)

    return C, torch.arange(48) % C


def add_top_two() -> tuple[int, Tensor]:
    @ee.TASKS.register("top_two")
    class TopTwo(ee.Classification):
        """Right where the class is one of the two likeliest."""

        measure = "top-2 accuracy"

        def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
            """0 or 1."""
            return (logits.topk(2, -1).indices == self.hard(target)[:, None]).any(1).float()

    return C, torch.arange(48) % C


def add_digits() -> tuple[int, Tensor]:
    @ee.TASKS.register("digits")
    class Digits(ee.Task):
        """Two digits of three values each: six logits, labels (B, 2)."""

        def log_probabilities(self, logits: Tensor) -> Tensor:
            """(B, 2, 3)."""
            return F.log_softmax(logits.unflatten(1, (2, 3)), -1)

        def labels_from(self, logits: Tensor) -> Tensor:
            """(B, 2)."""
            return logits.unflatten(1, (2, 3)).argmax(-1)

        def loss(self, logits: Tensor, target: Tensor) -> Tensor:
            """Mean cross-entropy of both."""
            return -self.log_probabilities(logits).gather(-1, target[..., None])[..., 0].mean(1)

        def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
            """(B, 2), from 0 to 2."""
            if target.shape != (rows, 2):
                raise ee.DataError(f"Labels must be of shape ({rows}, 2), got {tuple(target.shape)}.")
            return target.long()

        def check(self, logits: Tensor, rows: int, model_id: str) -> None:
            """(B, 6)."""
            if logits.shape != (rows, 6):
                raise ee.CaptureError(f"{model_id} has no six logits.")

    return 6, torch.stack([torch.arange(48) % 3, torch.arange(48) // 3 % 3], 1)


ADDED = {"ordinal": add_ordinal, "top_two": add_top_two, "digits": add_digits}


@pytest.mark.usefixtures("_tasks_as_before")
@pytest.mark.parametrize("name", ADDED)
def test_a_task_that_a_user_adds_goes_through_the_whole_pipeline(name: str, tmp_path: Path) -> None:
    assert len(inspect.getsource(ADDED[name]).splitlines()) < 40
    classes, labels = ADDED[name]()
    data = _batches(labels)
    branched = ee.augment(_timm(classes), 2, sample=PIXELS[:2], branch="mlp", task=name)
    report = ee.train(branched, data, replace_config(epochs=3, distill=0.3, lr=3e-3))
    assert report.epochs[-1].loss < report.epochs[0].loss
    for method in ("patience", "scaled", "entropy", "search"):
        frontier = ee.calibrate(branched, data, method=method)
        assert frontier.measure == branched.task.measure
    records = ee.record(branched, data)
    tau = records.scores("max_prob")[0].sort().values[23:25].mean().item()
    branched.operate(thresholds=(tau, 0.0))
    output = branched.predict(PIXELS)
    replay = records.replay(ee.ThresholdPolicy((tau, 0.0)))
    assert output.exit_index.tolist() == replay.exit_index.tolist()
    evaluation = ee.evaluate(branched, data)
    assert evaluation.accuracy == pytest.approx(replay.outcome.mean().item(), abs=1e-6)
    again = ee.from_pretrained(branched.save_pretrained(tmp_path), branched.original, sample=PIXELS[:2])
    assert again.task.name == name
    assert torch.equal(again.predict(PIXELS).logits, output.logits)
    assert branched.receipt().unchanged


@pytest.mark.usefixtures("_tasks_as_before")
def test_an_adapter_of_a_task_that_is_not_known_here_names_it(tmp_path: Path) -> None:
    classes, _ = add_top_two()
    branched = ee.augment(_timm(classes), 1, sample=PIXELS[:2], branch="pool", task="top_two")
    branched.save_pretrained(tmp_path)
    del ee.TASKS._items["top_two"]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ee.UnknownNameError, match="No task 'top_two'"):
        ee.from_pretrained(tmp_path, branched.original, sample=PIXELS[:2])


@pytest.mark.usefixtures("_tasks_as_before")
def test_outcomes_between_0_and_1_of_a_task_that_says_there_are_none_are_refused() -> None:
    @ee.TASKS.register("half")
    class Half(ee.Classification):
        def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
            return torch.full((len(logits),), 0.5)

    with pytest.raises(ee.DataError, match="'half' must be 0 or 1"):
        ee.ExitRecords(("a",), torch.randn(2, 3, 4), (1, 2), (1,), task=Half())
    with pytest.raises(ee.ConfigError, match=r"derived from ee_surgery\.Task"):
        ee.TASKS.register("no class")(Half())  # pyright: ignore[reportArgumentType]
