"""Errors name the cause; batches of one, autocast regions, hooks, inference mode and other types are answered right."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import timm
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.backbone.base import Backbone
from ee_surgery.branches.base import ExitLogits
from ee_surgery.policies.policy import ThresholdPolicy

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _base() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


class _Own(nn.Module):
    """A forward of one's own over the same layers."""

    def __init__(self, forward: Callable[[nn.Sequential, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.own = _base(), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.body, x)


def _augment(model: nn.Module, exit_name: str = "body.1", sample: Tensor = X) -> ee.EarlyExitModel:
    return ee.augment(model.eval(), [exit_name], sample=sample, branch="pool")


# --- errors


@pytest.mark.parametrize(
    "forward",
    [
        lambda body, x: body(F.dropout(x, 0.5, training=True)),
        lambda body, x: body(x + torch.rand_like(x)),
        lambda body, x: body(x) + torch.randn(10),
        lambda body, x: body(x) * random.random(),
    ],
)
def test_randomness_in_eval_mode_is_named_and_not_taken_for_mixing(forward: Callable[..., Tensor]) -> None:
    with pytest.raises(ee.ExitPointError, match="the model's own forward draws random numbers") as caught:
        _augment(_Own(forward))
    assert "independent" not in str(caught.value)


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class _Count(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("inner", [_Noise(), _Count()])
def test_the_module_that_answers_differently_from_call_to_call_is_named(inner: nn.Module) -> None:
    model = _base()
    model[3] = inner
    with pytest.raises(ee.ExitPointError, match="module '3' draws random numbers in eval mode, or keeps state"):
        _augment(model, "1")


def test_mixing_in_the_root_s_own_forward_is_not_blamed_on_the_module_behind_it() -> None:
    with pytest.raises(ee.ExitPointError, match=r"not independent.*the model's own forward answers differently"):
        _augment(_Own(lambda body, x: body(x - x.mean(0, keepdim=True))))


BYTES = (torch.rand(4, 3, 8, 8) * 255).byte()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (BYTES, r"uint8, not torch.float32.*x\.float\(\) / 255"),
        (X.half(), "float16, not torch.float32"),
        (torch.randn(2, 4, 3, 8, 8), r"5 dimensions, not 4.*x\.flatten\(0, 1\)"),
        (X[0], r"3 dimensions, not 4.*x\.unsqueeze\(0\)"),
        (X.permute(0, 2, 3, 1), r"8 channels, not 3.*x\.permute\(0, 3, 1, 2\)"),
        (X[:, :1], "1 channels, not 3"),
        (X.to("meta"), "on meta, not cpu"),
    ],
)
def test_inputs_that_are_refused_are_told_from_those_that_are_taken(x: Tensor, message: str) -> None:
    branched = _augment(_base(), "1")
    branched.operate(thresholds=0.5)
    with pytest.raises(ee.CaptureError, match=message) as caught:
        branched(x)
    assert "esize" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (BYTES, r"accepts \(4, 3, 8, 8\) of torch.float32.*x\.float\(\) / 255"),
        (torch.randn(2, 4, 3, 8, 8), r"accepts \(16, 3, 8, 8\).*x\.flatten\(0, 1\)"),
        (X.permute(0, 2, 3, 1), r"accepts \(4, 3, 8, 8\).*x\.permute\(0, 3, 1, 2\)"),
        (BYTES.permute(0, 2, 3, 1), r"accepts \(4, 3, 8, 8\) of torch.float32.*permute.*255"),
        (X[:, :1], "its images have 3 channels, not 1"),
        (torch.randn(4, 7), "Possible causes: .*sample="),
    ],
)
def test_what_is_wrong_with_a_sample_is_found_by_trying(x: Tensor, message: str) -> None:
    with pytest.raises(ee.DataError, match=message):
        ee.inspect(_base(), x)


@pytest.mark.parametrize(("name", "channels"), [("test_resnet", 6), ("test_resnet", 16), ("tresnet_m", 1)])
def test_samples_of_our_own_have_the_channels_that_the_model_takes(name: str, channels: int) -> None:
    backbone = Backbone(timm.create_model(name, in_chans=channels).eval())
    assert backbone.sample["x"].shape[1] == channels


def _offloaded() -> nn.Module:
    model = _base()
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def _half_on_meta() -> nn.Module:
    model = _base()
    model[2].to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [(_offloaded, "offloaded by device_map= or cpu_offload"), (_half_on_meta, r"2 of 6 .*'2\.weight'.*never loaded")],
)
def test_weights_without_data_are_found_before_anything_runs(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ee.CaptureError, match=message):
        ee.inspect(make(), X)


