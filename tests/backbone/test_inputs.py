"""Whatever a model takes and answers with: several inputs, texts, masks, no head, any size, dtype and memory format."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.backbone.inputs import Batch, tensors
from ee_surgery.graph.backends.base import bind
from ee_surgery.graph.segments import compact, cut
from tests.zoo import BY_NAME, SPECIAL, TEXTS, Special, original


def _close(seen: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)


def _some(specials: list[Special]) -> list[Any]:
    """The large ones, and those that differ from BERT in names alone, are for the slow tests."""
    alike = {f"hf-{name}ForSequenceClassification" for name in ("Roberta", "Electra", "Albert", "DistilBert")}
    large = {"coat", "tnt", "mobilevit", "hf-ShieldGemma2", "hf-PPLCNetForImageClassification", *alike}
    return [pytest.param(s, id=s.name, marks=[pytest.mark.slow] * (s.name in large)) for s in specials]


@pytest.mark.parametrize("special", _some(SPECIAL))
def test_special_models_are_augmented_run_trained_and_saved(special: Special, tmp_path: Path) -> None:
    branched = special.augment()
    backbone = branched.engine.backbone
    inputs = backbone.sample
    with torch.no_grad():
        plain = backbone(inputs)
        if not backbone.headless:
            assert type(branched(inputs)) is type(plain)
            assert torch.equal(backbone.logits(branched(inputs)), backbone.logits(plain))
            _close(branched.all_exits(inputs)[-1], backbone.logits(plain))
    before = {name: tensor.clone() for name, tensor in branched.branches.state_dict().items()}
    labels = torch.arange(4) % backbone.num_classes
    report = ee.train(branched, [(inputs, labels)], ee.TrainConfig(epochs=1, warmup=0, progress=False))
    assert report.epochs[0].skipped == 0
    after = branched.branches.state_dict()
    changed = {name.split(".")[1] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed >= {"0", "1"}
    records = ee.record(branched, [(inputs, labels)])
    ranked = records.scores("max_prob").sort(1).values
    branched.operate(thresholds=((ranked[:, 1] + ranked[:, 2]) / 2).tolist())
    output, replay = branched.predict(inputs), records.replay(branched.policy)  # pyright: ignore[reportArgumentType]
    assert output.exit_index.tolist() == replay.exit_index.tolist()
    _close(output.logits, records.logits[output.exit_index, torch.arange(4)])
    backwards = backbone.batch(inputs).select([3, 2, 1, 0]).arguments
    _close(branched.predict(backwards).logits, output.logits.flip(0))
    assert branched.receipt().unchanged
    loaded = ee.from_pretrained(branched.save_pretrained(tmp_path), branched.backbone, sample=inputs)
    again = loaded.predict(inputs)
    assert again.exit_index.tolist() == output.exit_index.tolist()
    assert torch.equal(again.logits, output.logits)


@pytest.mark.parametrize("special", _some([s for s in SPECIAL if s.name in ("tnt", "mobilevit", "coat")]))
def test_folded_and_parallel_tensors_can_be_cut_anywhere(special: Special) -> None:
    graph = special.graph
    given = graph.backbone.sample
    folded = [point for point in graph.points if graph.features(point).axis.folded]
    assert not graph.illegal
    assert folded or special.name == "coat"
    with torch.no_grad():
        whole = graph.backbone.logits(graph.backbone(given))
        for point in [*folded[::12], *graph.points[::25]]:
            segments = cut(graph.capture, graph.liveness, [point.index])
            first, rest = (bind("python", segment, lambda name: graph.backbone.model) for segment in segments)
            live = compact(first(*tensors(given).values()), segments[1].axes, torch.tensor([2, 0]))
            (logits,) = rest(*live)
            _close(logits, whole[[2, 0]])


@pytest.mark.parametrize("special", _some(TEXTS))
def test_padding_changes_no_branch(special: Special) -> None:
    branched = special.augment()
    assert {point.layout for point in branched.plan.points} == {"sequence"}
    ids, mask = branched.engine.backbone.sample["input_ids"][:1, :8], torch.ones(1, 8, dtype=torch.long)
    pad = branched.backbone.config.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
    longer = torch.cat([ids, torch.full((1, 5), pad or 0)], 1)
    padded = torch.cat([mask, torch.zeros(1, 5, dtype=torch.long)], 1)
    alone = branched.all_exits(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(branched.all_exits(input_ids=longer, attention_mask=padded), alone, rtol=1e-3, atol=1e-4)


def test_text_of_other_lengths_and_batches() -> None:
    branched = TEXTS[0].augment()
    branched.operate(thresholds=2.0)
    generator = torch.Generator().manual_seed(0)
    for length, batch in [(16, 1), (7, 3), (30, 2), (7, 1)]:
        ids = torch.randint(1, 99, (batch, length), generator=generator)
        with torch.no_grad():
            expected = branched.backbone(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits
        _close(branched(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits, expected)
    short, long = (branched.predict(input_ids=torch.ones(1, n, dtype=torch.long)) for n in (7, 30))
    assert short.original_macs < long.original_macs
    assert short.macs_fraction.item() == pytest.approx(long.macs_fraction.item(), abs=0.05)


def test_siglip2_takes_pictures_of_any_shape() -> None:
    special = next(s for s in SPECIAL if "Siglip2" in s.name)
    branched = special.augment()
    sample = dict(branched.engine.backbone.sample)
    sample["spatial_shapes"] = torch.tensor([[4, 4], [2, 3], [3, 5], [1, 8]])
    sample["pixel_attention_mask"] = (torch.arange(16) < sample["spatial_shapes"].prod(1, keepdim=True)).long()
    branched.operate(thresholds=2.0)
    with torch.no_grad():
        expected = branched.backbone(**sample).logits
    _close(branched(**sample).logits, expected)


class _TwoInputs(nn.Module):
    """An image vector, facts about it, and a bias that all samples share; answers with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, image: Tensor, facts: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.c(torch.relu(self.a(image) + self.b(facts).movedim(1, 0).movedim(1, 0)))
        return {"logits": self.head(hidden if bias is None else hidden + bias)}


