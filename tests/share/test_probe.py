"""The base is recognised by what it computes, not by its tensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification, ViTModel

import ee_surgery as ee
from benchmarks.mutations import edit
from ee_surgery.backbone.base import Backbone
from ee_surgery.share.probe import InputSpec, Probe, make_inputs

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
Make = Callable[..., nn.Module]


class Net(nn.Module):
    """A small convolutional network whose every choice is an argument, and none of them has a tensor."""

    def __init__(
        self, act: type[nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.AdaptiveAvgPool2d, stride: int = 2,
        eps: float = 1e-5, dilation: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(i, o, 3, stride if k == 1 else 1, dilation, dilation, bias=False),
                    nn.BatchNorm2d(o, eps),
                    act(),
                )
                for k, (i, o) in enumerate([(3, 16), (16, 24), (24, 24), (24, 24)])
            )
        )
        self.pool, self.fc = pool(1), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, 32, 32) to logits (B, 10)."""
        return self.fc(self.pool(self.blocks(x)).flatten(1))


def _vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(**{**TINY, "image_size": 32, "patch_size": 8, "num_labels": 10, **options})
    )  # pyright: ignore[reportArgumentType]


def _bert(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**TINY, "vocab_size": 50, "num_labels": 5, **options}))  # pyright: ignore[reportArgumentType]


def _timm(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options)  # pyright: ignore[reportArgumentType]


def _resnet(**options: object) -> nn.Module:
    return _timm("test_resnet", **options)


def _timm_vit(**options: object) -> nn.Module:
    return _timm("test_vit", **options)


def _convnext(**options: object) -> nn.Module:
    return _timm("test_convnext", **options)


OTHERS: dict[str, tuple[Make, dict[str, object]]] = {
    "net activation": (Net, {"act": nn.GELU}),
    "net close activation": (Net, {"act": nn.LeakyReLU}),
    "net pooling": (Net, {"pool": nn.AdaptiveMaxPool2d}),
    "net stride": (Net, {"stride": 1}),
    "net epsilon": (Net, {"eps": 1e-3}),
    "net dilation": (Net, {"dilation": 2}),
    "vit heads": (_vit, {"num_attention_heads": 2}),
    "vit epsilon": (_vit, {"layer_norm_eps": 1e-5}),
    "vit activation": (_vit, {"hidden_act": "quick_gelu"}),
    "bert heads": (_bert, {"num_attention_heads": 8}),
    "bert activation": (_bert, {"hidden_act": "relu"}),
    "bert epsilon": (_bert, {"layer_norm_eps": 1e-3}),
    "timm output stride": (_resnet, {"output_stride": 8}),
    "timm pooling": (_resnet, {"global_pool": "max"}),
    "timm close activation": (_timm_vit, {"act_layer": "gelu_tanh"}),
    "timm epsilon": (_convnext, {"norm_eps": 1e-3}),
}


def _sample(model: nn.Module) -> torch.Tensor | None:
    if isinstance(model, Net):
        return torch.randn(3, 3, 32, 32)
    return torch.randn(3, 3, 64, 64) if isinstance(model, (timm.models.ResNet, timm.models.ConvNeXt)) else None


def _saved(model: nn.Module, folder: Path, **options: object) -> Path:
    return ee.augment(model.eval(), 1, sample=_sample(model), **options).save_pretrained(folder)  # pyright: ignore[reportArgumentType]


_ALIKE = {f"{family} {what}" for family in ("vit", "bert") for what in ("activation", "epsilon")}  # of the nets


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _ALIKE)) for n in OTHERS])
def test_the_same_tensors_under_another_computation_are_refused(name: str, tmp_path: Path) -> None:
    make, options = OTHERS[name]
    folder = _saved(make(), tmp_path)
    other = make(**options).eval()
    assert ee.from_pretrained(folder, make().eval()).exits
    with pytest.raises(ee.FingerprintError, match=r"something different: .*(probe differ by up to|does not accept)"):
        ee.from_pretrained(folder, other)
    with pytest.warns(UserWarning, match=r"computes something different.*other_base=True"):
        loaded = ee.from_pretrained(folder, other, other_base=True)
    assert "other_base" in loaded.provenance


