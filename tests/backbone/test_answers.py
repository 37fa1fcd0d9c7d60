"""What a model answers with: which part the logits are, what is no softmax over classes, and what it was wrapped in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ee_surgery as ee
from ee_surgery.backbone.base import Backbone

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _base() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*features, nn.Linear(8, 10)).eval()


class _Answers(nn.Module):
    """Makes features (B, 8) and logits (B, 10), and answers with what a function makes of them."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.form = _base(), form

    def forward(self, x: Tensor) -> Any:
        features = self.body[:4](x)
        return self.form(features, self.body[4](features))


class _Named(NamedTuple):
    coarse: Tensor | None
    fine: Tensor | None


_SEVERAL = [
    (lambda f, y: (f, y), 1, lambda out: out[1]),
    (lambda f, y: (f, y), -1, lambda out: out[1]),
    (lambda f, y: [y * 2, y], 1, lambda out: out[1]),
    (lambda f, y: _Named(y * 2, y), "fine", lambda out: out.fine),
    (lambda f, y: _Named(y * 2, y), 1, lambda out: out.fine),
    (lambda f, y: {"coarse": y * 2, "fine": y}, "fine", lambda out: out["fine"]),
    (lambda f, y: {0: y * 2, 1: y}, 1, lambda out: out[1]),
    (lambda f, y: (f, [y * 2, y]), (1, 1), lambda out: out[1][1]),
    (lambda f, y: {"exits": (y * 2, y), "other": f}, ("exits", 1), lambda out: out["exits"][1]),
]


@pytest.mark.parametrize(("form", "output", "read"), _SEVERAL)
def test_which_of_several_tensors_the_logits_are_is_asked_kept_and_answered_in_place(
    form: Callable[[Tensor, Tensor], Any], output: Any, read: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    model = _Answers(form).eval()
    with pytest.raises(ee.SurgeryError, match=r"several tensors could be logits.*\(4, 10\).*output="):
        ee.augment(model, ["body.0"], sample=X)
    branched = ee.augment(model, ["body.0"], sample=X, output=output, branch="pool")
    branched.operate(thresholds=2.0)
    with torch.no_grad():
        original, routed = model(X), branched(X)
    assert type(routed) is type(original)
    torch.testing.assert_close(read(routed), read(original))
    torch.testing.assert_close(branched.predict(X).logits, model.body(X))
    branched.save_pretrained(tmp_path)
    loaded = ee.from_pretrained(tmp_path, model, sample=X)  # the adapter knows
    assert torch.equal(loaded.all_exits(X), branched.all_exits(X))
    assert torch.equal(branched.copy().all_exits(X), branched.all_exits(X))


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (lambda f, y: (y,), tuple),
        (lambda f, y: (y, f[:, :, None, None]), tuple),
        (lambda f, y: {"scores": y}, dict),
        (lambda f, y: {"features": f, "scores": y}, dict),
        (lambda f, y: {"logits": y, "auxiliary": y * 2}, dict),
    ],
)
def test_one_tensor_that_could_be_the_logits_needs_no_question(form: Callable[..., Any], kind: type) -> None:
    branched = ee.augment(_Answers(form).eval(), ["body.0"], sample=X, branch="pool")
    branched.operate(thresholds=0.0)
    answer = branched(X)
    assert type(answer) is kind
    assert branched.num_classes == 10


@pytest.mark.parametrize("output", [5, "logits", (1, 0)])
def test_an_output_that_is_not_there_is_refused_with_those_that_are(output: Any) -> None:
    with pytest.raises(ee.ConfigError, match=r"output=.*answers with 0 \(4, 8\), 1 \(4, 10\)"):
        ee.inspect(_Answers(lambda f, y: (f, y)).eval(), X, output=output)


def test_an_output_of_a_model_that_answers_with_one_tensor_is_refused() -> None:
    with pytest.raises(ee.ConfigError, match="answers with one tensor: leave it out"):
        ee.inspect(_base(), X, output=0)


_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def _vit(**options: Any) -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**_VIT, intermediate_size=64, **options)
    ).eval()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda f, y: y[:, :1], r"one number per sample.*\[0, z\]"),
        (lambda f, y: y[:, 0], r"one number per sample.*\[0, z\]"),
        (lambda f, y: y.argmax(1), "not logits of shape"),
        (lambda f, y: y.softmax(1), "probabilities.*logarithm"),
        (lambda f, y: y.sigmoid(), "sigmoid.*wrap.*multi_label"),
        (lambda f, y: y.sigmoid().view(-1, 10).clamp(0, 1), "sigmoid.*wrap.*multi_label"),
        (lambda f, y: y[:, None, :4], "not logits of shape.*Detectors"),
        (lambda f, y: [{"boxes": row[None, :4]} for row in y], "No logits.*'boxes'"),
    ],
)
def test_answers_that_are_no_softmax_over_classes_are_refused_with_the_way_out(
    form: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ee.CaptureError, match=message):
        ee.augment(_Answers(form).eval(), ["body.0"], sample=X)


