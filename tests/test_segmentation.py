"""One class per pixel: the task against its definitions, every library's segmenters through the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from benchmarks.segmenters import CHECKS, SEGMENTERS, Segmenter, checks, run
from ee_surgery.calibration.combined import CombinedScore
from ee_surgery.calibration.records import replay_point
from ee_surgery.policies.scores import SCORES, scores_of
from ee_surgery.task import IGNORED, SEGMENTATION, TASKS

C, SIZE = 5, (32, 48)
TASK, IOU = SEGMENTATION, TASKS["segmentation_iou"]
QUICK = ee.TrainConfig(epochs=1, validation=0, progress=False, batch_size=4)


def _unit(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class Unpooling(nn.Module):
    """As ENet: the indices of its max-pooling stay live to the end, where they say where values go back to."""

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self.stem = _unit(3, 8, 2)
        self.down = nn.MaxPool2d(2, return_indices=True)
        self.blocks = nn.ModuleList(_unit(8, 8) for _ in range(4))
        self.up = nn.MaxUnpool2d(2)
        self.last = nn.ConvTranspose2d(8, C, 2, 2)
        self.aux = nn.Conv2d(8, C, 1)
        self.several = several

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        here, indices = self.down(self.stem(x))
        for block in self.blocks:
            here = here + block(here)
        logits = self.last(self.up(here, indices))
        return (logits, self.aux(here)) if self.several else logits


class Decoding(nn.Module):
    """As U-Net: the decoder reads what every stage made."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_unit(3, 8, 2), _unit(8, 12, 2), _unit(12, 16, 2)])
        self.ups = nn.ModuleList([_unit(16 + 12, 12), _unit(12 + 8, 8)])
        self.head = nn.Conv2d(8, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for stage in self.stages:
            x = stage(x)
            seen.append(x)
        for up, skip in zip(self.ups, seen[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], 1))
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear")


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def pictures(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def maps(count: int, seed: int = 2) -> Tensor:
    found = torch.randint(0, C, (count, *SIZE), generator=torch.Generator().manual_seed(seed))
    found[:, :3] = 255
    return found


def batches(count: int = 12, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pictures(count).split(size), maps(count).split(size), strict=True))


@cache
def decoding() -> ee.EarlyExitModel:
    branched = ee.augment(_seeded(Decoding), ["stages.0", "stages.1"], sample=pictures(2))
    config = ee.TrainConfig(epochs=8, validation=0, progress=False, lr=5e-3, teach="original", distill=1.0)
    ee.train(branched, list(pictures(24, seed=3).split(6)), config)
    return branched


# --- the task


LOGITS = st.integers(0, 10_000).map(lambda seed: torch.Generator().manual_seed(seed))


@given(LOGITS)
def test_outcomes_and_measures_are_those_of_their_definitions(generator: torch.Generator) -> None:
    logits = torch.randn(3, 4, 5, 6, generator=generator)
    target = torch.randint(-1, 4, (3, 5, 6), generator=generator)
    target = TASK.check_target(target.masked_fill(target < 0, 255), 4, 3)
    tallies, said = TASK.tally(logits, target), logits.argmax(1)
    for i in range(3):
        labelled = target[i] >= 0
        right = (said[i] == target[i])[labelled].double().mean().item()
        ious = []
        for c in target[i][labelled].unique().tolist():
            both, either = (said[i] == c) & (target[i] == c), ((said[i] == c) | (target[i] == c)) & labelled
            ious.append(both.sum().item() / either.sum().item())
        assert TASK.outcome(logits, target)[i].item() == pytest.approx(right)
        assert IOU.outcome(logits, target)[i].item() == pytest.approx(sum(ious) / len(ious))
        loss = F.cross_entropy(logits[i : i + 1], target[i : i + 1], ignore_index=-100)
        torch.testing.assert_close(TASK.loss(logits, target)[i], loss)
    confusion = torch.zeros(4, 4, dtype=torch.long)
    for y, z in zip(target[target >= 0].tolist(), said[target >= 0].tolist(), strict=True):
        confusion[y, z] += 1
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    occurs = confusion.sum(1) > 0
    expected = (confusion.diag() / union)[occurs].mean().item()
    assert TASK.measures["mean_iou"](tallies) == pytest.approx(expected)
    recall = (confusion.diag() / confusion.sum(1))[occurs].mean().item()
    assert TASK.measures["class_accuracy"](tallies) == pytest.approx(recall)