def test_a_model_on_the_meta_device_can_be_read_but_gets_no_branches() -> None:
    model = _base().to("meta")
    assert ee.inspect(model, X).points
    with pytest.raises(ee.CaptureError, match=r"6 of 6 .*meta"):
        _augment(model, "1")


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_named() -> None:
    model = quantize_dynamic(_base(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ee.CaptureError, match=r"\['6'.* are quantised.*before it was quantised"):
        ee.inspect(model, X)


# --- batches of one


@pytest.mark.parametrize(
    "forward",
    [
        lambda body, x: body[6](body[:5](x).squeeze()),
        lambda body, x: body[6](torch.atleast_2d(body[:5](x).squeeze())),
        lambda body, x: body[6](body[:5](x).squeeze(-1).squeeze(-1)),
        lambda body, x: body[6](torch.atleast_2d(body[:5](x).squeeze((0, 2, 3)))),
        lambda body, x: body[6](torch.atleast_2d(body[:5](x).squeeze_())),
        lambda body, x: body(x)[:, :, None].squeeze(),
    ],
)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_a_squeeze_in_the_forward_answers_one_sample_as_the_original_does(
    forward: Callable[..., Tensor], threshold: float
) -> None:
    model = _Own(forward).eval()
    branched = _augment(model)
    branched.operate(thresholds=threshold)
    with torch.no_grad():
        for batch in (1, 2, 4):
            original, routed = model(X[:batch]), branched(X[:batch])
            assert isinstance(routed, Tensor)
            assert routed.shape == original.shape
            found = branched.predict(X[:batch])
            assert found.logits.shape == (batch, 10)
            assert found.exit_index.shape == (batch,)
            if threshold > 1:
                torch.testing.assert_close(routed, original)
    branched.operate(None)
    assert branched.predict(X[:1]).logits.shape == (1, 10)


def test_a_model_that_treats_a_batch_of_one_in_its_own_way_is_refused() -> None:
    with pytest.raises(ee.ExitPointError, match=r"answers a batch of one otherwise.*own forward"):
        _augment(_Own(lambda body, x: body(x) * (2 if x.shape[0] == 1 else 1)))


# --- autocast, hooks, inference mode, float64


def _autocast(body: nn.Sequential, x: Tensor) -> Tensor:
    x = body[:2](x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = body[2:4](x)
    return body[4:](x.float())


def _hooked(body: nn.Sequential, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = body[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = body(x)
    handle.remove()
    return logits + seen[0].mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(("forward", "exit_name"), [(_autocast, "body.1"), (_autocast, "body.3"), (_hooked, "body.1")])
def test_autocast_regions_and_hooks_inside_a_forward(forward: Callable[..., Tensor], exit_name: str) -> None:
    model = _Own(forward).eval()
    branched = _augment(model, exit_name)
    ee.train(branched, [(X, torch.arange(4))], ee.TrainConfig(epochs=1, progress=False, validation=0))
    branched.operate(thresholds=2.0)
    with torch.no_grad():
        torch.testing.assert_close(branched(X), model(X))
    branched.operate(thresholds=0.0)
    assert branched.predict(X).exit_index.tolist() == [0] * 4


def test_autocast_regions_without_room_for_exits_say_so() -> None:
    with pytest.raises(ee.ExitPointError, match=r"No exit point 'body\.2'.*torch\.autocast region"):
        _augment(_Own(_autocast), "body.2")

    class Whole(_Own):
        @torch.autocast("cpu", dtype=torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.body, x)

    with pytest.raises(ee.CaptureError, match=r"has no exit points.*put torch\.autocast around the calls"):
        ee.inspect(Whole(lambda body, x: body(x)).eval(), X)


def test_inference_mode_around_any_verb_leaves_a_model_that_learns() -> None:
    config = ee.TrainConfig(epochs=1, progress=False, validation=0)
    model = _base()
    with torch.inference_mode():
        x = torch.randn(4, 3, 8, 8)
        labels = torch.zeros(4, dtype=torch.long)
        branched = _augment(model, "1", x)
        branched.operate(thresholds=0.2)
        branched(torch.randn(2, 3, 12, 12))
        copied = branched.copy()
        ee.train(branched, [(x, labels)], config)
    for learner in (branched, copied):
        for joint in (False, True):
            ee.train(learner, [(x, labels)], config, joint=joint)
            ee.calibrate(learner, [(x, labels)])
        ee.train(learner, [(torch.randn(2, 3, 12, 12), labels[:2])], config)
        assert learner.receipt().unchanged


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = _base()
    with pytest.raises(ee.CaptureError, match=r"created under torch.inference_mode\(\)"):
        ee.inspect(model, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_decisions_at_a_threshold_are_those_of_the_records_whatever_the_type(dtype: torch.dtype) -> None:
    model = _base().to(dtype)
    x = torch.randn(64, 3, 8, 8).to(dtype)
    branched = ee.augment(model, ["1"], sample=x[:4], branch=ee.BranchSpec("pool", confidence=True))
    records = ee.record(branched, [x])
    for score in ("max_prob", "learned", "entropy"):
        for threshold in records.scores(score)[0].tolist()[:16]:  # exactly at the score of a sample
            point = branched.operate(thresholds=threshold, score=score)
            assert point is not None
            replayed = records.replay(point.policy).exit_index
            assert torch.equal(branched.predict(x).exit_index, replayed)


def test_scores_are_computed_in_the_precision_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def spy(logits: Tensor, confidence: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert confidence is not None
        seen.extend((logits.dtype, confidence.dtype))
        return logits.amax(-1), ()

    monkeypatch.setitem(ee.SCORES._items, "spy", spy)
    monkeypatch.setitem(ee.SCORES._stated, "spy", {"stateful": False})
    policy = ThresholdPolicy((0.5,), "spy")
    answer = ExitLogits(torch.zeros(1, 3).double(), torch.zeros(1).half())
    policy.decide(0, answer.logits, answer.confidence, ())
    policy.decide_one(0, answer.logits, answer.confidence, ())
    assert set(seen) == {torch.float32}