def test_a_binary_head_wrapped_into_two_logits_and_the_logarithm_of_probabilities_are_taken() -> None:
    for form in (lambda f, y: torch.stack([torch.zeros_like(y[:, 0]), y[:, 0]], 1), lambda f, y: y.softmax(1).log()):
        branched = ee.augment(_Answers(form).eval(), ["body.0"], sample=X, branch="pool")
        branched.operate(thresholds=2.0)
        torch.testing.assert_close(branched.predict(X).logits, branched.backbone(X))


def test_regressions_of_transformers_are_refused_with_the_way_out() -> None:
    with pytest.raises(ee.CaptureError, match=r"problem_type='regression'.*task=.classification.*multi_label"):
        ee.augment(_vit(num_labels=5, problem_type="regression"), 2)
    assert ee.augment(_vit(num_labels=5, problem_type="single_label_classification"), 1).num_classes == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("test_resnet", num_classes=0),
        lambda: _vit(num_labels=0),
        lambda: transformers.ViTModel(transformers.ViTConfig(**_VIT)),
    ],
)
def test_features_are_not_taken_for_classes(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ee.CaptureError, match="num_classes="):
        ee.inspect(make())


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_a_new_head_tells_two_classes_apart_at_least(classes: int) -> None:
    with pytest.raises(ee.ConfigError, match="at least 2"):
        ee.augment(_base(), ["0"], sample=X, num_classes=classes)


def _prepared(precision: str) -> nn.Module:
    AcceleratorState._reset_state(True)
    try:
        return Accelerator(cpu=True, mixed_precision=precision).prepare(_base())
    finally:
        AcceleratorState._reset_state(True)


def _forward_compiled() -> nn.Module:
    model = _base()
    model.forward = torch.compile(model.forward)
    return model


def _part(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = _base()
    model[0] = wrap(model[0])
    return model


_WRAPPED = {
    "DataParallel": lambda: nn.DataParallel(_base()),
    "compiled": lambda: torch.compile(_base()),
    "compiled DataParallel": lambda: torch.compile(nn.DataParallel(_base())),
    "average": lambda: AveragedModel(_base()),
    "prepared": lambda: _prepared("no"),
    "prepared for bf16": lambda: _prepared("bf16"),
    "forward compiled": _forward_compiled,
    "part in DataParallel": lambda: _part(nn.DataParallel),
    "part compiled": lambda: _part(torch.compile),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("make", _WRAPPED.values(), ids=_WRAPPED)
def test_adapters_made_through_a_wrapper_load_on_the_bare_model_and_the_other_way_round(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, bare = make(), _base()
    names, attributes = list(model.state_dict()), dict(vars(model))
    wrapped = ee.augment(model, ["1"], sample=X, branch="pool")
    plain = ee.augment(bare, ["1"], sample=X, branch="pool")
    assert wrapped.adapter_config().base == plain.adapter_config().base
    wrapped.save_pretrained(tmp_path / "wrapped")
    plain.save_pretrained(tmp_path / "plain")
    expected = plain.all_exits(X)
    for folder, base in (("wrapped", bare), ("plain", model)):
        assert torch.equal(ee.from_pretrained(tmp_path / folder, base, sample=X).all_exits(X), expected)
    assert torch.equal(wrapped.copy().all_exits(X), expected)
    assert torch.equal(copy.deepcopy(wrapped).all_exits(X), expected)
    # nothing is taken off the user's own object
    assert list(model.state_dict()) == names
    assert vars(model).keys() == attributes.keys()
    assert all(vars(model)[name] is value for name, value in attributes.items())
    next(iter(model.parameters())).data.add_(1)  # and it is the same weights
    assert not wrapped.receipt().unchanged


class FullyShardedDataParallel(nn.Module):
    """Called like torch's, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_what_shards_parameters_names_the_inner_module() -> None:
    with pytest.raises(ee.CaptureError, match=r"shards parameters.*inner module.*model\.module"):
        ee.inspect(FullyShardedDataParallel(_base()), X)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_refused_by_name() -> None:
    with pytest.raises(ee.CaptureError, match="TorchScript"):
        ee.inspect(torch.jit.trace(_base(), X), X)


class _Peft(nn.Module):
    """What matters of a PeftModel here: peft itself is no dependency."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def test_peft_models_and_wrappers_keep_class_names_and_library() -> None:
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    for make in (_Peft, nn.DataParallel, lambda model: nn.DataParallel(_Peft(model))):
        found = Backbone(make(_vit(**names)))
        assert found.label_names == ["cat", "dog"]
        assert found.library == "transformers"
        assert found.identity().architecture == "ViTForImageClassification"
        with pytest.raises(ee.CaptureError, match="problem_type='regression'"):
            Backbone(make(_vit(problem_type="regression", **names)))
    found = Backbone(_Peft(timm.create_model("test_resnet").eval()))
    assert (found.library, found.model_id) == ("timm", "test_resnet.r160_in1k")
    assert found.preprocessing
