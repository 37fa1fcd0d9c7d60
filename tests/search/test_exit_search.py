"""Exits by search: as good as trying all, honest about its data, and what follows from it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ee_surgery as ee
from ee_surgery.calibration.correctness import chances
from ee_surgery.data.batches import halves
from ee_surgery.search.exit_search import _Fitting, _groups, _spread, short_training
from ee_surgery.search.exit_subset import Costs
from tests.training.test_training import blobs, small
from tests.zoo import BY_NAME

CLASSES = 10


def answers(seed: int, skills: list[float], macs: list[int], branch: int = 3, n: int = 1500) -> ee.ExitRecords:
    """Exits of some skill, the original's last, on samples of all difficulties: the harder, the less sure and right."""
    generator = torch.Generator().manual_seed(seed)
    hard, labels = torch.rand(n, generator=generator), torch.randint(CLASSES, (n,), generator=generator)
    rows = []
    for skill in skills:
        noise = torch.randn(n, CLASSES, generator=generator)
        lead = 8 * (skill - hard).clamp_min(-0.2)
        rows.append(noise + lead[:, None] * nn.functional.one_hot(labels, CLASSES))
    names = tuple(f"exit{k}" for k in range(len(skills) - 1))
    return ee.ExitRecords(names, torch.stack(rows), (*macs, 100), (branch,) * len(names), labels)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gains=st.lists(st.floats(0.0, 0.3), min_size=3, max_size=6),
    drop=st.sampled_from([0.005, 0.01, 0.03]),
)
def test_the_search_is_within_two_percent_of_the_best_of_all_placements(
    seed: int, gains: list[float], drop: float
) -> None:
    skills = [min(1.2, 0.2 + total) for total in itertools.accumulate(gains)]
    k = len(skills)
    records = answers(seed, [*skills, 1.3], [10 + 80 * i // k for i in range(k)])
    costs = Costs(records, drop)
    every = [exits for n in range(k + 1) for exits in itertools.combinations(range(k), n)]
    found = ee.cheapest_exits(records, drop)
    assert found.cost == costs(found.exits)
    assert found.cost <= 1.02 * min(map(costs, every))


def test_the_cost_is_what_thresholds_reach() -> None:
    records = answers(0, [0.5, 0.8, 1.3], [30, 60], n=4000)
    found = ee.cheapest_exits(records, 0.02)
    reached = ee.realised_drop(records.keep(found.exits), 0.02)
    assert reached.macs_fraction == pytest.approx(found.cost, abs=0.03)


def test_of_several_branches_at_one_place_one_is_taken_and_useless_ones_never() -> None:
    records = answers(1, [0.6, 0.65, 0.9, 1.3], [30, 30, 60])
    for drop in (0.01, 0.05):
        exits = ee.cheapest_exits(records, drop).exits
        assert exits
        assert {0, 1} - set(exits)
    guesses = answers(1, [-5, -5, 1.3], [30, 60])
    assert all(ee.cheapest_exits(guesses, drop) == ee.Subset((), 1.0) for drop in (0.002, 0.01, 0.1))
    dear = replace(records, branch_macs=(90, 90, 90))
    assert ee.cheapest_exits(dear, 0.01).exits == ()
    assert len(ee.cheapest_exits(records, 0.05, most=1).exits) == 1
    with pytest.raises(ee.ConfigError, match=r"in \[0, 1\]"):
        ee.cheapest_exits(records, 1.5)


def overconfident(n: int, seed: int) -> ee.ExitRecords:
    """Two exits that are wrong on the same quarter of the samples; the first one knows it, the second does not."""
    generator = torch.Generator().manual_seed(seed)
    labels, odd = torch.randint(CLASSES, (n,), generator=generator), torch.rand(n, generator=generator) < 0.25
    sure, noise = torch.rand(n, 1, generator=generator), torch.randn(3, n, CLASSES, generator=generator)
    right = nn.functional.one_hot(labels, CLASSES)
    wrong = nn.functional.one_hot((labels + 1) % CLASSES, CLASSES)
    odd = odd[:, None]
    logits = noise + torch.stack(
        [right * (2 + 6 * sure) * ~odd, torch.where(odd, wrong, right) * (4 + 2 * sure), 7 * right]
    )
    return ee.ExitRecords(("knows", "does not"), logits, (30, 50, 100), (3, 3), labels)


@pytest.mark.parametrize("drop", [0.05, 0.1])
def test_what_is_left_behind_a_good_exit_is_harder_than_the_next_one_thinks(drop: float) -> None:
    records = overconfident(3000, 1)
    found = ee.cheapest_exits(records, drop)
    assert found.exits == (0,)
    policy = ee.Frontier.search(records.keep(found.exits)).at(max_accuracy_drop=drop).policy
    new = overconfident(6000, 2).keep(found.exits).replay(policy)
    assert new.macs.double().mean().item() / 100 == pytest.approx(found.cost, abs=0.02)


def test_chances_are_honest_and_know_what_those_before_knew() -> None:
    records = answers(3, [0.5, 0.8, 1.3], [30, 60], n=4000)
    for chance, correct in zip(chances(records), records.correct.double(), strict=True):
        assert chance.mean() == pytest.approx(correct.mean().item(), abs=0.01)
    records = overconfident(4000, 3)
    second, correct = torch.tensor(chances(records)[1]), records.correct[1]
    assert second[correct].mean() > second[~correct].mean() + 0.3
    bad = replace(records, logits=records.logits.masked_fill(torch.rand(records.logits.shape) < 0.01, torch.nan))
    assert chances(bad).min() >= 0


def test_records_of_some_exits_and_their_best_case() -> None:
    records = answers(2, [0.4, 0.8, 1.3], [30, 60])
    kept = records.keep([1])
    assert kept.exits == ("exit1",)
    assert kept.trunk_macs == (60, 100)
    assert torch.equal(kept.logits, records.logits[1:])
    first, second, last = records.correct
    cost = torch.where(first, 33, torch.where(second, 66, torch.where(last, 106, 33))).double().mean() / 100
    assert records.best_case() == (pytest.approx((first | second | last).double().mean()), pytest.approx(cost))
    with pytest.raises(ee.DataError, match="no rising numbers"):
        records.keep([1, 0])
    with pytest.raises(ee.DataError, match="each other's"):
        replace(records, chained=True).keep([0])


@pytest.mark.parametrize("n", [1, 7, 64])
def test_halves_have_no_sample_in_common_and_lose_none(n: int) -> None:
    data = TensorDataset(torch.arange(100 * 3).float().view(100, 3), torch.arange(100))
    first, second = halves(DataLoader(data, n), n)
    for _ in range(2):  # however often they are read
        one, two = ([int(label) for _, labels in half for label in labels] for half in (first, second))
        assert sorted(one + two) == list(range(100))
        assert abs(len(one) - len(two)) <= 1
    inputs = [{"pixel_values": x, "other": x} for x in torch.randn(4, 5, 3)]
    read = [x for half in halves(inputs, 1) for x in half]
    assert sum(len(x["other"]) for x in read if isinstance(x, dict)) == 20


def test_halves_of_data_that_changes_are_refused() -> None:
    data = TensorDataset(torch.randn(64, 3), torch.arange(64))
    first, second = halves(DataLoader(data, 8, shuffle=True), 8)
    list(first)
    with pytest.raises(ee.DataError, match="another order"):
        list(second)
    with pytest.raises(ee.DataError, match="iterator"):
        halves(iter([torch.randn(2, 3)]), 2)


def learnt(n: int = 512) -> tuple[nn.Module, TensorDataset]:
    """A network that knows the blobs: its branches have something to save."""
    torch.manual_seed(0)
    data = blobs(n)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), data


CONFIG = ee.TrainConfig(epochs=4, batch_size=32, lr=1e-2, validation=0, progress=False)


def test_augment_finds_places_trains_prunes_and_calibrates(tmp_path: Path) -> None:
    model, data = learnt()
    held = blobs(512)
    found = ee.augment(
        model, "auto", branch=["mlp", "pool"], sample=torch.randn(2, 3, 8, 8), train=data, calibrate=held,
        config=CONFIG, max_accuracy_drop=0.02,
    )  # fmt: skip
    assert found.receipt().unchanged
    assert found.plan.rule == "search"
    point = found.operate(max_accuracy_drop=0.02)
    assert point is not None
    assert point.macs_fraction < 1
    assert point.samples == 256  # the other half chose the exits
    tried = found.provenance["placement"]
    assert {c["exit"] for c in tried["candidates"] if c["chosen"]} == {*found.exits, *tried["left_out"]}
    assert {c["branch"] for c in tried["candidates"]} == {"mlp", "pool"}
    found.save_pretrained(tmp_path)
    again = ee.from_pretrained(tmp_path, model)
    assert again.provenance["placement"] == tried
    assert torch.equal(again(held.tensors[0]), found(held.tensors[0]))


def test_exits_are_cut_for_pictures_of_the_size_that_is_trained_on() -> None:
    model = timm.create_model("resnet18", num_classes=4).eval()  # it says 224
    trained = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)
    quick = replace(CONFIG, epochs=1)
    before = torch.random.get_rng_state()
    found = ee.augment(model, ["layer2.1"], train=DataLoader(trained, 4, shuffle=True), config=quick)
    assert found.sample["x"].shape == (4, 3, 32, 32)
    assert torch.equal(torch.random.get_rng_state(), before)
    once = iter([(torch.randn(4, 3, 32, 32), torch.arange(4))])  # cannot be looked at before
    found = ee.augment(model, ["layer2.1"], train=once, config=replace(quick, max_steps=1))
    assert found.sample["x"].shape == (4, 3, 224, 224)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    assert ee.augment(plain, ["1"], train=trained, config=quick).sample["input"].shape == (4, 3, 32, 32)


