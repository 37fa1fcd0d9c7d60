"""What users add without touching the package: in few lines each, and good for every verb of the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.calibration.records import replay_point
from ee_surgery.registry import Registry
from ee_surgery.training.objectives import Answers, ObjectiveSettings

REGISTRIES: tuple[Registry, ...] = (ee.BRANCHES, ee.SCORES, ee.OBJECTIVES, ee.CALIBRATORS)


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    before = [set(registry) for registry in REGISTRIES]
    yield
    for registry, known in zip(REGISTRIES, before, strict=True):
        for name in set(registry) - known:
            del registry._items[name]


def add_branch() -> None:
    @ee.BRANCHES.register("squeeze")
    class Squeeze(ee.Branch):
        """A 1x1 convolution to few channels, then mean and largest value."""

        def __init__(self, point: ee.ExitPoint, num_classes: int, confidence: bool = False, width: int = 4) -> None:
            super().__init__(point, num_classes, confidence, 2 * width)
            self.narrow = nn.Conv2d(point.shape[0], width, 1)

        def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
            """(B, C, H, W) -> (B, 2 * width)."""
            narrow = torch.relu(self.narrow(features))
            return torch.cat([narrow.mean((2, 3)), narrow.amax((2, 3))], 1)


def add_score() -> None:
    @ee.SCORES.register("mean_so_far", stateful=True)
    def mean_so_far(logits: Tensor, confidence: Tensor | None, state: tuple[Tensor, ...]):
        """Mean of the largest probabilities at the exits so far."""
        own = torch.softmax(logits, -1).amax(-1)
        total, exits = (state[0] + own, state[1] + 1) if state else (own, torch.ones_like(own))
        return total / exits, (total, exits)


def add_calibrator() -> None:
    @ee.CALIBRATORS.register("halves")
    def halves(records: ee.ExitRecords) -> list[ee.OperatingPoint]:
        """The same share of the samples leaves at each exit."""
        scores = records.scores("max_prob")
        taus = [tuple(scores.quantile(q, 1).tolist()) for q in (0.3, 0.5, 0.7)]
        return [replay_point(records, ee.ThresholdPolicy(tau), "halves") for tau in taus]


def add_loss() -> None:
    @ee.OBJECTIVES.register("focal", reads_original=False)
    def focal(answers: Answers, config: ObjectiveSettings) -> Tensor:
        """Cross-entropy, less of it where the answer is right already (arXiv:1708.02002)."""
        losses = torch.stack([F.cross_entropy(z, answers.labels, reduction="none") for z in answers.learning])
        return ((1 - (-losses).exp()) ** 2 * losses).mean(1).sum()


ADDED: dict[str, Callable[[], None]] = {
    "branch": add_branch, "score": add_score, "calibrator": add_calibrator, "loss": add_loss
}  # fmt: skip


@pytest.mark.parametrize("what", [*ADDED, "all"])
def test_what_a_user_adds_goes_through_the_whole_pipeline(what: str, tmp_path: Path) -> None:
    added = set(ADDED) if what == "all" else {what}
    for name in added:
        assert len(inspect.getsource(ADDED[name]).splitlines()) < 40
        ADDED[name]()
    model = timm.create_model("test_resnet", num_classes=3).eval()
    pixels, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 3
    data = list(zip(pixels.split(8), labels.split(8), strict=True))
    branch = ee.BranchSpec("squeeze", options={"width": 2}) if "branch" in added else "pool"
    branched = ee.augment(model, 2, branch=branch, sample=pixels[:2])
    config = ee.TrainConfig(epochs=1, objective="focal" if "loss" in added else "sum_ce", distill=0, progress=False)
    ee.train(branched, data, config)
    if "calibrator" in added:
        frontier = ee.calibrate(branched, data, method="halves")
        assert {point.rule for point in frontier} <= {"halves", "never"}
    else:
        frontier = ee.calibrate(branched, data, scores=["mean_so_far" if "score" in added else "max_prob"])
    score = "mean_so_far" if "score" in added else "max_prob"
    records = ee.record(branched, [pixels])
    taus = [records.scores(score)[0].median().item() + 1e-5, float("inf")]
    branched.operate(thresholds=taus, score=score)
    output = branched.predict(pixels)
    assert output.exit_index.tolist() == records.replay(ee.ThresholdPolicy(tuple(taus), score)).exit_index.tolist()
    assert branched.receipt().unchanged
    again = ee.from_pretrained(branched.save_pretrained(tmp_path), model, sample=pixels[:2])
    torch.testing.assert_close(again.predict(pixels).logits, output.logits)
    assert again.frontier == frontier


def test_a_score_says_once_whether_it_keeps_a_state() -> None:
    asked: list[int] = []

    def score(logits: Tensor, confidence: Tensor | None, state: tuple[Tensor, ...]):
        asked.append(1)
        return torch.softmax(logits, -1).amax(-1), (logits,)

    ee.SCORES.register("stated", stateful=True)(score)
    assert ee.ThresholdPolicy((float("inf"), 0.5), "stated").visits() == (True, True)
    assert not asked
    ee.SCORES.register("asked")(score)
    assert ee.ThresholdPolicy((float("inf"), 0.5), "asked").visits() == (True, True)
    assert asked
    ee.SCORES.register("wrong", stateful=False)(score)
    with pytest.raises(ee.ConfigError, match="stateful=True"):
        ee.ThresholdPolicy((0.5,), "wrong").decide(0, torch.zeros(2, 3), None, ())


def test_a_property_that_there_is_not_is_refused_with_near_ones() -> None:
    with pytest.raises(ee.ConfigError, match="Did you mean 'stateful'"):
        ee.SCORES.register("typo", statefull=True)
    assert "typo" not in ee.SCORES


def test_a_branch_that_fits_any_layout_is_not_replaced_by_a_preset() -> None:
    class Anywhere(ee.Branch):
        any_layout = True

    ee.BRANCHES.register("anywhere")(Anywhere)
    ee.BRANCHES.register("maps_only")(type("MapsOnly", (ee.Branch,), {}))
    points = [ee.ExitPoint("p", (), 0, "n", (11, 8), "sequence", 0, 1, 10, 0.5, True, "", True)]
    for name, expected in (("anywhere", "anywhere"), ("maps_only", "token")):
        preset = replace(ee.PRESETS["sdn"], branch=ee.BranchSpec(name))
        assert [spec.name for spec in preset.branches(points)] == [expected]


def test_a_loss_that_reads_no_labels_trains_on_batches_without() -> None:
    @ee.OBJECTIVES.register("agree", reads_labels=False)
    def agree(answers: Answers, config: ObjectiveSettings) -> Tensor:
        return sum(F.mse_loss(exit.logits, answers.original) for exit in answers.exits)  # pyright: ignore[reportReturnType]

    model = timm.create_model("test_resnet", num_classes=3).eval()
    pixels = torch.randn(8, 3, 32, 32)
    branched = ee.augment(model, 2, sample=pixels[:2])
    with pytest.raises(ee.DataError, match="no labels"):
        ee.train(branched, [pixels], ee.TrainConfig(epochs=1, progress=False))
    report = ee.train(branched, [pixels], ee.TrainConfig(epochs=1, objective="agree", distill=0, progress=False))
    assert report.epochs[0].loss > 0


_PACKAGE = {
    "squeezing.py": """