def test_coarse_maps_are_judged_as_transformers_resizes_them() -> None:
    coarse, target = torch.randn(2, C, 4, 6), TASK.check_target(maps(2), C, 2)
    whole = F.interpolate(coarse, SIZE, mode="bilinear", align_corners=False)
    assert torch.equal(TASK.outcome(coarse, target), TASK.outcome(whole, target))
    assert torch.equal(TASK.enlarge(coarse, (C, *SIZE)), whole)
    assert torch.equal(TASK.tally(coarse, target), TASK.tally(whole, target))
    torch.testing.assert_close(TASK.loss(coarse, target), TASK.loss(whole, target))
    assert TASK.enlarge(whole, whole.shape[1:]) is whole


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_label_maps_of_any_type_and_their_void(dtype: torch.dtype) -> None:
    found = TASK.check_target(maps(2).to(dtype)[:, None], C, 2)
    assert found.dtype == torch.int64
    assert (found[:, :3] == IGNORED).all()
    assert torch.equal(found[:, 3:], maps(2)[:, 3:])
    assert TASK.ignored(torch.full((2, 4, 4), IGNORED)).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (maps(3), "2 inputs but labels"),
        (torch.zeros(2, dtype=torch.long), "class numbers below 5 of shape"),
        (torch.zeros(2, C, 4, 4), r"labels.argmax\(1\)"),
        (torch.zeros(2, 4, 4), r"labels.long\(\)"),
        (torch.full((2, 4, 4), 9), r"got \[9\]. Pixels without a class are -100 or 255"),
    ],
)
def test_other_label_maps_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ee.DataError, match=message):
        TASK.check_target(labels, C, 2)


def test_models_that_answer_with_maps_are_segmenters_and_what_is_none_is_refused() -> None:
    assert ee.inspect(_seeded(Decoding), pictures(2)).backbone.task == TASK
    assert ee.inspect(_seeded(Decoding), pictures(2), task="segmentation_iou").backbone.task == IOU
    one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 1))
    with pytest.raises(ee.CaptureError, match=r"one number per pixel.*torch\.cat"):
        ee.inspect(one, pictures(2))
    with pytest.raises(ee.CaptureError, match=r"ends in a softmax|probabilities"):
        ee.inspect(nn.Sequential(_seeded(Decoding), nn.Softmax(1)), pictures(2))
    with pytest.raises(ee.CaptureError, match=r"not logits of shape \(4, classes, height, width\)"):
        ee.inspect(nn.Sequential(_seeded(Decoding), nn.Flatten()), pictures(2), task="segmentation")
    with pytest.raises(ee.ConfigError, match="num_classes= makes a head that answers with vectors"):
        ee.inspect(_seeded(Decoding), pictures(2), task="segmentation", num_classes=3)
    with pytest.raises(ee.ConfigError, match=r"answers with vectors \(B, C\).*auto, shortcut, dense|dense"):
        ee.augment(_seeded(Decoding), 1, branch="conv", sample=pictures(2))
    with pytest.raises(ee.ConfigError, match="answers with maps"):
        ee.augment(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), ["0"],
                   branch="dense", sample=pictures(2))  # fmt: skip


# --- from augmenting to loading