@pytest.mark.parametrize("make", [Net, _vit, _bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_base_itself_is_taken_in_any_type_and_with_other_threads(
    make: Make, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = _saved(make().to(dtype), tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert ee.from_pretrained(folder, make().to(dtype).eval()).exits
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [Net, _vit, _bert])
def test_other_kernels_are_not_another_computation(make: Make, tmp_path: Path) -> None:
    folder = _saved(make(), tmp_path)
    with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        assert ee.from_pretrained(folder, make().eval()).exits


def test_probe_inputs_do_not_depend_on_the_default_type() -> None:
    specs = {"x": InputSpec((4, 3), "float32", 0), "y": InputSpec((4, 2), "int64", 9)}
    expected = make_inputs(specs, {})
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = make_inputs(specs, {})
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(found[name], expected[name]) for name in specs)


def test_a_base_without_a_head_is_probed_by_its_features(tmp_path: Path) -> None:
    def make(**options: object) -> nn.Module:
        torch.manual_seed(0)
        config = ViTConfig(**{**TINY, "image_size": 32, "patch_size": 8, **options})  # pyright: ignore[reportArgumentType]
        return ViTModel(config).eval()

    folder = _saved(make(), tmp_path, num_classes=4)
    probe = json.loads((folder / "config.json").read_text())["probe"]
    assert [len(row) for row in probe["logits"]] == [32, 32]
    assert ee.from_pretrained(folder, make()).exits
    with pytest.raises(ee.FingerprintError, match="computes something different"):
        ee.from_pretrained(folder, make(num_attention_heads=2))


def test_an_adapter_without_a_probe_is_taken_as_before(tmp_path: Path) -> None:
    folder = _saved(Net(), tmp_path)
    edit(folder, lambda data: data.pop("probe"))
    assert ee.from_pretrained(folder, Net(act=nn.GELU).eval(), own_base=True).exits


def test_a_base_that_random_inputs_do_not_suit_has_no_probe(tmp_path: Path) -> None:
    class Positive(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """NaN for any negative number."""
            return super().forward(x) + x.flatten(1).mean(1, keepdim=True).exp() * x.min().log() * 0

    folder = ee.augment(Net().eval(), 1, sample=torch.randn(3, 3, 32, 32)).save_pretrained(tmp_path)
    assert json.loads((folder / "config.json").read_text())["probe"]
    backbone = Backbone(Positive().eval(), torch.rand(3, 3, 32, 32))
    assert Probe.of(backbone, {"x": InputSpec((4, 3, 32, 32), "float32", 0)}, {}) is None
    assert Probe.of(backbone, {"x": InputSpec((4, 7), "float32", 0)}, {}) is None


def test_a_probe_of_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = _saved(Net(), tmp_path)
    data = json.loads((folder / "config.json").read_text())
    for damage in ({"logits": 3}, {"logits": [["a"]]}, {}):
        (folder / "config.json").write_text(json.dumps({**data, "probe": {**damage, "seed": 0}}))
        with pytest.raises(ee.AdapterError, match="damaged"):
            ee.from_pretrained(folder, Net().eval())


def test_a_base_saved_along_is_probed_too(tmp_path: Path) -> None:
    data = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 10)]
    branched = ee.augment(Net().eval(), 1, sample=torch.randn(3, 3, 32, 32))
    config = ee.TrainConfig(epochs=1, batch_size=8, progress=False)
    folder = ee.train(branched, data, config, joint=True).model.save_pretrained(tmp_path)
    assert ee.from_pretrained(folder, Net().eval(), own_base=True).own_base
    with pytest.raises(ee.FingerprintError, match="computes something different"):
        ee.from_pretrained(folder, Net(act=nn.GELU).eval(), own_base=True)
