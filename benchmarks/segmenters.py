"""Small segmentation models with random weights: every class of transformers that can be built, torchvision, smp.

python -m benchmarks.segmenters             # docs/segmenters.md; takes minutes
python -m benchmarks.segmenters --smoke     # two of them, on the terminal
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ee_surgery as ee
from benchmarks.tables import table
from ee_surgery.task import SEGMENTATION

PAGE = Path("docs/segmenters.md")

CLASSES = 5


@dataclass(frozen=True)
class Segmenter:
    """A model and the pictures it takes."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, int] = (64, 96)
    package: str = ""
    """What has to be installed beyond what the library needs."""

    def __str__(self) -> str:
        return self.name

    @property
    def missing(self) -> str:
        """What is not installed, or too old to have it; empty where nothing is."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        library, _, name = self.name.partition("-")
        if library != "hf":
            return ""
        import transformers

        known = hasattr(transformers, f"{name}ForSemanticSegmentation")
        return "" if known else f"transformers {transformers.__version__} has no {name}"

    def build(self) -> nn.Module:
        """With weights from one seed, in eval mode; norms have seen something, so that answers are not all alike."""
        torch.manual_seed(0)
        model = self.make().eval()
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 10)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
        return model

    def pictures(self, count: int = 5) -> Tensor:
        """(count, 3, H, W)."""
        return torch.randn(count, 3, *self.size, generator=torch.Generator().manual_seed(1))


def _hf(cls: str, config: str, **options: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, f"{config}Config")(num_labels=CLASSES, **options)
    return getattr(transformers, f"{cls}ForSemanticSegmentation")(made)


_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}


def _beit(cls: str) -> nn.Module:
    return _hf(
        cls, cls, **_VIT, image_size=64, out_indices=[1, 2, 3, 4], pool_scales=(1, 2), auxiliary_channels=16,
        use_relative_position_bias=True,
    )  # fmt: skip


def _dpt() -> nn.Module:
    sizes = {"fusion_hidden_size": 16, "neck_hidden_sizes": [8, 16, 24, 32], "reassemble_factors": [4, 2, 1, 0.5]}
    return _hf("DPT", "DPT", **_VIT, **sizes, image_size=64, backbone_out_indices=[0, 1, 2, 3])


def _mobilevit(cls: str) -> nn.Module:
    if cls == "MobileViT":
        return _hf(cls, cls, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
                   aspp_out_channels=16, num_attention_heads=2)  # fmt: skip
    return _hf(cls, cls, width_multiplier=0.25, aspp_out_channels=16)


def _segformer() -> nn.Module:
    return _hf("Segformer", "Segformer", depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16,
               num_attention_heads=[1, 2, 2, 4])  # fmt: skip


def _upernet() -> nn.Module:
    from transformers import ConvNextConfig

    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "out_features": stages}
    backbone = ConvNextConfig(**sizes)
    return _hf("UperNet", "UperNet", backbone_config=backbone, hidden_size=16, auxiliary_channels=16,
               auxiliary_in_channels=24)  # fmt: skip


def _sapiens() -> nn.Module:
    from transformers.models.sapiens2.configuration_sapiens2 import Sapiens2HeadConfig

    ups: dict[str, Any] = {"upsample_out_channels": [16], "upsample_kernel_sizes": [4]}
    convs: dict[str, Any] = {"conv_out_channels": [16], "conv_kernel_sizes": [1], "num_labels": CLASSES}
    head = Sapiens2HeadConfig(**ups, **convs)
    return _hf("Sapiens2", "Sapiens2", **{**_VIT, "patch_size": 16}, head_config=head, num_key_value_attention_heads=2,
               num_first_full_attention_layers=1, num_last_full_attention_layers=1)  # fmt: skip


def _tips() -> nn.Module:
    from transformers import AutoConfig

    backbone = AutoConfig.for_model(
        "tipsv2_vision_model", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56,
        out_features=[f"stage{i}" for i in (1, 2, 3, 4)], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    return _hf("Tipsv2Dpt", "Tipsv2Dpt", backbone_config=backbone, fusion_hidden_size=16,
               neck_hidden_sizes=[8, 16, 24, 32])  # fmt: skip


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import segmentation

    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    return getattr(segmentation, name)(**options, **({"aux_loss": True} if "resnet" in name else {}))


def _smp(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None, classes=CLASSES)


SMP = "segmentation_models_pytorch"
SEGMENTERS = [
    Segmenter("hf-Beit", partial(_beit, "Beit"), (64, 64)),
    Segmenter("hf-Data2VecVision", partial(_beit, "Data2VecVision"), (64, 64)),
    Segmenter("hf-DPT", _dpt, (64, 64)),
    Segmenter("hf-MobileNetV2", partial(_hf, "MobileNetV2", "MobileNetV2", depth_multiplier=0.25)),
    Segmenter("hf-MobileViT", partial(_mobilevit, "MobileViT")),
    Segmenter("hf-MobileViTV2", partial(_mobilevit, "MobileViTV2")),
    Segmenter("hf-Sapiens2", _sapiens),
    Segmenter("hf-Segformer", _segformer),
    Segmenter("hf-Tipsv2Dpt", _tips, (56, 84)),
    Segmenter("hf-UperNet", _upernet),
    Segmenter("torchvision-fcn_resnet50", partial(_torchvision, "fcn_resnet50")),
    Segmenter("torchvision-deeplabv3_resnet50", partial(_torchvision, "deeplabv3_resnet50")),
    Segmenter("torchvision-deeplabv3_mobilenet_v3_large", partial(_torchvision, "deeplabv3_mobilenet_v3_large")),
    Segmenter("torchvision-lraspp_mobilenet_v3_large", partial(_torchvision, "lraspp_mobilenet_v3_large")),
    Segmenter("smp-Unet", partial(_smp, "Unet", "resnet18"), package=SMP),
    Segmenter("smp-FPN", partial(_smp, "FPN", "tu-test_resnet"), package=SMP),
    Segmenter("smp-DeepLabV3Plus", partial(_smp, "DeepLabV3Plus", "timm-mobilenetv3_small_100"), package=SMP),
    Segmenter("smp-Segformer", partial(_smp, "Segformer", "mit_b0"), package=SMP),
]


def exits(graph: ee.ModelGraph) -> list[str]:
    """The first block and one in the middle of those that cost less than nine tenths."""
    early = [point.name for point in graph.blocks if 0 < point.macs_fraction < 0.9]
    return [early[0], early[len(early) // 2]]


def logits_of(answer: Any) -> Tensor:
    """Logits of what a model answers, whatever its form."""
    if isinstance(answer, Mapping):
        return answer["out"] if "out" in answer else answer["logits"]
    return answer[0] if isinstance(answer, tuple) else answer


CHECKS = {
    "identical": "no operating point: the original's output, bit for bit, in its type",
    "learns": "a training step changes the branches",
    "calibrates": "a frontier over pixel accuracy",
    "same in batches": "batches of 1, 2 and 5 leave and answer as one another",
    "as a whole": "pictures that stay get the original's map",
    "loads": "saved and loaded, the same answers",
    "unchanged": "receipt: every weight of the original as it was",
}


def checks(
    branched: ee.EarlyExitModel, model: nn.Module, x: Tensor, labels: Tensor, folder: Path
) -> Iterator[tuple[str, bool]]:
    """Each of `CHECKS`, by name; the branches end trained by one step and calibrated."""
    with torch.no_grad():
        expected, found = model(x), branched(x)
    whole = logits_of(expected)
    yield "identical", type(found) is type(expected) and torch.equal(logits_of(found), whole)
    before = {name: tensor.clone() for name, tensor in branched.branches.state_dict().items()}
    data = list(zip(x.split(2), labels.split(2), strict=True))
    ee.train(branched, data, ee.TrainConfig(epochs=1, max_steps=1, validation=0, progress=False))
    yield "learns", any(not torch.equal(before[name], t) for name, t in branched.branches.state_dict().items())
    yield "calibrates", ee.calibrate(branched, data).measure == SEGMENTATION.measure
    k = len(branched.exits)
    branched.operate(thresholds=-1.0)
    first = branched.predict(x)
    branched.operate(thresholds=[first.score.median().item(), *[2.0] * (k - 1)])
    routed = branched.predict(x)
    parts = [[branched.predict(part) for part in x.split(size)] for size in (1, 2, 5)]
    together = [(torch.cat([p.exit_index for p in ps]), torch.cat([p.logits for p in ps])) for ps in parts]
    yield (
        "same in batches",
        all(torch.equal(index, routed.exit_index) and _close(logits, routed.logits) for index, logits in together),
    )
    stayed = routed.exit_index == k
    some = bool(stayed.any()) and not bool(stayed.all())
    yield "as a whole", some and _close(routed.logits[stayed], whole[stayed]) and first.logits.shape == whole.shape
    branched.save_pretrained(folder / "adapter")
    output = 0 if isinstance(expected, tuple) else None
    loaded = ee.from_pretrained(folder / "adapter", model, sample=x[:2], output=output)
    yield "loads", torch.equal(loaded.predict(x).logits, routed.logits)
    yield "unchanged", branched.receipt().unchanged


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-4, rtol=1e-3)


def run(entry: Segmenter) -> list[str]:
    """A row of the page."""
    model, x = entry.build(), entry.pictures()
    graph = ee.inspect(model, x[:2])
    branched = ee.attach(graph, ee.place(graph, exits(graph)))
    labels = torch.randint(0, CLASSES, (len(x), *entry.size), generator=torch.Generator().manual_seed(3))
    with tempfile.TemporaryDirectory() as folder:
        found = dict(checks(branched, model, x, labels, Path(folder)))
    shape = "x".join(map(str, branched.engine.answer))
    uncounted = ", ".join(graph.uncounted) or "-"
    failed = ", ".join(name for name, good in found.items() if not good)
    size = "x".join(map(str, entry.size))
    return [entry.name, size, shape, f"{graph.macs / 1e6:.1f}", str(len(graph.points)), uncounted, failed or "all"]


_PAGE = """# Segmentation models

```bash
python -m benchmarks.segmenters
```

Every class of `AutoModelForSemanticSegmentation` in transformers, four models of torchvision and four of
segmentation_models_pytorch, at random weights and small sizes, each with `dense` branches at two exits. Checked of
each:

{checks}

Any module from pictures to maps (B, C, h, w) goes the same way; see [segmentation](segmentation.md).

{table}

{versions}.
"""


def main() -> None:
    """Check all of them, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    warnings.simplefilter("ignore")
    rows = [run(entry) for entry in (SEGMENTERS[7:8] if smoke else SEGMENTERS) if not entry.missing]
    head = ["model", "picture", "answer", "MMACs", "legal exits", "not counted", "checks passed"]
    from importlib.metadata import version

    names = ("torch", "torchvision", "transformers", "timm", *(() if smoke else (SMP,)))
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    page = _PAGE.format(
        checks="\n".join(f"- {check};" for check in CHECKS.values()), table=table(head, rows), versions=versions
    )
    print(page)
    if not smoke:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
