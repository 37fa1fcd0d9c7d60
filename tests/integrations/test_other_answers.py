"""At home in transformers with other answers than classes: Auto classes and pipelines for maps, depths and features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.integrations.transformers import EarlyExitForDepthEstimation, EarlyExitForImageClassification
from tests.test_numbers import CASES, SIZE

C = 5
SQUARE = {"height": SIZE, "width": SIZE}


def _segmenter() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=C, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16,
        num_attention_heads=[1, 1, 2, 2], id2label={k: f"class {k}" for k in range(C)},
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config).eval()


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].make().eval()


def _pixels() -> Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def _picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 72, 3), dtype=np.uint8))


def _saved(model: nn.Module, folder: Path, processor: Any, **options: Any) -> ee.EarlyExitModel:
    branched = ee.augment(model, 1, sample=_pixels()[:2], **options)
    branched.operate(thresholds=0.0)
    branched.save_pretrained(folder, processor=processor)
    return branched


def test_a_segmenter_in_its_auto_class_and_pipeline(tmp_path: Path) -> None:
    model, processor = _segmenter(), transformers.SegformerImageProcessor(size=SQUARE, do_reduce_labels=False)
    branched = _saved(model, tmp_path, processor)
    loaded = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path, base_model=model)
    labels = torch.randint(0, C, (4, SIZE, SIZE))
    output = loaded(_pixels(), labels=labels)
    assert isinstance(output, transformers.modeling_outputs.SemanticSegmenterOutput)
    assert torch.equal(output.logits, branched.predict(_pixels()).logits)
    assert output.exit_index.tolist() == [0] * 4
    maps = processor.post_process_semantic_segmentation(output, [(48, 72)] * 4)
    assert [found.shape for found in maps] == [(48, 72)] * 4
    pipe = transformers.pipeline(
        "image-segmentation", model=str(tmp_path), model_kwargs={"base_model": model}, device="cpu"
    )
    found = pipe(_picture())
    own = branched.predict(processor(_picture(), return_tensors="pt")["pixel_values"])
    (expected,) = processor.post_process_semantic_segmentation(
        transformers.modeling_outputs.SemanticSegmenterOutput(logits=own.logits), [(48, 72)]
    )
    assert {part["label"] for part in found} == {f"class {k}" for k in expected.unique().tolist()}
    for part in found:
        assert torch.equal(torch.from_numpy(np.array(part["mask"])) > 0, expected == int(part["label"][-1]))
    assert list(pipe.model.exit_counts.values()) == [1, 0]


def test_a_segmenter_learns_with_trainer(tmp_path: Path) -> None:
    branched = _saved(_segmenter(), tmp_path / "adapter", None)
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "adapter", base_model=branched.backbone
    )
    rows = [{"pixel_values": x, "labels": torch.randint(0, C, (SIZE, SIZE))} for x in _pixels()]
    before = [parameter.clone() for parameter in model.parameters()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert branched.receipt().unchanged


def test_depths_in_their_auto_class_and_pipeline(tmp_path: Path) -> None:
    model = _model("depth-anything")
    branched = _saved(model, tmp_path, transformers.DPTImageProcessor(size=SQUARE), task=ee.Regression(0.1))
    loaded = transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path, base_model=model)
    output = loaded(_pixels())
    assert torch.equal(output.predicted_depth, branched.predict(_pixels()).logits)
    assert output.predicted_depth.shape == (4, SIZE, SIZE)
    pipe = transformers.pipeline(
        "depth-estimation", model=str(tmp_path), model_kwargs={"base_model": model}, device="cpu"
    )
    assert pipe(_picture())["depth"].size == (72, 48)
    assert list(pipe.model.exit_counts.values()) == [1, 0]


@pytest.mark.parametrize(("name", "field"), [("clip", "image_embeds"), ("dinov2-gallery", "pooler_output")])
def test_features_in_the_auto_class(name: str, field: str, tmp_path: Path) -> None:
    model = _model(name)
    branched = _saved(model, tmp_path, None, task=CASES[name].task)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, base_model=model)
    output = loaded(_pixels())
    assert torch.equal(getattr(output, field), branched.predict(_pixels()).logits)
    assert output.exit_index.tolist() == [0] * 4


def test_the_class_for_another_answer_says_which_is_right() -> None:
    branched = ee.augment(_segmenter(), 1, sample=_pixels()[:2])
    with pytest.raises(ee.ConfigError, match="EarlyExitForSemanticSegmentation or EarlyExitForDepthEstimation"):
        EarlyExitForImageClassification.of(branched)
    assert EarlyExitForDepthEstimation.answers_in == "predicted_depth"