@pytest.mark.parametrize(
    "make", [Unpooling, Decoding, lambda: Unpooling(several=True)], ids=["unpooling", "decoding", "tuple"]
)
def test_nets_of_many_live_tensors_go_through_the_whole_pipeline(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = _seeded(make)
    output = 0 if getattr(model, "several", False) else None
    names = ["stages.0", "stages.1"] if isinstance(model, Decoding) else ["blocks.0", "blocks.2"]
    branched = ee.augment(model, names, sample=pictures(2), output=output)
    assert branched.task == TASK
    assert dict(checks(branched, model, pictures(5), maps(5), tmp_path)) == dict.fromkeys(CHECKS, True)
    assert "pipeline_tag: image-segmentation" in (tmp_path / "adapter" / "README.md").read_text()


QUICK_ONES = {"hf-Segformer", "hf-MobileNetV2", "smp-FPN"}


@pytest.mark.parametrize(
    "entry", [pytest.param(s, id=s.name, marks=[] if s.name in QUICK_ONES else [pytest.mark.slow]) for s in SEGMENTERS]
)
def test_segmenters_of_every_library_go_through_the_whole_pipeline(entry: Segmenter) -> None:
    if entry.missing:
        pytest.skip(entry.missing)
    assert run(entry)[-1] == "all"


def test_another_picture_size_is_captured_on_first_use() -> None:
    branched = ee.augment(_seeded(Decoding), ["stages.0"], sample=pictures(2))
    branched.operate(thresholds=-1.0)
    larger = torch.randn(3, 3, 64, 40)
    assert branched.predict(larger).logits.shape == (3, C, 64, 40)
    assert branched.predict(pictures(2)).logits.shape == (2, C, *SIZE)


def test_a_processor_reads_the_answer_as_the_originals() -> None:
    from transformers import SegformerImageProcessor

    entry = next(s for s in SEGMENTERS if s.name == "hf-Segformer")
    model, x = entry.build(), entry.pictures()
    branched = ee.augment(model, 1, sample=x[:2])
    branched.operate(thresholds=-1.0)
    read = SegformerImageProcessor().post_process_semantic_segmentation
    found = read(branched(x), target_sizes=[(50, 70)] * 5)
    assert [tuple(one.shape) for one in found] == [(50, 70)] * 5


def test_shortcuts_of_segmenters_are_copies_with_the_originals_resolution() -> None:
    model = _seeded(Unpooling)
    branched = ee.augment(
        model,
        ["blocks.0"],
        branch=ee.BranchSpec("shortcut", confidence=True, options={"budget": 0.5}),
        sample=pictures(2),
    )
    answers, original = branched.engine.answers(pictures(3))
    assert answers[0].logits.shape == original.shape
    assert answers[0].confidence is not None
    assert answers[0].confidence.shape == (3,)


# --- records, scores and guarantees


def test_records_keep_scores_and_outcomes_in_place_of_logits(tmp_path: Path) -> None:
    branched = decoding()
    records = ee.record(branched, batches())
    assert records.logits is None
    assert records.labels is None
    assert records.labelled
    answers = branched.all_exits(pictures(12))
    target = TASK.check_target(maps(12), C, 12)
    torch.testing.assert_close(records.outcomes, torch.stack([TASK.outcome(row, target) for row in answers]).double())
    agreement = torch.stack([1 - TASK.disagreement(row, answers[-1]) for row in answers])
    torch.testing.assert_close(records.agreement, agreement)
    unlabelled = ee.record(branched, list(pictures(12).split(5)))
    torch.testing.assert_close(unlabelled.outcomes, agreement.double())
    assert not unlabelled.labelled
    torch.testing.assert_close(records.unlabelled().outcomes, unlabelled.outcomes)
    loaded = ee.ExitRecords.load(records.save(tmp_path / "records.safetensors"))
    assert loaded.measures() == records.measures()
    assert loaded.labelled
    assert loaded.keep([1]).measures() == records.measures()
    point = ee.Frontier.search(loaded)[0]
    assert loaded.replay(point.policy).exit_index.tolist() == records.replay(point.policy).exit_index.tolist()
    whole = TASK.measures["mean_iou"](TASK.tally(answers[-1], target))
    assert records.measures()["mean_iou"] == pytest.approx(whole)


def test_pictures_without_a_labelled_pixel_count_nowhere() -> None:
    labels = maps(12)
    labels[:7] = 255
    data = list(zip(pictures(12).split(5), labels.split(5), strict=True))
    records = ee.record(decoding(), data)
    assert len(records) == 5
    assert ee.evaluate(decoding(), data).samples == 5


@pytest.mark.parametrize("score", scores_of(TASK, units=False))
def test_a_routed_run_leaves_where_the_records_say(score: str) -> None:
    branched = decoding()
    records = ee.record(branched, batches())
    taus = [row.median().item() for row in records.scores(score)]
    branched.operate(thresholds=taus, score=score)
    assert branched.operating_point is not None
    expected = records.replay(branched.operating_point.policy)
    found = torch.cat([branched.predict(x).exit_index for x in pictures(12).split(4)])
    assert (
        found == expected.exit_index
    ).float().mean() > 0.8  # a median is a score of these samples: it may round away
    branched.operate(None)


def test_pixel_scores_are_those_of_their_definitions() -> None:
    logits = torch.full((1, 2, 4, 4), 0.0)
    logits[:, 0, :, :2] = 4.0
    logits[:, 1, :, 2:] = 1.0
    sure = torch.softmax(logits, 1).amax(1)
    assert SCORES["sure_pixels"](logits, None, ())[0].item() == 0.5
    assert SCORES["low_pixels"](logits, None, ())[0].item() == pytest.approx(sure.min().item())
    assert SCORES["boundary"](logits, None, ())[0].item() == pytest.approx(sure[0, :, 1].mean().item())
    assert SCORES["boundary"](torch.ones(1, 2, 4, 4), None, ())[0].item() == 1


def test_a_combination_of_scores_is_one_score_recorded_and_run() -> None:
    branched = decoding()
    records = ee.record(branched, batches())
    score = CombinedScore.fit(records)
    recorded = records.scores(score)
    branched.operate(thresholds=[-10.0, -10.0], score=score)
    torch.testing.assert_close(branched.predict(pictures(12)).score, recorded[0], atol=1e-4, rtol=1e-3)
    branched.operate(None)


@pytest.mark.filterwarnings("ignore:No early exit is certified")
def test_a_certificate_is_about_the_share_of_pixels() -> None:
    records = ee.record(decoding(), list(pictures(400).split(50)))
    with pytest.raises(ee.ConfigError, match=r"'disagreement' is not defined.*'pixel_disagreement'"):
        ee.risk_control(records, 0.3)
    share = 1 - records.agreement[0].mean().item()
    point = ee.risk_control(records, (1 + share) / 2, risk="pixel_disagreement")
    assert point.certificate is not None
    assert point.certificate.certified
    assert (point.exit_shares[0]) > 0
    strict = ee.risk_control(records, 1e-6, risk="pixel_disagreement")
    assert strict.policy.closed


def test_evaluation_reports_the_measures_of_the_whole_data_set() -> None:
    branched = decoding()
    branched.operate(thresholds=2.0)
    found = ee.evaluate(branched, batches())
    assert found.measure == "pixel accuracy"
    assert found.measures["mean_iou"] == found.measures["original_mean_iou"]
    assert found.accuracy == pytest.approx(ee.record(branched, batches()).base_accuracy, abs=1e-6)
    branched.operate(None)


# --- training, engines, the one line


def test_branches_learn_the_originals_map_without_labels() -> None:
    branched = ee.augment(_seeded(Decoding), ["stages.1"], sample=pictures(2))
    config = ee.TrainConfig(epochs=12, teach="original", validation=0, progress=False, lr=5e-3)
    report = ee.train(branched, list(pictures(24).split(6)), config)
    assert report.epochs[-1].loss < report.epochs[0].loss
    assert ee.record(branched, list(pictures(24).split(6))).accuracies[0] > 0.5


@pytest.mark.parametrize("fallback", ["last", "most_confident"])
def test_a_file_answers_as_the_model(fallback: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    branched = decoding()
    records = ee.record(branched, batches())
    taus = tuple(row.sort().values[6].item() + 1e-6 for row in records.scores("max_prob"))
    policy = ee.ThresholdPolicy(taus, "max_prob", fallback)
    branched.operate(replay_point(records, policy, "test"))
    for layout in ("file", "stages"):
        path = branched.export(tmp_path / ("model.onnx" if layout == "file" else "stages"), layout=layout)
        found = ee.check_export(path, branched, [pictures(12), pictures(1, seed=5)])
        assert found.exits == 0
        assert found.logits < 1e-3
    branched.operate(None)


@pytest.mark.slow
def test_compiled_parts_answer_as_the_model() -> None:
    branched = ee.augment(_seeded(Decoding), ["stages.0", "stages.1"], sample=pictures(2))
    records = ee.record(branched, list(pictures(12).split(5)))
    branched.operate(thresholds=[row.sort().values[6].item() + 1e-6 for row in records.scores("max_prob")])
    expected = [branched.predict(x) for x in (pictures(12), pictures(1))]
    branched.compile()
    for x, before in zip((pictures(12), pictures(1)), expected, strict=True):
        found = branched.predict(x)
        assert found.exit_index.tolist() == before.exit_index.tolist()
        torch.testing.assert_close(found.logits, before.logits, atol=1e-4, rtol=1e-3)


def test_one_line_finds_exits_of_a_segmenter(capsys: pytest.CaptureFixture[str]) -> None:
    model = _seeded(Unpooling)
    with torch.no_grad():
        learn = [(x, model(x).argmax(1)) for x in pictures(60).split(6)]
        held = [(x, model(x).argmax(1)) for x in pictures(40, seed=9).split(5)]
    branched = ee.augment(model, sample=pictures(2), train=learn, calibrate=held, effort="quick", time_budget=0.2)
    assert branched.frontier is not None
    assert branched.receipt().unchanged