def test_where_nobody_says_shortcuts_are_tried_too() -> None:
    torch.manual_seed(0)
    model = BY_NAME["cifar-resnet20"].make().eval()  # untrained, it says nearly the same to all
    pictures = list(torch.randn(64, 3, 32, 32).split(16))
    config = replace(CONFIG, teach="original", distill=0.0)
    options = {"sample": torch.randn(2, 3, 32, 32), "config": config, "points": 4, "probe_steps": 20}
    found = ee.search_exits(model, pictures, pictures, max_accuracy_drop=0.05, **options)
    tried = {(candidate.branch.name, candidate.branch.options.get("blocks")) for candidate in found.candidates}
    assert {("shortcut", ""), ("shortcut", "layer3")} <= tried
    assert "strided" in {name for name, _ in tried}


def test_searching_needs_data_and_says_when_nothing_pays() -> None:
    model, data = learnt()
    sample = torch.randn(2, 3, 8, 8)
    with pytest.raises(ee.ConfigError, match="give train= and calibrate="):
        ee.augment(model, "auto", sample=sample, train=data)
    with pytest.raises(ee.ConfigError, match="leave out placement="):
        ee.augment(model, "auto", "linear", sample=sample, train=data, calibrate=data)
    search = {"sample": sample, "config": CONFIG, "probe_steps": 1}
    with pytest.raises(ee.ExitPointError, match="saves anything"):
        ee.search_exits(model, data, data, branch="pool", max_accuracy_drop=0.0, **search)
    with pytest.raises(ee.DataError, match="train is an iterator"):
        ee.search_exits(model, iter([data[:8]]), data, **search)
    with pytest.raises(ee.ConfigError, match="'macs', 'time'"):
        ee.search_exits(model, data, data, cost="watts", **search)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ee.ConfigError, match="cannot be tried without"):
        ee.search_exits(model, data, data, branch="ztw", **search)


