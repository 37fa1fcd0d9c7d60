"""The graph layer: exit points, legality, cost, stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ee_surgery as ee
from ee_surgery.graph.backends.base import Run, bind
from ee_surgery.graph.segments import Segment, compact, cut
from tests.zoo import EVERY, Entry, graph, original


@pytest.mark.parametrize("entry", EVERY)
def test_macs_equal_half_of_torchs_flop_counter(entry: Entry) -> None:
    found = graph(entry.name)
    # plain matrix products: before torch 2.15 the counter leaves out the CPU's flash attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found.backbone(entry.sample(1))
    assert found.macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
    assert not found.uncounted


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows(x)[0].mean(1))


def test_recurrent_layers_are_counted() -> None:
    x = torch.randn(4, 7, 6)
    found = ee.inspect(_Recurrent(), x)
    # four gates, two directions: inputs of 6 and then 2 x 5 numbers, states of 5; torch's counter leaves them out
    assert found.macs == 7 * 2 * 4 * 5 * ((6 + 5) + (10 + 5)) + 10 * 3
    assert not found.uncounted
    ee.augment(_Recurrent(), ["rows"], sample=x)


@pytest.mark.parametrize("entry", EVERY)
def test_points_are_legal_ordered_and_cost_more_and_more(entry: Entry) -> None:
    found = graph(entry.name)
    assert len(found.blocks) >= 4
    indices = [point.index for point in found.points]
    assert indices == sorted(set(indices))
    costs = [point.macs for point in found.points]
    assert costs == sorted(costs)
    assert costs[-1] <= found.macs
    assert all(not point.reason for point in found.points)
    assert all(point.reason for point in found.illegal)
    names = [name for point in (*found.points, *found.illegal) for name in (point.name, *point.aliases)]
    assert len(names) == len(set(names))
    modules = dict(original(entry.name).named_modules())
    assert all(point.name.partition("@")[0] in modules for point in found.points)


def _run(segment: Segment, entry: Entry) -> Run:
    return bind("python", segment, lambda name: original(entry.name))


@pytest.mark.parametrize("entry", EVERY)
def test_every_block_can_be_cut_alone_with_samples_leaving_and_changing_places(entry: Entry) -> None:
    found = graph(entry.name)
    x = entry.sample(3)
    with torch.no_grad():
        whole = found.backbone.logits(found.backbone(x))
        for point in found.blocks[:: max(1, len(found.blocks) // 6)]:
            first, rest = cut(found.capture, found.liveness, [point.index])
            live = compact(_run(first, entry)(x), rest.axes, torch.tensor([2, 0]))
            (logits,) = _run(rest, entry)(*live)
            torch.testing.assert_close(
                logits, whole[[2, 0]], rtol=1e-3, atol=1e-4, msg=lambda m, p=point: f"{p.name}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("entry", EVERY)
def test_legal_points_inside_blocks_can_be_cut_too(entry: Entry) -> None:
    found = graph(entry.name)
    x = entry.sample(3)
    inside = [point for point in found.points if not point.block]
    refused = 0
    with torch.no_grad():
        whole = found.backbone.logits(found.backbone(x))
        for point in inside[:: max(1, len(inside) // 40)]:
            first, rest = cut(found.capture, found.liveness, [point.index])
            live = compact(_run(first, entry)(x), rest.axes, torch.tensor([2, 0]))
            (logits,) = _run(rest, entry)(*live)
            refused += not torch.allclose(logits, whole[[2, 0]], rtol=1e-3, atol=1e-4)
    assert refused == 0


def test_samples_can_leave_inside_window_attention() -> None:
    found = graph("swin_tiny_patch4_window7_224")
    assert not found.illegal
    inside = found["layers.0.blocks.0.attn.proj"]
    assert (inside.layout, inside.shape) == ("tokens", (256, 24))  # 16 windows of 4 x 4 tokens


class _Folded(nn.Module):
    """Doubles the batch in a way that no view shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = self.inner(torch.cat([x, x + 1]))
        return self.head(torch.cat(pair.chunk(2), 1))


def test_a_fold_of_unknown_order_is_explained() -> None:
    found = ee.inspect(_Folded(), torch.randn(3, 8))
    with pytest.raises(
        ee.ExitPointError, match=r"Samples cannot leave _Folded at 'inner': the batch is folded .* \(2\*B"
    ):
        found["inner"]


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(ee.ExitPointError, match=r"Did you mean .*layer2"):
        graph("cifar-resnet20")["layer2.9"]