@pytest.fixture(scope="module")
def two() -> ee.EarlyExitModel:
    """Augmented with all three."""
    sample = (torch.randn(4, 8), torch.randn(4, 4), torch.randn(1, 8))
    return ee.augment(_TwoInputs().eval(), ["a", "c"], sample=sample)


def test_several_inputs_by_position_keyword_and_dict(two: ee.EarlyExitModel) -> None:
    image, facts, bias = torch.randn(5, 8), torch.randn(5, 4), torch.randn(1, 8)
    with torch.no_grad():
        expected = two.backbone(image, facts, bias)["logits"]
    two.operate(thresholds=2.0)
    calls: list[Any] = [
        two(image, facts, bias),
        two(image, facts=facts, bias=bias),
        two({"image": image, "facts": facts, "bias": bias}),
    ]
    for answer in calls:
        assert type(answer) is dict
        _close(answer["logits"], expected)
    _close(two(image, facts)["logits"], two.backbone(image, facts)["logits"])  # another program: no bias
    first = two.predict(image[:1], facts[:1], bias)
    _close(first.logits, expected[:1])
    two.operate(thresholds=0.0)
    assert two.predict(image, facts, bias).exit_index.tolist() == [0] * 5
    assert two.predict(image[:0], facts[:0], bias).logits.shape == (0, 3)
    two.operate(None)


def test_inputs_that_do_not_fit_together_are_refused(two: ee.EarlyExitModel) -> None:
    with pytest.raises(ee.DataError, match=r"different numbers of samples: {'image': 5, 'facts': 3}"):
        two.predict(torch.randn(5, 8), torch.randn(3, 4))
    with pytest.raises(ee.DataError, match=r"takes inputs \['image', 'facts', 'bias'\]; got 4"):
        two.predict(*[torch.randn(5, 8)] * 4)


def test_a_sample_is_filled_up_to_four() -> None:
    given = {"x": torch.randn(1, 3, 4), "ids": torch.tensor([[5, 6, 7]]), "n": torch.tensor([2])}
    filled = Batch.of(given).sample().arguments
    assert [len(tensor) for tensor in filled.values()] == [4, 4, 4]
    assert len(filled["x"].unique(dim=0)) == 4
    assert filled["ids"].sort(1).values.unique(dim=0).tolist() == [[5, 6, 7]]