def test_points_to_try_are_closer_together_the_earlier_they_are() -> None:
    torch.manual_seed(0)
    graph = ee.inspect(BY_NAME["cifar-resnet20"].make().eval(), torch.randn(2, 3, 32, 32))
    every = [point.name for point in ee.place(graph, "all").points]
    for count in (1, 4, len(every), 99):
        found = _spread(graph, count)
        assert [point.name for point in found] == [name for name in every if name in {p.name for p in found}]
        assert len(found) == min(count, len(every))
    costs = [0.0, *(point.macs_fraction for point in _spread(graph, 4)), 1.0]
    gaps = [b - a for a, b in itertools.pairwise(costs)]
    assert gaps[0] < gaps[2] < gaps[-1]


def test_what_learns_side_by_side_costs_no_more_than_the_original() -> None:
    graph = ee.inspect(learnt()[0], torch.randn(2, 3, 8, 8))
    point, spec = graph["1"], ee.BranchSpec("pool")
    shares = [0.4, 0.5, 0.3, 0.9, 0.05, 0.05, 0.1]
    tried = [_Fitting(point, spec, int(share * graph.macs)) for share in shares]
    groups = _groups(graph, tried)
    assert [len(group) for group in groups] == [2, 1, 3, 1]
    assert [each for group in groups for each in group] == tried
    assert _groups(graph, []) == []


@pytest.mark.parametrize(
    ("config", "steps"), [({}, 64), ({"max_steps": 9}, 9), ({"epochs": 40}, 160), ({"epochs": 1000}, 300)]
)
def test_probes_learn_for_a_part_of_the_training(config: dict[str, int], steps: int) -> None:
    data = blobs(512)
    assert short_training(replace(CONFIG, **config), data) == steps  # 4 epochs of 16 batches
    assert short_training(replace(CONFIG, **config), [(x, None) for x in data.tensors[0].split(32)]) == steps
    assert short_training(CONFIG, iter(data)) == 300  # pyright: ignore[reportArgumentType]


