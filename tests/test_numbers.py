"""Answers that are no classes: embeddings, galleries, numbers and maps of numbers, through the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.branches.scaled import Scaled
from ee_surgery.policies.scores import scores_of
from ee_surgery.task import CLASSIFICATION, TASKS, Task, stored_task
from ee_surgery.training.loss import batch_loss

N, SIZE = 20, 64
QUICK = ee.TrainConfig(epochs=1, validation=0, progress=False, batch_size=10, teach="original")
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": 16,
}  # fmt: skip
_BERT: dict[str, Any] = {**_SMALL, "vocab_size": 50}


class SentenceEncoder(nn.Module):
    """The mean over the tokens that are no padding, as sentence-transformers pools."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(**_BERT))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def _pictures() -> Tensor:
    return torch.randn(N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def _texts() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.randint(3, 10, (N, 1), generator=made)).long()
    return {"input_ids": torch.randint(0, 50, (N, 9), generator=made), "attention_mask": mask}


def _clip() -> nn.Module:
    config = transformers.CLIPVisionConfig(**_SMALL, projection_dim=24)
    return transformers.CLIPVisionModelWithProjection(config)


def _dino() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**_SMALL))


def _depth() -> nn.Module:
    backbone = transformers.Dinov2Config(
        **_SMALL, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, patch_size=16, neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config)