FORMATS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "not contiguous": lambda x: x.transpose(2, 3),
    "every second pixel's neighbour": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize(
    "name",
    [
        "cifar-resnet20",
        "test_vit",
        pytest.param("test_convnext", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
        pytest.param("hf-Beit", marks=pytest.mark.slow),
    ],
)
def test_memory_formats_dtypes_and_autocast_give_the_originals_own_logits(name: str) -> None:
    model = copy.deepcopy(original(name))
    x = BY_NAME[name].sample(4)
    branched = ee.augment(model, 2, "fine", sample=x)
    logits = branched.engine.backbone.logits

    def check(x: Tensor) -> None:
        branched.operate(None)
        with torch.no_grad():
            expected = logits(branched(x))
        branched.operate(thresholds=2.0)
        scale = expected.abs().max().item()
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}[expected.dtype] * scale
        for batch in (4, 1):
            torch.testing.assert_close(branched.predict(x[:batch]).logits, expected[:batch], rtol=0, atol=tolerance)
        branched.operate(thresholds=0.0)
        assert branched.predict(x).exit_index.tolist() == [0] * 4
        assert branched.predict(x[:0]).logits.shape == (0, expected.shape[1])

    for change in FORMATS.values():
        check(change(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(x)
    model.to(memory_format=torch.channels_last)
    check(x.to(memory_format=torch.channels_last))
    for dtype in (torch.bfloat16, torch.float16):
        branched.to(dtype)
        check(x.to(dtype))


def test_other_image_sizes_are_captured_once_and_those_the_model_refuses_say_so() -> None:
    branched = ee.augment(timm.create_model("test_convnext"), 2, sample=torch.randn(2, 3, 64, 64))
    branched.operate(thresholds=2.0)
    for size in (64, 96, 80, 96):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            _close(branched(x), branched.backbone(x))
    assert len(branched.engine.programs) == 3
    fixed = ee.augment(original("hf-ViT"), 2, sample=BY_NAME["hf-ViT"].sample())
    fixed.operate(thresholds=2.0)
    with pytest.raises(ee.CaptureError, match=r"does not accept inputs of shape .*48, 48.*interpolate_pos_encoding"):
        fixed(torch.randn(2, 3, 48, 48))


def test_options_reach_the_model_and_the_adapter(tmp_path: Path) -> None:
    vit = ee.augment(original("hf-ViT"), 2, sample=BY_NAME["hf-ViT"].sample())
    vit.operate(thresholds=2.0)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = vit.backbone(x, interpolate_pos_encoding=True).logits
    _close(vit(x, interpolate_pos_encoding=True).logits, expected)
    wide = ee.augment(original("hf-ViT"), 2, sample={"pixel_values": x, "interpolate_pos_encoding": True})
    loaded = ee.from_pretrained(wide.save_pretrained(tmp_path), original("hf-ViT"))
    assert loaded.trunk_macs == wide.trunk_macs
    assert torch.equal(
        loaded.all_exits(x, interpolate_pos_encoding=True), wide.all_exits(x, interpolate_pos_encoding=True)
    )


def test_a_new_head_learns_and_has_nobody_to_learn_from() -> None:
    special = next(s for s in SPECIAL if s.name == "headless-timm")
    branched = special.augment()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 5
    x = torch.randn(64, 3, 64, 64, generator=generator) + labels.view(-1, 1, 1, 1) * 2.0
    config = ee.TrainConfig(epochs=30, lr=2e-2, progress=False, batch_size=64, validation=0)
    report = ee.train(branched, [(x, labels)], config)
    assert report.epochs[-1].loss < 0.7 * report.epochs[0].loss
    logits = branched(x)
    assert isinstance(logits, Tensor)
    assert logits.shape == (64, 5)
    assert (logits.argmax(1) == labels).double().mean() > 0.5
    assert branched.trunk_macs[-1] > ee.inspect(branched.backbone, x[:2], num_classes=5).macs  # the head is counted
    with pytest.raises(ee.DataError, match="new head needs labels"):
        ee.train(branched, [x], ee.TrainConfig(epochs=1, teach="original", progress=False))
    with pytest.raises(ee.CaptureError, match="num_classes="):
        ee.inspect(timm.create_model("test_resnet", num_classes=0, global_pool=""), x[:2])


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(8, 8), inner, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x)))