import ee_surgery as ee

@ee.BRANCHES.register("squeezing")
class Squeezing(ee.Branch):
    def __init__(self, point, num_classes, confidence=False):
        super().__init__(point, num_classes, confidence, point.shape[0])

    def vector(self, features, mask=None):
        return features.mean((2, 3))
""",
    "ee_squeezing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: ee-squeezing\nVersion: 1.0\n",
    "ee_squeezing-1.0.dist-info/top_level.txt": "squeezing\n",
    "ee_squeezing-1.0.dist-info/entry_points.txt": (
        "[ee_surgery.branches]\nsqueezing = squeezing:Squeezing\nbroken = squeezing_missing:Branch\n"
    ),
}


def test_a_package_adds_branches_by_entry_points_and_adapters_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in _PACKAGE.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    with monkeypatch.context() as installed:
        installed.syspath_prepend(tmp_path / "site")
        made = ee.augment(model, 1, branch="squeezing")
        made.save_pretrained(tmp_path / "adapter")
        assert ee.BRANCHES.package("squeezing") == "ee-squeezing"
        assert ee.BRANCHES.package("pool") is None
        with pytest.raises(ee.UnknownNameError, match="'squeezing'"):
            ee.BRANCHES["squeezin"]
        with pytest.raises(ee.ConfigError, match=r"squeezing_missing.*cannot be imported"):
            ee.BRANCHES["broken"]
        assert ee.from_pretrained(tmp_path / "adapter", model).specs == made.specs
    del ee.BRANCHES._items["squeezing"]
    with pytest.raises(ee.UnknownNameError, match=r"'squeezing'.*from the package 'ee-squeezing'.*if you trust it"):
        ee.from_pretrained(tmp_path / "adapter", model)
