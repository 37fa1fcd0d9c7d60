"""Labels: one check for every verb, -100 counts nowhere, and labels of other classes than the model's are found out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ee_surgery as ee
from ee_surgery import folders
from ee_surgery.backbone.base import Backbone
from ee_surgery.data.batches import halves
from ee_surgery.data.labels import Labels, check_labels, class_numbers, hard, strangers
from ee_surgery.training.loss import batch_loss, relative_costs
from ee_surgery.training.mixup import Mixing
from tests.training.test_training import blobs, small

QUICK = ee.TrainConfig(epochs=1, batch_size=32, validation=0, progress=False)


class Coded(nn.Module):
    """A trained model of so many classes: the first pixel says which one a picture is of."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.later = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 256, 3, padding=1)
        self.codes = nn.Parameter(torch.arange(classes).float())

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 4, 4) -> (B, C)."""
        return -((x[:, 0, 0, 0] + 0 * self.later(self.conv(x)).mean((1, 2, 3)))[:, None] - self.codes).abs()


IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def coded(classes: int = 1000) -> ee.EarlyExitModel:
    return ee.augment(Coded(classes).eval(), ["conv"], branch="pool", sample=torch.randn(2, 3, 4, 4))


def pictures(classes: Tensor) -> Tensor:
    images = torch.randn(len(classes), 3, 4, 4)
    images[:, 0, 0, 0] = classes.float()
    return images


def ten_folders(n: int = 200, sort: bool = False) -> TensorDataset:
    labels = torch.arange(n) % 10
    labels = labels.sort().values if sort else labels
    return TensorDataset(pictures(torch.tensor(IMAGENETTE)[labels]), labels)


VERBS: dict[str, Callable[..., Any]] = {
    "train": lambda branched, data, **more: ee.train(branched, data, QUICK, **more),
    "validation": lambda branched, data, **more: ee.train(
        branched, ee.unlabelled(data), replace(QUICK, objective="kd"), validation=data, **more
    ),
    "record": ee.record,
    "calibrate": ee.calibrate,
    "evaluate": ee.evaluate,
    "verdict": lambda branched, data, **more: (
        ee.calibrate(branched, ee.unlabelled(data)), ee.verdict(branched, data, {}, **more)
    ),
    "search_exits": lambda branched, data, **more: ee.search_exits(
        branched.backbone, data, data, branch="pool", points=["conv"], max_accuracy_drop=1.0, config=QUICK,
        probe_steps=2, sample=branched.sample["x" if "x" in branched.sample else "input"], **more,
    ),
    "augment": lambda branched, data, **more: ee.augment(
        branched.backbone, branched.exits, branch="pool", calibrate=data,
        sample=next(iter(branched.sample.values())), **more,
    ),
}  # fmt: skip
BAD = {
    "minus one": (torch.tensor([-1, 0, 1, 2]), "got -1 to 2.*-100"),
    "other negatives": (torch.tensor([-7, 0, 1, 2]), "got -7 to 2"),
    "counted from 1": (torch.tensor([1, 2, 3, 4]), "labels - 1"),
    "too large": (torch.tensor([0, 9, 1, 2]), "class_map="),
    "booleans": (torch.tensor([True, False, True, True]), r"torch.bool.*labels.long\(\)"),
    "floats": (torch.tensor([0.0, 1.0, 2.0, 3.0]), r"torch.float32.*labels.long\(\)"),
    "a column of floats": (torch.tensor([[0.0], [1.0], [2.0], [3.0]]), r"labels.long\(\)"),
    "not a number": (torch.full((4,), torch.nan), "class numbers"),
    "several classes": (torch.tensor([[1, 1, 0, 0]] * 4), "each row summing to 1"),
    "no probabilities": (torch.full((4, 4), torch.nan), "each row summing to 1"),
    "negative probabilities": (torch.tensor([[2.0, -1.0, 0.0, 0.0]] * 4), "each row summing to 1"),
    "logits of fewer classes": (torch.zeros(4, 3), r"shape \(4, 3\)"),
    "another length": (torch.tensor([0, 1, 2]), "4 inputs but 3 labels"),
    "a number": (torch.tensor(3), "4 inputs but a single number"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("verb", ["train", "validation", "record", "calibrate", "evaluate"])
def test_every_verb_refuses_bad_labels_before_they_have_an_effect(verb: str, kind: str) -> None:
    branched = small()
    labels, message = BAD[kind]
    before = [p.clone() for p in branched.branches.parameters()]
    with pytest.raises(ee.DataError, match=message):
        VERBS[verb](branched, [(torch.randn(4, 3, 8, 8), labels)])
    assert all(torch.equal(a, b) for a, b in zip(before, branched.branches.parameters(), strict=True))
    assert branched.frontier is None
    assert "evaluation" not in branched.provenance


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "int32": Tensor.int,
    "uint8": lambda labels: labels.to(torch.uint8),
    "column": lambda labels: labels[:, None],
    "one-hot": lambda labels: nn.functional.one_hot(labels, 4),
    "one-hot booleans": lambda labels: nn.functional.one_hot(labels, 4).bool(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_class_numbers_is_the_same_label(form: str) -> None:
    images, labels = blobs(64).tensors
    found = []
    for given in (labels, FORMS[form](labels)):
        branched, data = small(), [(images[:32], given[:32]), (images[32:], given[32:])]
        report = ee.train(branched, data, QUICK, validation=data)
        records = ee.record(branched, data)
        frontier = ee.calibrate(branched, data)
        found.append(
            (report.epochs[0].loss, report.accuracies, records.accuracies, ee.evaluate(branched, data), frontier[0])
        )
    assert found[0] == found[1]
    assert found[0][2] == [float(a) for a in found[0][1].values()]


def test_probabilities_teach_and_their_most_probable_class_is_what_accuracy_means() -> None:
    images, labels = blobs(64).tensors
    soft = 0.7 * nn.functional.one_hot(labels, 4) + 0.3 / 4
    branched = small()
    report = ee.train(branched, [(images, soft.half())], QUICK, validation=[(images, soft.double())])
    assert report.accuracies == ee.train(small(), [(images, soft)], QUICK, validation=[(images, labels)]).accuracies
    assert ee.record(branched, [(images, soft)]).labels is not None
    assert torch.equal(ee.record(branched, [(images, soft)]).labels, labels)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("objective", [name for name in ee.OBJECTIVES if name != "final_only"])
@pytest.mark.parametrize("survivor", [None, 0.5])
def test_ignored_samples_are_as_if_they_were_not_there(objective: str, survivor: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    exits = [ee.ExitLogits(torch.randn(8, 4, generator=g), torch.randn(8, generator=g)) for _ in range(2)]
    original, labels = torch.randn(8, 4, generator=g), torch.arange(8) % 4
    config = ee.TrainConfig(objective=objective, survivor=survivor)
    costs = relative_costs(small())
    rows = torch.tensor([0, 2, 3, 6])
    kept = [ee.ExitLogits(e.logits[rows], None if e.confidence is None else e.confidence[rows]) for e in exits]
    ignoring = labels.clone()
    ignoring[[1, 4, 5, 7]] = -100
    expected = batch_loss(kept, original[rows], labels[rows], costs, config)
    for given in (ignoring, ignoring.int(), ignoring[:, None]):
        assert torch.equal(batch_loss(exits, original, given, costs, config), expected)
    zeros = nn.functional.one_hot(labels, 4) * (ignoring != -100)[:, None]
    assert torch.equal(batch_loss(exits, original, zeros, costs, config), expected)
    assert batch_loss(exits, original, torch.full((8,), -100), costs, config) == 0


def test_ignored_samples_count_neither_in_records_nor_in_accuracies() -> None:
    images, labels = blobs(64).tensors
    branched = small()
    ee.train(branched, [(images, labels)], QUICK)
    rows = labels.ne(1).nonzero().squeeze(1)
    ignoring = labels.masked_fill(labels == 1, -100)
    records, expected = ee.record(branched, [(images, ignoring)]), ee.record(branched, [(images, labels)]).take(rows)
    assert torch.equal(records.logits, expected.logits)
    assert records.accuracies == expected.accuracies
    branched.operate(thresholds=0.4)
    found, wanted = (ee.evaluate(branched, [(images[r], y[r])]) for r, y in ((slice(None), ignoring), (rows, labels)))
    assert (found.samples, found.accuracy, found.exit_shares) == (wanted.samples, wanted.accuracy, wanted.exit_shares)
    report = ee.train(branched, [(images, labels)], QUICK, validation=[(images, ignoring)])
    assert list(report.accuracies.values()) == ee.record(branched, [(images, ignoring)]).accuracies
    for verb in ("record", "calibrate", "evaluate", "train"):
        with pytest.raises(ee.DataError, match="-100, which is ignored"):
            VERBS[verb](branched, [(images, torch.full_like(labels, -100))])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_with_ignored_samples_is_one_without_them(accumulate: int) -> None:
    images, labels = blobs(64).tensors
    ignoring = labels.clone()
    ignoring[:20] = -100  # all of the first batch, some of the second
    batches = list(zip(images.split(16), ignoring.split(16), strict=True))
    config = replace(QUICK, schedule="constant", warmup=0)
    counted = ignoring != -100
    steps = [slice(0, 32), slice(32, 64)] if accumulate == 2 else [slice(16, 32), slice(32, 48), slice(48, 64)]
    without = [(images[rows][counted[rows]], labels[rows][counted[rows]]) for rows in steps]
    found, expected = small(), small()
    report = ee.train(found, batches, replace(config, accumulate=accumulate))
    ee.train(expected, without, config)
    assert report.epochs[0].skipped == 0
    assert found.provenance["training"]["samples"] == 44
    for a, b in zip(found.branches.parameters(), expected.branches.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_mixed_with_an_ignored_sample_is_ignored() -> None:
    mixing = Mixing(ee.TrainConfig(cutmix=1.0, mix_share=1.0), 4)
    torch.manual_seed(0)
    _, mixed = mixing(torch.randn(6, 3, 8, 8), torch.tensor([0, -100, 1, 2, 3, 0]))
    assert mixed is not None
    assert mixed.shape == (6, 4)
    sums = mixed.sum(1)
    assert (sums[[1, 2]] == 0).all()  # itself, and the one that its patch went to
    torch.testing.assert_close(sums[[0, 3, 4, 5]], torch.ones(4))


# --- labels of another world


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("sort", [False, True])
def test_every_verb_stops_at_ten_folders_of_a_thousand_classes(verb: str, sort: bool) -> None:
    branched = coded()
    with pytest.raises(ee.DataError, match="of its 1000 class numbers") as error:
        VERBS[verb](branched, ten_folders(sort=sort))
    for way in ("class_map=", 'teach="original"', "ee.unlabelled", "num_classes="):
        assert way in str(error.value)


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "search_exits"])
def test_a_class_map_says_what_the_labels_are(verb: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".* are untrained", UserWarning)
        VERBS[verb](coded(), ten_folders(), class_map=IMAGENETTE)
        VERBS[verb](coded(), ten_folders(), class_map=dict(enumerate(IMAGENETTE)))
    assert ee.record(coded(), ten_folders(), class_map=IMAGENETTE).base_accuracy == 1
    assert ee.evaluate(coded(), ten_folders(), class_map=IMAGENETTE).original_accuracy == 1
    with pytest.warns(UserWarning, match="Is class_map= right"):
        ee.record(coded(), ten_folders(), class_map=range(10))
    with pytest.raises(ee.DataError, match=r"below 3|no entry for label"):
        VERBS[verb](coded(), ten_folders(), class_map=IMAGENETTE[:3])


def test_a_search_takes_a_class_map_too() -> None:
    with pytest.raises(ee.ExitPointError, match="saves anything"):  # labels were fine, the probes are not
        VERBS["search_exits"](coded(), ten_folders(), class_map=IMAGENETTE)


def test_labels_counted_from_one_or_under_other_numbers_are_found_out_though_they_are_in_range() -> None:
    truth = torch.arange(200) % 50
    images = pictures(truth)
    shifted, permuted = truth + 1, (truth * 7 + 3) % 50
    for labels, message in ((shifted, "mostly the label -1"), (permuted, "under other numbers")):
        data = [(images.repeat(3, 1, 1, 1), labels.repeat(3))]
        with pytest.raises(ee.DataError, match=message):
            ee.record(coded(60 if labels is shifted else 50), data)


def test_an_untrained_model_on_labels_of_all_its_classes_is_warned_of_not_refused() -> None:
    g = torch.Generator().manual_seed(0)
    answers, truth = torch.randint(4, (256,), generator=g), torch.randint(4, (256,), generator=g)
    assert strangers(answers, truth, 4) is None
    assert strangers(torch.zeros(256, dtype=torch.long), truth, 4) is None
    with pytest.warns(UserWarning, match="Is it trained"):
        ee.record(small(), [(torch.randn(256, 3, 8, 8), truth)])


def test_a_model_that_knows_some_of_its_labels_is_left_alone() -> None:
    g = torch.Generator().manual_seed(0)
    for classes, among in ((1000, 1000), (1000, 10), (10, 2), (100, 100)):
        truth = torch.randint(among, (256,), generator=g) * (classes // among)
        right = torch.rand(256, generator=g) < 0.35
        answers = torch.where(right, truth, torch.randint(classes, (256,), generator=g))
        assert strangers(answers, truth, classes) is None
        assert strangers(answers.sort().values, answers.sort().values, classes, 1) is None


def test_few_samples_do_not_tell() -> None:
    truth = torch.arange(20) % 10
    assert strangers(truth + 300, truth.sort().values, 1000) is None


def test_without_labels_agreement_is_measured() -> None:
    for data in (ten_folders(), [ten_folders().tensors], [{"x": ten_folders().tensors[0], "labels": torch.zeros(200)}]):
        found = ee.evaluate(coded(), ee.unlabelled(data))
        assert (found.original_accuracy, found.labelled) == (1.0, False)
    searching, thresholds = halves(ee.unlabelled(ten_folders()), 50)
    assert len(ee.record(coded(), searching)) + len(ee.record(coded(), thresholds)) == 200


def test_a_class_map_is_by_number_name_or_wordnet_id() -> None:
    base = Backbone(timm.create_model("test_resnet", num_classes=1000).eval())
    names = ["tench", "English springer", "english_springer", "n02102040", 701, "parachute, chute", "n01440764"]
    assert class_numbers(names, base).tolist() == [0, 217, 217, 217, 701, 701, 0]
    assert class_numbers({3: "tench", 0: 5}, base).tolist() == [5, -1, -1, 0]
    wrong: list[tuple[Any, str]] = [
        (["dog"], "no class 'dog'"),
        (["crane"], "several classes named 'crane'"),
        ([1000], "classes 0 to 999"),
        ([-1], "classes 0 to 999"),
        ([], "a list with one class per label"),
        ("tench", "a list with one class per label"),
        ({"tench": 0}, "label numbers"),
    ]
    for class_map, message in wrong:
        with pytest.raises(ee.ConfigError, match=message):
            class_numbers(class_map, base)
    config = transformers.ResNetConfig(id2label={0: "cat, puss", 1: "dog"}, hidden_sizes=[8] * 4, embedding_size=8)
    own = Backbone(transformers.ResNetForImageClassification(config).eval(), torch.randn(2, 3, 32, 32))
    assert class_numbers(["dog", "puss"], own).tolist() == [1, 0]
    with pytest.raises(ee.ConfigError, match="no class 'n01440764'"):
        class_numbers(["n01440764"], own)


def test_probabilities_over_the_datas_classes_are_mapped_too() -> None:
    known = Labels(coded(6).engine, [4, 5, 4])
    mapped = known(torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]), 2)
    assert mapped.tolist() == [[0, 0, 0, 0, 0.75, 0.25], [0, 0, 0, 0, 0, 1]]
    assert hard(mapped).tolist() == [4, 5]
    assert known(torch.tensor([2, -100]), 2).tolist() == [4, -100]
    assert check_labels(torch.tensor([0.0, 0.0]).reshape(1, 2), 2, 1).sum() == 0


def test_folders_named_by_wordnet_ids_are_found_on_the_command_line(tmp_path: Path) -> None:
    for name in ("n01440764", "English springer"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    found = folders.pictures(timm.create_model("test_resnet", num_classes=1000).eval(), tmp_path, unlabelled=False)
    assert [label for _, label in found] == [217, 0]
    assert torch.is_tensor(folders.pictures(timm.create_model("test_resnet").eval(), tmp_path, unlabelled=True)[0])