class _PerSample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row if row.sum() > 0 else -row for row in x])


class _Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[i] * 2 for i in range(x.shape[0])])


class _Maximum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


torch.library.define("surgery_tests::twice", "(Tensor x) -> Tensor")


@torch.library.impl("surgery_tests::twice", "cpu")
def _twice(x: Tensor) -> Tensor:
    return x * 2


class _Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.surgery_tests.twice(x)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (
            _PerSample(),
            r"in module 'inner': its Python control flow depends on the data .*torch.where.*opaque=\['inner'\]",
        ),
        (_Loop(), r"in module 'inner': its code fixes the batch size.*opaque=\['inner'\]"),
        (_Custom(), r"in module 'inner': an operator has no fake kernel \(surgery_tests.twice.*register_fake"),
    ],
)
def test_what_cannot_be_captured_names_the_module_and_the_way_out(inner: nn.Module, message: str) -> None:
    model = _Wrapped(inner).eval()
    x = torch.randn(6, 8)
    with pytest.raises(ee.CaptureError, match=message):
        ee.inspect(model, x)
    branched = ee.augment(model, ["stem", "inner"], sample=x[:4], opaque=["inner"])  # the way out
    branched.operate(thresholds=2.0)
    for batch in (1, 3, 6):
        with torch.no_grad():
            _close(branched.predict(x[:batch]).logits, model(x[:batch]))
    branched.operate(thresholds=0.4)
    ahead = branched.predict(x)
    _close(torch.cat([branched.predict(x[i : i + 1]).logits for i in range(6)]), ahead.logits)
    assert "forward" not in vars(inner)  # nothing is left on the original


class _Noisy(nn.Module):
    """Data in Python, BatchNorm and dropout: none of them may notice that the caller trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.norm, self.dropout = _PerSample(), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float, shift: Tensor | None = None) -> dict[str, Tensor]:
        out = self.dropout(self.norm(self.inside(x)))
        return {"wide": torch.cat([out, out], 1), "out": out * scale if shift is None else out * scale + shift}


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(8, 8), _Noisy(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        once = self.inner(self.stem(x), 0.5)
        twice = self.inner(once["out"], 2.0, shift=once["wide"][:, :8])
        return self.head(twice["out"])


def test_modules_kept_whole_run_in_eval_mode_as_often_as_they_are_called() -> None:
    model = _Outer().train()
    x = torch.randn(5, 8)
    branched = ee.augment(model, ["stem", "inner"], sample=x[:3], opaque=["inner.inside", "inner"])
    branched.operate(thresholds=2.0)
    branched.train()
    seen = branched.predict(x).logits
    assert all(module.training for module in model.modules())
    assert branched.receipt().unchanged
    with torch.no_grad():
        _close(seen, model.eval()(x))


def test_an_opaque_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ee.ConfigError, match=r"no module 'iner'.*inner"):
        ee.inspect(_Wrapped(nn.ReLU()), torch.randn(4, 8), opaque=["iner"])


@pytest.mark.parametrize("inner", [_Maximum(), _Mean()])
@pytest.mark.parametrize("exit_name", ["stem", "inner"])
def test_models_that_mix_samples_are_refused_wherever_the_exit_is(inner: nn.Module, exit_name: str) -> None:
    with pytest.raises(ee.SurgeryError, match=r"module 'inner' answers differently|one number read from all samples"):
        ee.augment(_Wrapped(inner).eval(), [exit_name], sample=torch.randn(4, 8))


def test_a_sample_the_model_does_not_take_is_explained() -> None:
    with pytest.raises(ee.DataError, match=r"does not accept a sample of shape {'input': \(4, 7\)}.*sample="):
        ee.inspect(nn.Sequential(nn.Linear(8, 3)), torch.randn(4, 7))


def test_training_flags_and_hooks_are_left_alone() -> None:
    model = _Wrapped(_PerSample())
    model.train()
    with contextlib.suppress(ee.CaptureError):
        ee.inspect(model, torch.randn(4, 8))
    ee.inspect(model, torch.randn(4, 8), opaque=["inner"])
    assert all(module.training and not module._forward_hooks for module in model.modules())
