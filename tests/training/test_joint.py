"""Training the original along: on a copy, by its own forward in training mode."""

from __future__ import annotations

import gc
import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.training.joint import JointModel

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
    assert trained.backbone is not model
    changed = [n for n, p in trained.backbone.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(changed) > 0.9 * len(list(model.parameters()))
    # what is recorded runs through the stages, and those hold the new weights
    with torch.no_grad():
        torch.testing.assert_close(trained.all_exits(x)[-1], trained.backbone(x), rtol=0, atol=0)


def test_batchnorm_of_the_copy_learns_in_training_mode() -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), CONFIG, joint=True).model
    moved = [
        n
        for n, b in trained.backbone.named_buffers()
        if "running" in n and not torch.equal(b, branched.backbone.get_buffer(n))
    ]
    assert moved


@pytest.mark.parametrize(
    "objective",
    [
        "final_only",
        "cumulative",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sum_ce", "tagged", "normalized", "weighted_ce")),
    ],
)
def test_every_objective_teaches_the_original_too(objective: str) -> None:
    spec = ee.BranchSpec("pool", confidence=True)
    branched = ee.augment(_model(), 2, branch=spec, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), replace(CONFIG, objective=objective), joint=True).model
    assert not torch.equal(trained.backbone.get_parameter("fc.weight"), branched.backbone.get_parameter("fc.weight"))


def test_a_joint_base_is_saved_whole_and_loaded_onto_the_architecture(tmp_path: Path) -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), CONFIG, joint=True).model
    folder = trained.save_pretrained(tmp_path / "joint")
    assert (folder / "base.safetensors").exists()
    assert not (branched.save_pretrained(tmp_path / "adapter") / "base.safetensors").exists()
    x = torch.randn(3, 3, 32, 32)
    skeleton = timm.create_model("test_resnet", num_classes=5).eval()
    before = {n: p.clone() for n, p in skeleton.named_parameters()}
    for again in (
        ee.from_pretrained(folder, skeleton, own_base=True),
        ee.from_pretrained(folder, own_base=True),
    ):
        torch.testing.assert_close(again.all_exits(x), trained.all_exits(x), rtol=0, atol=0)
        assert again.own_base
    assert all(torch.equal(p, before[n]) for n, p in skeleton.named_parameters())
    with pytest.raises(ee.AdapterError, match="has no tensor"):
        ee.from_pretrained(folder, timm.create_model("test_vit", num_classes=5, img_size=32), own_base=True)


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
    for (name, a), (_, b) in zip(whole.backbone.state_dict().items(), again.backbone.state_dict().items(), strict=True):
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
    assert branched.backbone is model
    assert branched.receipt().unchanged
    assert branched.frontier is not None
    assert branched.operate(branched.frontier[0]) is not None
    output = branched.predict(torch.randn(5, 3, 32, 32))
    assert output.logits.shape == (5, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, p in ee.PRESETS.items() if p.joint])
def test_presets_that_train_the_original_do_so_when_asked(name: str) -> None:
    config = _short(name)
    model = _model()
    branched = ee.augment(
        model, 2, preset=name, joint=True, sample=torch.zeros(1, 3, 32, 32), train=_data(), config=config
    )
    assert branched.backbone is not model
    assert branched.own_base


def test_a_preset_places_its_own_exits_and_fits_texts_and_tokens() -> None:
    graph = ee.inspect(_model("test_vit"), torch.zeros(1, 3, 32, 32))
    for preset in ee.PRESETS.values():
        plan = preset.plan(graph)
        assert len(ee.attach(graph, plan, preset.branches(plan.points)).exits) == len(plan.points)
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'pteenet'"):
        ee.augment(_model(), preset="ptenet", sample=torch.zeros(1, 3, 32, 32))


# --- what is frozen stays, and nothing stays behind


class Lora(nn.Module):
    """A frozen linear layer and a low-rank update that learns."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Both added."""
        return self.base(x) + self.up(self.down(x))


def _with_lora() -> nn.Module:
    model = _model("test_vit").requires_grad_(False)
    for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        block.attn.qkv = Lora(block.attn.qkv)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def test_only_parameters_that_require_gradients_learn() -> None:
    model = _with_lora()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    branched = ee.augment(model, 2, sample=torch.zeros(1, 3, 32, 32))
    config = replace(CONFIG, epochs=3, ema=0.5, weight_decay=0.1)
    trained = ee.train(branched, _data(), config, joint=True).model
    changed = {n for n, p in trained.backbone.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == trainable
    assert {n for n, p in trained.backbone.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_norms_with_frozen_parameters_keep_their_statistics(ema: float) -> None:
    model = _model()
    frozen = ["conv1", "bn1", "layer1", "layer3"]
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    branched = ee.augment(model, 2, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), replace(CONFIG, ema=ema), joint=True).model
    for name, tensor in trained.backbone.state_dict().items():
        same = torch.equal(tensor, model.state_dict()[name])
        assert same == (name.split(".")[0] in frozen), name


def test_modules_that_their_owner_put_in_eval_mode_stay_there() -> None:
    model = _model().train()
    model.get_submodule("layer2").eval()
    branched = ee.augment(model, 2, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), CONFIG, joint=True).model
    for name, buffer in trained.backbone.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, model.get_buffer(name)) == name.startswith("layer2"), name


def test_an_original_that_is_frozen_as_a_whole_is_refused() -> None:
    branched = ee.augment(_model().requires_grad_(False), 2, sample=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ee.ConfigError, match="requires_grad=False"):
        ee.train(branched, _data(), CONFIG, joint=True)


def test_nothing_stays_on_the_new_base(tmp_path: Path) -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    trained = ee.train(branched, _data(), replace(CONFIG, ema=0.5), joint=True).model
    for module in trained.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    x = torch.randn(3, 3, 32, 32)
    expected = trained.all_exits(x)
    torch.save(trained, tmp_path / "whole.pt")
    again = [
        pickle.loads(pickle.dumps(trained)),
        deepcopy(trained),
        torch.load(tmp_path / "whole.pt", weights_only=False),
        ee.from_pretrained(trained.save_pretrained(tmp_path / "folder"), _model(), own_base=True),
        trained.copy(),
    ]
    for other in again:
        torch.testing.assert_close(other.all_exits(x), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_trainings_and_calls_leave_no_tensors_behind(joint: bool) -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    accelerator = Accelerator()

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())  # none of torch's own fakes

    counts = []
    trained = branched
    for _ in range(3):
        trained = ee.train(branched, _data(), CONFIG, joint=joint, accelerator=accelerator).model
        counts.append(alive())
    assert counts[1] == counts[2]
    for _ in range(3):
        trained.backbone(torch.randn(3, 3, 32, 32))
    assert alive() == counts[2]


def test_an_error_in_the_models_own_forward_leaves_no_hooks() -> None:
    branched = ee.augment(_model(), 2, sample=torch.zeros(1, 3, 32, 32))
    learner = JointModel(branched.copy())
    with pytest.raises(RuntimeError):
        learner({"x": torch.randn(2, 4, 32, 32)})
    assert not any(module._forward_hooks for module in learner.modules())