def test_time_may_be_what_counts() -> None:
    model, data = learnt()
    options = {"sample": torch.randn(2, 3, 8, 8), "config": CONFIG, "probe_steps": 40, "max_accuracy_drop": 0.3}
    found = ee.search_exits(model, data, data, branch=["pool", "mlp"], cost="time", **options)
    counted = ee.search_exits(model, data, data, branch=["pool", "mlp"], **options)
    assert [c.exit for c in found.candidates] == [c.exit for c in counted.candidates]
    assert [c.accuracy for c in found.candidates] == [c.accuracy for c in counted.candidates]
    assert found.records.trunk_macs != counted.records.trunk_macs
    assert "candidate exits" in str(found)


def test_exits_are_chosen_by_the_profile_of_the_engine_that_will_serve() -> None:
    """An engine on which only the branch at 1 is cheap: MACs alone would choose others."""
    model, data = learnt()
    seen: list[list[str]] = []

    def served(branched: ee.EarlyExitModel) -> ee.Profile:
        seen.append(branched.exits)
        trunk = tuple(float(position[name]) for name in branched.exits)
        branches = tuple(0.1 if name == "1" else 50.0 for name in branched.exits)
        return ee.Profile("mine", "here", 1, 4, (4,), ((*trunk, 10.0),), (branches,))

    sample = torch.randn(2, 3, 8, 8)
    position = {point.name: 1 + k for k, point in enumerate(ee.inspect(model, sample))}
    options = {"sample": sample, "config": CONFIG, "max_accuracy_drop": 0.3}
    found = ee.search_exits(model, data, data, branch="pool", points=["1", "3"], probe_steps=40, cost=served, **options)
    assert found.plan.names == ["1"]
    assert seen == [["1", "3"]]
    branched = ee.augment(model, "auto", branch="pool", train=data, calibrate=data, cost=served, **options)
    assert branched.exits == ["1"]
    assert branched.frontier is not None
    assert branched.frontier.profile is not None
    assert branched.frontier.profile.engine == "mine"
    with pytest.raises(ee.ConfigError, match="the result of cost= must be a Profile, got 1"):
        ee.search_exits(model, data, data, branch="pool", probe_steps=1, cost=lambda _: 1, **options)  # pyright: ignore


def test_a_branch_that_costs_more_than_it_saves_is_left_out() -> None:
    model, data = learnt()
    branched = ee.augment(model, ["1", "3"], branch="pool", sample=torch.randn(2, 3, 8, 8))
    ee.train(branched, data, CONFIG)
    with torch.no_grad():
        for parameter in branched.branches[0].parameters():
            parameter.zero_()  # it knows nothing now
    records = ee.record(branched, data)
    pruned = ee.prune_exits(branched, records, 0.002)
    assert pruned.exits == ["3"]
    assert pruned.branches[0] is branched.branches[1]
    assert torch.equal(pruned.all_exits(data.tensors[0])[0], branched.all_exits(data.tensors[0])[1])
    assert ee.prune_exits(pruned, ee.record(pruned, data), 0.002) is pruned
    assert pruned.receipt().unchanged
    with pytest.raises(ee.ExitPointError, match="only at"):
        pruned.with_exits(["1"])
    with torch.no_grad():
        for parameter in pruned.branches.parameters():
            parameter.zero_()
    with pytest.raises(ee.ExitPointError, match="saves anything"):
        ee.prune_exits(pruned, ee.record(pruned, data), 0.0)


def test_training_ends_after_so_many_steps() -> None:
    seen = []

    class Counted(list[tuple[Tensor, Tensor]]):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(1)
                yield batch

    data = Counted((x, y) for x, y in DataLoader(blobs(64), 16))
    report = ee.train(small(), data, replace(CONFIG, epochs=5, max_steps=6))
    assert len(report.epochs) == 2
    assert 6 <= len(seen) <= 8
    assert report.model.provenance["training"]["samples"] == 96

    def endless():
        while True:
            yield data[0]

    class Endless:
        __iter__ = staticmethod(endless)

    report = ee.train(small(), Endless(), replace(CONFIG, epochs=1, max_steps=3))  # the schedule knows its length
    assert report.model.provenance["training"]["samples"] == 48
    with pytest.raises(ee.ConfigError, match="max_steps"):
        ee.TrainConfig(max_steps=0)
