"""Models with adapters of the real `peft` library: their answers, the state that they are in, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import ee_surgery as ee
from ee_surgery.share.card_text import found_by_name

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def _vit() -> nn.Module:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8, num_labels=5)).eval()


def _timm() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "transformers": (_vit, ["q_proj", "v_proj"], 32),
    "timm": (_timm, ["qkv"], 160),
}
BOTH = pytest.mark.parametrize("kind", MODELS)


def _with_lora(kind: str, **options: Any) -> nn.Module:
    make, layers, _ = MODELS[kind]
    config = peft.LoraConfig(target_modules=layers, init_lora_weights=False, **options)
    return peft.get_peft_model(make(), config).eval()


def _pixels(kind: str) -> Tensor:
    size = MODELS[kind][2]
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def _logits(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.logits


@torch.no_grad()
def _same(branched: ee.EarlyExitModel, model: nn.Module, pixels: Tensor) -> None:
    """Both without early exit and routed with exits that no samples take, it answers as the model does now."""
    want = _logits(model(pixels))
    branched.operate(None)
    assert torch.equal(_logits(branched(pixels)), want)
    branched.operate(thresholds=2.0)
    torch.testing.assert_close(_logits(branched(pixels)), want)


def _adapters(branched: ee.EarlyExitModel) -> str:
    return branched.engine.backbone.identity().adapters


@BOTH
def test_adapters_switched_off_and_on_are_noticed(kind: str) -> None:
    model, pixels = _with_lora(kind), _pixels(kind)
    branched = ee.augment(model, exits=2)
    _same(branched, model, pixels)
    assert branched.receipt().unchanged
    assert _adapters(branched) == "default (lora)"
    with model.disable_adapter():
        _same(branched, model, pixels)
        assert not branched.receipt().unchanged
        assert "_disable_adapters: False -> True" in str(branched.receipt())
        assert _adapters(branched) == "default (lora, off)"
    _same(branched, model, pixels)
    assert branched.receipt().unchanged


@BOTH
def test_merging_later_is_a_change_of_weights(kind: str) -> None:
    model = _with_lora(kind)
    branched = ee.augment(model, exits=2)
    before = branched.engine.backbone.identity()
    model.merge_adapter()
    _same(branched, model, _pixels(kind))
    after = branched.engine.backbone.identity()
    assert after.adapters == "default (lora, merged)"
    assert after.fingerprint != before.fingerprint
    assert not branched.receipt().unchanged


@BOTH
def test_merged_adapters_and_models_without_peft_again_work(kind: str) -> None:
    model = _with_lora(kind)
    model.merge_adapter()
    branched = ee.augment(model, exits=2)
    _same(branched, model, _pixels(kind))
    assert branched.receipt().unchanged
    plain = model.merge_and_unload()
    branched = ee.augment(plain, exits=2)
    _same(branched, plain, _pixels(kind))
    assert _adapters(branched) == ""


def test_another_active_adapter_is_noticed_and_the_first_one_again_is_no_change() -> None:
    model, pixels = _with_lora("transformers"), _pixels("transformers")
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    branched = ee.augment(model, exits=2)
    model.set_adapter("other")
    _same(branched, model, pixels)
    assert "_active_adapter: ['default'] -> ['other']" in str(branched.receipt())
    assert _adapters(branched) == "other (lora)"
    model.set_adapter("default")
    _same(branched, model, pixels)
    assert branched.receipt().unchanged


@pytest.mark.parametrize("method", ["IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig", "dora", "modules_to_save"])
def test_other_methods_of_peft_work(method: str) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    if method == "IA3Config":
        options["feedforward_modules"] = []
    more = {"dora": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["classifier"]}}.get(method, {})
    config = getattr(peft, method, peft.LoraConfig)(**options, **more)
    model = peft.get_peft_model(_vit(), config).eval()
    _same(ee.augment(model, exits=2), model, _pixels("transformers"))


def test_adapters_injected_without_a_peft_model_are_named_as_well() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, _vit()).eval()
    branched = ee.augment(model, exits=2)
    _same(branched, model, _pixels("transformers"))
    assert _adapters(branched) == "default (lora)"


def test_text_classifiers_keep_their_inputs() -> None:
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    lora = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(BertForSequenceClassification(config), lora).eval()
    branched = ee.augment(model, exits=1)
    ids = torch.randint(1, 99, (4, 16))
    branched.operate(thresholds=2.0)
    with torch.no_grad():
        found = branched(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits)


def test_joint_training_trains_adapters_on_a_copy() -> None:
    model, pixels = _with_lora("transformers"), _pixels("transformers")
    flags = [p.requires_grad for p in model.parameters()]
    branched = ee.augment(model, exits=2)
    made = ee.train(branched, [(pixels, torch.arange(4))], ee.TrainConfig(epochs=1), joint=True).model
    trained = dict(made.backbone.named_parameters())
    assert {("lora_" in n) for n, p in model.named_parameters() if not torch.equal(p, trained[n])} == {True}
    assert branched.receipt().unchanged
    assert [p.requires_grad for p in model.parameters()] == flags


@BOTH
def test_an_adapter_goes_onto_the_same_state_alone(kind: str, tmp_path: Path) -> None:
    model, pixels = _with_lora(kind), _pixels(kind)
    branched = ee.augment(model, exits=2)
    branched.save_pretrained(tmp_path / "exits")
    model.save_pretrained(tmp_path / "lora")  # what peft itself stores
    again = peft.PeftModel.from_pretrained(MODELS[kind][0](), tmp_path / "lora").eval()
    loaded = ee.from_pretrained(tmp_path / "exits", again)
    for one in (branched, loaded):
        one.operate(thresholds=0.25)
    with torch.no_grad():
        assert torch.equal(_logits(branched(pixels)), _logits(loaded(pixels)))
    again.base_model.disable_adapter_layers()
    with pytest.raises(
        ee.FingerprintError, match=r"made with default \(lora\); the model given has default \(lora, off\)"
    ):
        ee.from_pretrained(tmp_path / "exits", again)
    with pytest.raises(ee.FingerprintError, match="the model given has no PEFT adapters"):
        ee.from_pretrained(tmp_path / "exits", MODELS[kind][0]())


@BOTH
def test_without_the_model_nothing_is_downloaded_and_the_error_says_how(kind: str, tmp_path: Path) -> None:
    model = _with_lora(kind)
    branched = ee.augment(model, exits=2)
    branched.save_pretrained(tmp_path)
    with pytest.raises(ee.AdapterError, match=r"PEFT adapters, default \(lora\).*PeftModel.from_pretrained"):
        ee.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "with the PEFT adapters default (lora) that you create yourself" in card
    assert not found_by_name(branched.engine.backbone.identity(), own_base=False)


def test_without_peft_the_folder_is_as_it_was(tmp_path: Path) -> None:
    ee.augment(_vit(), exits=2).save_pretrained(tmp_path)
    assert "adapters" not in (tmp_path / "config.json").read_text()