def _dpt() -> nn.Module:
    config = transformers.DPTConfig(
        **_SMALL, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        is_hybrid=False,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


def _bert_regression() -> nn.Module:
    config = transformers.BertConfig(**_BERT, num_labels=3, problem_type="regression")
    return transformers.BertForSequenceClassification(config)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    task: Task
    inputs: Callable[[], Any] = _pictures
    labels: Callable[[], Tensor] | None = None
    exits: int = 2
    shape: tuple[int, ...] = ()


def _random(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(N, *shape, generator=torch.Generator().manual_seed(1))


CASES = {
    "timm-features": Case(lambda: timm.create_model("test_vit", num_classes=0, img_size=SIZE), ee.Embedding(0.5)),
    "clip": Case(_clip, ee.Embedding(0.5), shape=(24,)),
    "clip-zero-shot": Case(_clip, ee.Gallery(_random(24)()[:5]), shape=(24,)),
    "dinov2-gallery": Case(
        _dino, ee.Gallery(_random(32)(), torch.arange(N) % 4), labels=lambda: torch.arange(N) % 4, shape=(32,)
    ),
    "sentence-encoder": Case(SentenceEncoder, ee.Embedding(0.5), _texts, shape=(32,)),
    "bert-regression": Case(_bert_regression, ee.Regression(0.1), _texts, _random(3), shape=(3,)),
    "timm-regression": Case(
        lambda: timm.create_model("test_resnet", num_classes=1), ee.Regression(0.05), labels=_random(), shape=(1,)
    ),
    "depth-anything": Case(_depth, ee.Regression(0.05), shape=(SIZE, SIZE)),
    "dpt": Case(_dpt, ee.Regression(0.3, relative=True), labels=_random(SIZE, SIZE), exits=1, shape=(SIZE, SIZE)),
}


def _part(inputs: Any, rows: slice) -> Any:
    return {name: x[rows] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def _data(case: Case) -> list[Any]:
    inputs, labels = case.inputs(), None if case.labels is None else case.labels()
    pieces = [slice(i, i + 10) for i in range(0, N, 10)]
    return [_part(inputs, p) if labels is None else (_part(inputs, p), labels[p]) for p in pieces]


def _branched(case: Case) -> ee.EarlyExitModel:
    torch.manual_seed(0)
    return ee.augment(case.make().eval(), case.exits, task=case.task, sample=_part(case.inputs(), slice(2)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers_go_through_the_whole_pipeline(case: Case, tmp_path: Path) -> None:
    branched, data, inputs = _branched(case), _data(case), case.inputs()
    original = branched.backbone
    own = branched.engine.backbone.logits(original(**inputs) if isinstance(inputs, dict) else original(inputs))
    assert torch.equal(branched.predict(inputs).logits, own)
    config = QUICK if case.labels is None else ee.TrainConfig(epochs=1, progress=False, batch_size=10)
    before = [parameter.clone() for parameter in branched.branches.parameters()]
    ee.train(branched, data, config)
    assert any(not torch.equal(a, b) for a, b in zip(before, branched.branches.parameters(), strict=True))
    frontier = ee.calibrate(branched, data)
    assert frontier.task == branched.task.name
    records = ee.record(branched, data)
    score = branched.task.default_score
    middle = records.scores(score).median().item()
    branched.operate(thresholds=middle)
    replay = records.replay(branched.policy)  # pyright: ignore[reportArgumentType]
    for size in (1, 2, 5):
        output = branched.predict(_part(inputs, slice(size)))
        assert output.logits.shape == (size, *(case.shape or own.shape[1:]))
        sure = (records.scores(score)[:, :size] - middle).abs().amin(0) > 1e-4
        assert torch.equal(output.exit_index[sure], replay.exit_index[:size][sure])
    evaluation = ee.evaluate(branched, data)
    assert evaluation.accuracy == pytest.approx(replay.outcome.mean().item(), abs=0.02)
    branched.save_pretrained(tmp_path / "adapter")
    loaded = ee.from_pretrained(tmp_path / "adapter", original, sample=_part(inputs, slice(2)))
    assert loaded.task == branched.task
    assert torch.equal(loaded.predict(inputs).logits, branched.predict(inputs).logits)
    assert branched.receipt().unchanged
    again = ee.ExitRecords.load(records.save(tmp_path / "records.safetensors"))
    assert again.task == records.task
    assert torch.equal(again.outcomes, records.outcomes)
    assert again.measures() == records.measures()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_they_answer_alike_in_one_onnx_file(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")
    branched, data = _branched(case), _data(case)
    ee.train(branched, data, QUICK if case.labels is None else ee.TrainConfig(epochs=1, progress=False, batch_size=10))
    records = ee.record(branched, data)
    branched.operate(thresholds=records.scores(branched.task.default_score).median().item())
    check = ee.check_export(branched.export(tmp_path / "model.onnx"), branched, data)
    assert check.exits == 0
    assert check.logits < 1e-3


# --- definitions


def _vectors(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 99), width=st.integers(2, 9), floor=st.floats(0.05, 1.0))
def test_embeddings_are_right_above_the_floor_whatever_their_length(seed: int, width: int, floor: float) -> None:
    task, a, b = ee.Embedding(floor), _vectors(6, width, seed), _vectors(6, width, seed + 100)
    cosines = (F.normalize(a) * F.normalize(b)).sum(1)
    clear = (cosines - floor).abs() > 1e-4
    assert torch.equal(task.outcome(a, b)[clear], (cosines >= floor).float()[clear])
    assert torch.equal(task.outcome(3 * a, b)[clear], task.outcome(a, b)[clear])
    assert bool((task.outcome(a, a) == 1).all())
    assert task.loss(a, a).abs().amax() < 1e-5
    assert task.divergence(a, b, 3.0).mul(9).allclose(task.loss(a, b), atol=1e-5)


@given(seed=st.integers(0, 99), labelled=st.booleans())
def test_a_gallery_answers_with_the_nearest_entry(seed: int, labelled: bool) -> None:
    entries, queries = _vectors(7, 5, seed), _vectors(4, 5, seed + 100)
    labels = torch.arange(7) % 3 if labelled else None
    task = ee.Gallery(entries, labels, scale=10)
    similar = F.normalize(queries) @ F.normalize(entries).T
    nearest = similar.argmax(1)
    assert torch.equal(task.labels_from(queries), nearest if labels is None else labels[nearest])
    p = task.probabilities(queries)
    assert p.shape == (4, 3 if labelled else 7)
    assert p.sum(1).allclose(torch.ones(4), atol=1e-5)
    soft = torch.softmax(10 * similar, 1)
    expected = soft if labels is None else torch.stack([soft[:, labels == c].sum(1) for c in range(3)], 1)
    assert p.allclose(expected, atol=1e-5)
    target = task.labels_from(queries)
    assert task.loss(queries, target).allclose(-expected.log().gather(1, target[:, None])[:, 0], atol=1e-3)
    assert stored_task("gallery", task.options()) == task
    assert ee.Gallery(entries, labels, scale=11) != task


@given(seed=st.integers(0, 99), relative=st.booleans(), holes=st.booleans())
def test_numbers_are_right_within_the_tolerance(seed: int, relative: bool, holes: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    task = ee.Regression(0.5, relative)
    answers, target = torch.randn(6, 4, generator=made), torch.randn(6, 4, generator=made)
    if holes:
        target[:, 1] = torch.nan
    checked = task.check_target(target, 4, 6)
    kept = [0, 2, 3] if holes else [0, 1, 2, 3]
    error = (answers - target)[:, kept].abs()
    near = 0.5 * (target[:, kept].abs() if relative else torch.ones_like(error))
    assert task.outcome(answers, checked).allclose((error <= near).float().mean(1))
    tally = task.tally(answers, checked)
    assert task.measures["mean_absolute_error"](tally) == pytest.approx(error.mean().item(), rel=1e-5)
    assert bool((task.outcome(target.nan_to_num(), checked) == 1).all())
    assert bool(torch.isfinite(task.loss(answers, checked)).all())


def test_maps_are_resized_to_their_labels_and_pixels_without_one_count_nowhere() -> None:
    task = ee.MapRegression(0.1)
    target = torch.full((2, 8, 8), torch.nan)
    target[0, :4] = 1.0
    coarse = torch.ones(2, 1, 4, 4)
    assert task.outcome(coarse, target).tolist() == [1.0, 0.0]
    assert task.ignored(target).tolist() == [False, True]
    assert task.enlarge(coarse, (8, 8)).shape == (2, 8, 8)
    assert task.enlarge(coarse, (1, 8, 8)).shape == (2, 1, 8, 8)
    assert task.check_target(target[:, None], 1, 2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("name", ["embedding", "regression", "map_regression"])
def test_scores_that_read_probabilities_are_not_for_numbers(name: str) -> None:
    task = TASKS[name]
    assert not task.chooses
    assert {"max_prob", "margin", "entropy"}.isdisjoint(scores_of(task, units=True))
    assert task.default_score == "learned"
    assert "max_prob" in scores_of(CLASSIFICATION, units=True)


def test_confidence_units_learn_what_an_answer_will_be_worth() -> None:
    """Half of the samples can be told from the features, half cannot: the unit finds which."""
    made = torch.Generator().manual_seed(0)
    logits = torch.zeros(64, 2)
    target = torch.where(torch.arange(64)[:, None] % 2 == 0, 0.0, 5.0).expand(64, 2).contiguous()
    units = torch.randn(64, generator=made).requires_grad_()
    answers = [ee.ExitLogits(logits, units)]
    settings = ee.TrainConfig(objective="sum_ce", distill=0.0)
    rate = torch.optim.Adam([units], lr=0.3)
    for _ in range(40):
        rate.zero_grad()
        batch_loss(answers, logits, target, torch.tensor([0.5, 1.0]), settings, task=ee.Regression(1.0)).backward()
        rate.step()
    assert bool((units[::2] > 1).all())
    assert bool((units[1::2] < -1).all())


@pytest.mark.parametrize("size", [1e-5, 1.0, 4e3])
@pytest.mark.parametrize("branch", ["auto", "mlp"])
def test_branches_take_over_the_scale_of_what_they_learn(size: float, branch: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    images = torch.randn(32, 3, SIZE, SIZE)
    labels = size * (torch.tensor([1.0, 50.0]) + images.mean((2, 3))[:, :2] * torch.tensor([20.0, 1000.0]))
    task = ee.Regression(tolerance=2 * size)
    branched = ee.augment(model, 1, task=task, sample=images[:2], branch=branch)
    ee.train(branched, [(images, labels)], ee.TrainConfig(epochs=30, lr=1e-2, distill=0.0, progress=False))
    answers = branched.all_exits(images)[0]
    assert bool(((answers - labels).abs().mean(0) < 0.8 * labels.std(0)).all())
    before = [layer.scale.clone() for layer in branched.branches.modules() if isinstance(layer, Scaled)]
    ee.train(branched, [(images, 7 * labels)], ee.TrainConfig(epochs=1, progress=False))
    after = [layer.scale for layer in branched.branches.modules() if isinstance(layer, Scaled)]
    assert before
    assert all(map(torch.equal, before, after))  # what it has learned is in the scale of then


# --- refusals


def _vit(classes: int) -> nn.Module:
    return timm.create_model("test_vit", num_classes=classes, img_size=SIZE).eval()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ee.augment(_vit(3), task="regression"), ee.ConfigError, r"Regression\(tolerance=\)"),
        (lambda: ee.augment(_vit(0), task="gallery"), ee.ConfigError, r"Gallery\(embeddings\)"),
        (lambda: ee.augment(_vit(0), task=ee.Gallery(torch.randn(3, 5))), ee.CaptureError, "of 64 numbers.* have 5"),
        (lambda: ee.augment(_vit(0)), ee.CaptureError, r"task=ee.Embedding\(\)"),
        (lambda: ee.augment(_bert_regression()), ee.CaptureError, r"Regression\(tolerance=\)"),
        (lambda: ee.augment(_vit(3), task=ee.Regression(-1)), ee.ConfigError, "tolerance"),
        (lambda: ee.Embedding(0.0), ee.ConfigError, "floor"),
        (lambda: ee.Gallery(torch.randn(3, 4), torch.arange(2)), ee.ConfigError, "labels"),
        (lambda: ee.Gallery(torch.randn(3, 4), torch.tensor([0, 1, 1 << 40])), ee.ConfigError, "entries x classes"),
        (lambda: ee.Gallery([1.0]), ee.ConfigError, "embeddings"),  # pyright: ignore[reportArgumentType]
        (lambda: stored_task("embedding", {"flor": 1}), ee.ConfigError, "no option 'flor'"),
    ],
)
def test_what_cannot_be_is_refused_and_says_what_to_do(
    call: Callable[[], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call()


def test_losses_and_calibrators_that_read_probabilities_are_refused() -> None:
    case = CASES["timm-features"]
    branched, data = _branched(case), _data(case)
    with pytest.raises(ee.ConfigError, match=r"cumulative.*'embedding'"):
        ee.train(branched, data, ee.TrainConfig(objective="cumulative", teach="original"))
    with pytest.raises(ee.ConfigError, match=r"cascade.*answers that are choices"):
        ee.calibrate(branched, data, method="cascade")
    with pytest.raises(ee.ConfigError, match=r"max_prob.*answers that are choices"):
        branched.operate(thresholds=0.5, score="max_prob")


def test_detectors_are_refused_and_say_why() -> None:
    config = transformers.YolosConfig(**{**_SMALL, "image_size": [SIZE, SIZE]}, num_detection_tokens=5)
    detector = transformers.YolosForObjectDetection(config).eval()
    with pytest.raises(ee.CaptureError, match="Detectors"):
        ee.augment(detector, sample=_pictures()[:2])


@pytest.mark.parametrize(
    ("task", "labels", "says"),
    [
        (ee.Embedding(), torch.zeros(2, dtype=torch.long), r"ee.Gallery\(embeddings, labels\)"),
        (ee.Embedding(), torch.full((2, 4), torch.nan), "not finite"),
        (ee.Regression(1.0), torch.zeros(2, 3), r"shape \(2, 4\)"),
        (ee.Regression(1.0), torch.full((2, 4), torch.inf), "infinite"),
        (ee.MapRegression(1.0), torch.zeros(2, 4), "Label maps"),
    ],
)
def test_labels_of_another_kind_are_refused(task: Task, labels: Tensor, says: str) -> None:
    with pytest.raises(ee.DataError, match=says):
        task.check_target(labels, 4, 2)


def test_a_damaged_task_in_an_adapter_is_refused(tmp_path: Path) -> None:
    from ee_surgery.share.adapter import change_adapter

    branched = _branched(CASES["timm-features"])
    branched.save_pretrained(tmp_path)
    with change_adapter(tmp_path) as change:
        assert change.data
        change.data["task_options"] = {"floor": 7}
    with pytest.raises(ee.AdapterError, match="floor"):
        ee.from_pretrained(tmp_path, branched.backbone)
