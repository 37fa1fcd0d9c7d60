"""Training the original along: on a copy, by its own forward in training mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

import ee_surgery as ee

CONFIG = ee.TrainConfig(epochs=1, batch_size=16, lr=1e-2, validation=0, progress=False, distill=0)


def _data(n: int = 48) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, 32, 32, generator=g), torch.randint(5, (n,), generator=g)
    return list(zip(x.split(16), y.split(16), strict=True))


def _model(name: str = "test_resnet") -> torch.nn.Module:
    torch.manual_seed(0)
    options = {} if "resnet" in name else {"img_size": 32}
    return timm.create_model(name, num_classes=5, **options).eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_joint_training_changes_a_copy_and_leaves_the_given_model_as_it_was(name: str) -> None:
    model = _model(name)
    branched = ee.augment(model, 2, sample=torch.zeros(1, 3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    before = branched.all_exits(x)
    trained = ee.train(branched, _data(), CONFIG, joint=True).model
    assert trained is not branched
    assert branched.receipt().unchanged
    assert not model.training
    torch.testing.assert_close(branched.all_exits(x), before, rtol=0, atol=0)
    assert trained.receipt().unchanged  # of its own base
    assert trained.original is not model
    changed = [n for n, p in trained.original.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(changed) > 0.9 * len(list(model.parameters()))
    # what is recorded runs through the stages, and those hold the new weights
    with torch.no_grad():
        torch.testing.assert_close(trained.all_exits(x)[-1], trained.original(x), rtol=0, atol=0)


def test_batchnorm_of_the_copy_learns_in_training_mode() -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), CONFIG, joint=True).model
    moved = [
        n
        for n, b in trained.original.named_buffers()
        if "running" in n and not torch.equal(b, branched.original.get_buffer(n))
    ]
    assert moved


@pytest.mark.parametrize("objective", ["final_only", "sum_ce", "cumulative", "tagged", "normalized", "weighted_ce"])
def test_every_objective_teaches_the_original_too(objective: str) -> None:
    spec = ee.BranchSpec("pool", confidence=True)
    branched = ee.augment(_model(), 2, branch=spec, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), replace(CONFIG, objective=objective), joint=True).model
    assert not torch.equal(trained.original.get_parameter("fc.weight"), branched.original.get_parameter("fc.weight"))


def test_a_joint_base_is_saved_whole_and_loaded_onto_the_architecture(tmp_path: Path) -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), CONFIG, joint=True).model
    folder = trained.save_pretrained(tmp_path / "joint")
    assert (folder / "base.safetensors").exists()
    assert not (branched.save_pretrained(tmp_path / "adapter") / "base.safetensors").exists()
    x = torch.randn(3, 3, 32, 32)
    skeleton = timm.create_model("test_resnet", num_classes=5).eval()
    before = {n: p.clone() for n, p in skeleton.named_parameters()}
    for again in (ee.from_pretrained(folder, skeleton), ee.from_pretrained(folder)):
        torch.testing.assert_close(again.all_exits(x), trained.all_exits(x), rtol=0, atol=0)
        assert again.own_base
    assert all(torch.equal(p, before[n]) for n, p in skeleton.named_parameters())
    with pytest.raises(ee.AdapterError, match="does not fit"):
        ee.from_pretrained(folder, timm.create_model("test_vit", num_classes=5, img_size=32))


def test_joint_training_without_data_is_refused() -> None:
    with pytest.raises(ee.ConfigError, match="give train="):
        ee.augment(_model(), 2, joint=True, sample=torch.zeros(1, 3, 32, 32))


def test_a_teacher_that_learns_is_refused() -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ee.ConfigError, match="does not learn"):
        ee.train(branched, _data(), replace(CONFIG, teach="original"), joint=True)
    with pytest.raises(ee.ConfigError, match="joint=True"):
        ee.train(branched, _data(), replace(CONFIG, objective="final_only"))


def test_joint_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    whole = ee.train(branched, _data(), replace(CONFIG, epochs=2, schedule="constant"), joint=True).model
    settings = replace(CONFIG, epochs=2, schedule="constant", checkpoint_dir=str(tmp_path))
    ee.train(branched, _data(), settings, joint=True)
    again = ee.train(branched, _data(), settings, joint=True).model  # nothing left to do: the checkpoint's weights
    for (name, a), (_, b) in zip(whole.original.state_dict().items(), again.original.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def _short(preset: str) -> ee.TrainConfig:
    quick = {"epochs": 1, "batch_size": 16, "validation": 0, "progress": False, "ensemble_epochs": 2}
    return replace(ee.PRESETS[preset].config, **quick)


@pytest.mark.parametrize("name", list(ee.PRESETS))
def test_every_preset_runs_frozen_from_one_line(name: str) -> None:
    config = _short(name)
    model = _model()
    branched = ee.augment(
        model,
        2,
        preset=name,
        sample=torch.zeros(1, 3, 32, 32),
        train=_data(),
        calibrate=_data(),
        config=config,
    )
    assert branched.original is model
    assert branched.receipt().unchanged
    assert branched.frontier is not None
    assert branched.operate(branched.frontier[0]) is not None
    output = branched.predict(torch.randn(5, 3, 32, 32))
    assert output.logits.shape == (5, 5)


@pytest.mark.parametrize("name", [n for n, p in ee.PRESETS.items() if p.joint])
def test_presets_that_train_the_original_do_so_when_asked(name: str) -> None:
    config = _short(name)
    model = _model()
    branched = ee.augment(
        model, 2, preset=name, joint=True, sample=torch.zeros(1, 3, 32, 32), train=_data(), config=config
    )
    assert branched.original is not model
    assert branched.own_base


def test_a_preset_places_its_own_exits_and_fits_texts_and_tokens() -> None:
    graph = ee.inspect(_model("test_vit"), torch.zeros(1, 3, 32, 32))
    for preset in ee.PRESETS.values():
        plan = preset.plan(graph)
        assert len(ee.attach(graph, plan, preset.branches(plan.points)).exits) == len(plan.points)
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'pteenet'"):
        ee.augment(_model(), preset="ptenet", sample=torch.zeros(1, 3, 32, 32))
