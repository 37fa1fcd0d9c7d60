"""EarlyExitModel's face: types, the knob, other sizes and dtypes, errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ee_surgery as ee
from tests.zoo import BY_NAME, branched, original, small


@pytest.fixture
def vit() -> ee.EarlyExitModel:
    return ee.augment(original("hf-ViT"), 2)


def test_transformers_models_answer_with_their_own_class(vit: ee.EarlyExitModel) -> None:
    x = BY_NAME["hf-ViT"].sample(3)
    expected = type(original("hf-ViT")(pixel_values=x))
    vit.operate(thresholds=0.0)
    assert type(vit(x)) is expected
    assert torch.equal(vit(pixel_values=x).logits, vit(x).logits)
    assert torch.equal(vit(x).logits, vit.predict(x).logits)


def test_thresholds_by_hand_are_an_operating_point_that_is_kept(tmp_path: Path) -> None:
    model = branched("cifar-resnet20")
    point = model.operate(thresholds=[0.5, float("inf"), 0.7])
    assert point is not None
    assert point.thresholds == (0.5, float("inf"), 0.7)
    assert point.samples == 0
    folder = model.save_pretrained(tmp_path / "adapter")
    again = ee.from_pretrained(folder, original("cifar-resnet20"))
    assert again.policy == model.policy == point.policy
    json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    model.operate(None)


def test_unknown_inputs_are_named(vit: ee.EarlyExitModel) -> None:
    x, labels = BY_NAME["hf-ViT"].sample(1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ee.DataError, match=r"takes input tensors \['pixel_values'.*got {'input_ids': 'Tensor'}"):
        vit(input_ids=torch.zeros(1))
    with pytest.raises(ee.DataError, match="got none"):
        vit()
    assert vit(x, labels=labels).loss is not None  # nothing leaves early: whatever the original takes
    vit.operate(thresholds=2.0)
    with pytest.raises(ee.DataError, match="labels"):
        vit(x, labels=labels)
    vit.operate(None)


def test_exits_disabled_is_the_original_for_a_while() -> None:
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(4)
    model.operate(thresholds=0.0)
    with torch.no_grad():
        expected = original("cifar-resnet20")(x)
        with model.exits_disabled():
            assert torch.equal(model(x), expected)
            assert model.predict(x).exit_index.tolist() == [3] * 4
            with model.exits_disabled():
                pass
            assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)
    assert model.unload() is original("cifar-resnet20") is model.backbone
    model.operate(None)


def test_a_closed_exit_is_not_run() -> None:
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(2)
    calls: list[int] = []
    hooks = [
        branch.register_forward_hook(lambda *args, k=k: calls.append(k)) for k, branch in enumerate(model.branches)
    ]
    model.operate(thresholds=[float("inf"), 2.0, float("inf")])
    output = model.predict(x)
    for hook in hooks:
        hook.remove()
    model.operate(None)
    assert calls == [1]
    assert output.macs.tolist() == [model.trunk_macs[-1] + model.branch_macs[1]] * 2


def test_two_models_on_one_original_are_independent() -> None:
    first, second = (ee.attach(_resnet(), ee.place(_resnet(), 2), "pool", seed=seed) for seed in (0, 1))
    x = BY_NAME["cifar-resnet20"].sample(2)
    assert not torch.equal(first.all_exits(x)[0], second.all_exits(x)[0])
    first.operate(thresholds=0.0)
    assert second.policy is None
    assert torch.equal(ee.attach(_resnet(), ee.place(_resnet(), 2), "pool", seed=0).all_exits(x), first.all_exits(x))


def _resnet() -> ee.ModelGraph:
    from tests.zoo import graph

    return graph("cifar-resnet20")


def test_another_image_size_is_captured_on_first_use_and_kept() -> None:
    model = ee.attach(_resnet(), ee.place(_resnet(), 2), "pool")
    x = torch.randn(3, 3, 40, 40)
    model.operate(thresholds=2.0)
    torch.testing.assert_close(model.predict(x).logits, original("cifar-resnet20")(x), rtol=1e-3, atol=1e-4)
    program = model.engine.program(x)
    assert model.engine.program(x[:1]) is program
    assert program.trunk_macs[-1] > model.trunk_macs[-1]
    assert model.predict(x).macs.tolist() == [program.trunk_macs[-1] + sum(model.branch_macs)] * 3
    few = ee.attach(small(), ee.place(small(), ["0", "1"]), "pool")
    for size in range(9, 20):
        few.engine.program(torch.randn(2, 3, size, size))
    assert len(few.engine.programs) <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = ee.augment(copy.deepcopy(original("cifar-resnet20")), 2, sample=torch.randn(3, 3, 32, 32)).to(dtype)
    x = torch.randn(3, 3, 32, 32, dtype=dtype)
    model.operate(thresholds=2.0)
    output = model.predict(x)
    assert output.logits.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(output.logits, model.backbone(x), rtol=tolerance, atol=tolerance)


def test_channels_last_and_strided_inputs() -> None:
    model = branched("cifar-resnet20")
    model.operate(thresholds=[0.2, 0.2, 2.0])
    x = torch.randn(5, 3, 32, 64)[..., ::2]
    expected = model.predict(x.contiguous())
    for form in (x, x.contiguous(memory_format=torch.channels_last)):
        output = model.predict(form)
        assert output.exit_index.tolist() == expected.exit_index.tolist()
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-4)
    model.operate(None)


def test_an_empty_batch_gives_empty_results() -> None:
    model = branched("cifar-resnet20")
    model.operate(thresholds=0.5)
    output = model.predict(torch.randn(0, 3, 32, 32))
    model.operate(None)
    assert output.logits.shape == (0, 10)
    assert output.exit_index.shape == output.macs.shape == (0,)


def test_a_copy_runs_on_its_own_original() -> None:
    model = ee.augment(BY_NAME["cifar-resnet20"].make().eval(), 2, sample=torch.randn(3, 3, 32, 32))
    model.operate(thresholds=2.0)
    x = BY_NAME["cifar-resnet20"].sample(2)
    before = model.predict(x).logits
    twin = copy.deepcopy(model)
    assert twin.backbone is not model.backbone
    assert torch.equal(twin.predict(x).logits, before)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1)
    assert torch.equal(twin.predict(x).logits, before)
    assert not torch.equal(model.predict(x).logits, before)
    assert not model.receipt().unchanged
    assert twin.receipt().unchanged


def test_state_dict_holds_the_original_and_the_branches_once() -> None:
    model = branched("cifar-resnet20")
    kinds = {name.split(".")[0] for name in model.state_dict()}
    assert kinds == {"original", "branches"}
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)


def test_training_flag_and_gradients_stay_where_they_belong() -> None:
    model = branched("cifar-resnet20")
    model.train()
    assert model.branches.training
    assert not any(module.training for module in model.backbone.modules())
    output = model.predict(BY_NAME["cifar-resnet20"].sample(2))
    assert not output.logits.requires_grad
    assert model.branches.training
    model.eval()


def test_branch_count_must_fit() -> None:
    with pytest.raises(ee.BranchError, match="3 branches for 2 exits"):
        ee.augment(_resnet().backbone.model, 2, branch=["pool"] * 3, sample=torch.randn(3, 3, 32, 32))


def test_a_plan_of_another_model_is_refused() -> None:
    plan = ee.place(_resnet(), ["layer2"])
    other = nn.Sequential()
    other.add_module("layer2", nn.Conv2d(3, 5, 3))
    other.add_module("pool", nn.AdaptiveAvgPool2d(1))
    other.add_module("flat", nn.Flatten())
    with pytest.raises(ee.ExitPointError, match="make the plan from this model's own graph"):
        ee.attach(other, plan, sample=torch.randn(3, 3, 32, 32))


def test_printing_says_what_matters() -> None:
    assert "legal exit points" in str(_resnet())
    assert "unchanged: all" in str(branched("cifar-resnet20").receipt())
    receipt = ee.Receipt({"a": "1"}, {"a": "2"})
    assert "CHANGED: 1 of 1" in str(receipt)
    assert receipt.changed == ["a"]


def test_branches_that_learned_nothing_are_named_until_they_learn(tmp_path: Path) -> None:
    case = BY_NAME["cifar-resnet20"]
    model = case.make()
    x = case.sample(32)
    made = ee.augment(model, 2, sample=x[:2])
    assert made.untrained == made.exits
    assert repr(made).count("untrained") == 2
    with pytest.warns(ee.SurgeryWarning, match="untrained: their answers are random"):
        ee.calibrate(made, [x])
    card = (made.save_pretrained(tmp_path / "adapter") / "README.md").read_text()
    assert "Untrained" in card
    again = ee.from_pretrained(tmp_path / "adapter", model)
    assert again.untrained == again.copy().untrained == made.exits
    assert again.with_exits(made.exits[:1]).untrained == made.exits[:1]
    ee.train(again, [x], ee.TrainConfig(epochs=1, teach="original", validation=0, progress=False))
    assert again.untrained == []
    assert "untrained" not in repr(again)
    assert "Untrained" not in (again.save_pretrained(tmp_path / "adapter") / "README.md").read_text()