def test_live_counts_every_tensor_that_crosses() -> None:
    assert graph("hrnet_w18_small")["stage4"].live == 4
    assert max(point.live for point in graph("crossvit_tiny_240").blocks) >= 2
    assert {point.live for point in graph("cifar-resnet20").blocks} == {1}


def test_layouts_are_recognised() -> None:
    swin = [p for p in graph("swin_tiny_patch4_window7_224").blocks if p.name.startswith("layers.")]
    assert {p.layout for p in swin} == {"nhwc"}
    assert {p.layout for p in graph("test_convnext").blocks if p.name.startswith("stages")} == {"nchw"}
    assert graph("hf-ViT")["vit.embeddings.patch_embeddings"].prefix_tokens == 0
    assert graph("hf-ViT")["vit.layers.0"].prefix_tokens == 1
    vit = [p for p in graph("test_vit").blocks if p.name.startswith("blocks")]
    assert {(p.layout, p.prefix_tokens) for p in vit} == {("tokens", 1)}


class _InPlace(nn.Module):
    """Writes to a tensor that a view of it outlives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        view = a[:, :4]
        out = self.second(a)
        a.mul_(2.0)
        return out + view  # sees the write


def test_a_cut_through_shared_storage_that_is_written_later_is_refused() -> None:
    model = _InPlace()
    found = ee.inspect(model, torch.randn(3, 8))
    point = next(p for p in found.points if p.name == "second")
    with pytest.raises(ee.ExitPointError, match="does not give its own logits"):
        ee.attach(found, ee.place(found, [point.name]), "pool")


class _Scratch(nn.Module):
    """Fills a buffer of its own in place, sized by the batch, and reads it much later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[0], 8)
        mask[:, 2:5] = 1.0
        return self.head(F.relu(self.b(F.relu(self.a(x)))) * mask)


def test_tensors_sized_by_the_batch_are_made_again_behind_the_cut() -> None:
    model = _Scratch().eval()
    found = ee.inspect(model, torch.randn(3, 8))
    assert found["a"].live == 1
    branched = ee.attach(found, ee.place(found, ["a", "b"]), "pool")
    x = torch.randn(5, 8)
    branched.operate(thresholds=[0.0, 2.0])
    assert branched.predict(x).exit_index.tolist() == [0] * 5
    branched.operate(thresholds=[2.0, 2.0])
    torch.testing.assert_close(branched.predict(x).logits, model(x))


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) - self.a(x).mean(0, keepdim=True))


def test_a_model_that_mixes_samples_is_refused() -> None:
    with pytest.raises(ee.ExitPointError, match="not independent"):
        ee.augment(_Mixing(), ["a"], sample=torch.randn(4, 8))


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(8, 8), _Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(self.stem(x))


class _Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_data_dependent_control_flow_names_the_module() -> None:
    with pytest.raises(ee.CaptureError, match="in module 'gate'"):
        ee.inspect(_Branching(), torch.randn(3, 8))


def test_training_flags_are_given_back_after_a_failed_capture() -> None:
    model = _Branching().train()
    with pytest.raises(ee.CaptureError):
        ee.inspect(model, torch.randn(3, 8))
    assert all(module.training for module in model.modules())


def test_a_model_without_input_size_asks_for_a_sample() -> None:
    with pytest.raises(ee.DataError, match="Pass one: sample="):
        ee.inspect(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))


def test_a_model_without_a_head_is_refused() -> None:
    tokens = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2))
    with pytest.raises(ee.CaptureError, match=r"not logits of shape.*num_classes="):
        ee.inspect(tokens, torch.randn(2, 3, 8, 8))
    with pytest.raises(ee.CaptureError, match="not logits of shape"):  # maps, of which the user says otherwise
        ee.inspect(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), task="classification")


def test_stages_follow_moved_and_replaced_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    branched = ee.augment(model, ["0"], branch="pool", sample=torch.randn(3, 8))
    branched.operate(thresholds=2.0)
    x = torch.randn(4, 8)
    before = branched.predict(x).logits
    model.load_state_dict(
        {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}, assign=True
    )
    after = branched.predict(x).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(x))
    branched.double()
    torch.testing.assert_close(branched.predict(x.double()).logits, model(x.double()))
