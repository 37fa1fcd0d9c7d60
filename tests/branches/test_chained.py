"""Branches that read the answers of those before them (Zero Time Waste), alone, in a whole model, and fitted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.branches.base import append_log_probs, build, run_branch
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.branches.chained import Ensemble, ZtwBranch
from ee_surgery.calibration.records import replay_point
from ee_surgery.graph.exit_points import ExitPoint
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.policy import Fallback, certainty
from ee_surgery.training.ensemble import ensembles, fit_ensembles
from tests.zoo import BY_NAME, graph, original

POINT = ExitPoint("p", (), 0, "n", (8, 6, 6), "nchw", 0, 1, 10**7, 0.5, True, "", True)
NAME = "test_resnet"
BANKS = {
    "all": ("all", "ztw"),
    "three": (3, "ztw"),
    "pool first": (3, ["pool", "ztw", "ztw"]),
    "pool between": (3, ["ztw", "pool", "ztw"]),
    "pool last": (3, ["ztw", "ztw", "pool"]),
    "no ensemble": (3, ee.BranchSpec("ztw", options={"ensemble": False})),
}
SAMPLES = 34


@cache
def model(bank: str = "three") -> ee.EarlyExitModel:
    """A small network with chained exits, whose ensembles are not all the same; shared: leave it as it was."""
    exits, branch = BANKS[bank]
    found = graph(NAME)
    made = ee.attach(found, ee.place(found, exits), branch)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.branches.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # logits of different samples should differ
        for ensemble in ensembles(made.branches).values():
            ensemble.weight.copy_(0.5 * torch.randn(ensemble.weight.shape, generator=generator))
            ensemble.bias.copy_(0.3 * torch.randn(ensemble.bias.shape, generator=generator))
    return made


@cache
def pictures() -> Tensor:
    return BY_NAME[NAME].sample(SAMPLES, seed=5)


@cache
def recorded(bank: str = "three") -> ee.ExitRecords:
    return ee.record(model(bank), [pictures()], batch_size=SAMPLES)


def _split(scores: Tensor, quantile: float) -> float:
    """A threshold near a quantile that float noise does not reach; below or above all of them at 0 and 1."""
    ranked = scores.double().sort().values
    if quantile in (0, 1):
        return -1.0 if quantile == 0 else 2.0
    near = range(max(1, int(quantile * len(ranked)) - 5), min(len(ranked), int(quantile * len(ranked)) + 5))
    at = max(near, key=lambda i: (ranked[i] - ranked[i - 1]).item())
    return ranked[at - 1 : at + 1].mean().item()


# --- one branch


def test_the_head_before_is_read_detached_and_layer_normed() -> None:
    branch = build(ee.BranchSpec("ztw"), POINT, 5, depth=2).train()
    assert isinstance(branch, ZtwBranch)
    assert branch.classifier.in_features == 8 * 16 + 5
    features, logits = torch.randn(3, 8, 6, 6), torch.randn(3, 2, 5, requires_grad=True)
    previous = torch.log_softmax(logits, -1)
    with torch.no_grad():
        branch.norm.weight.uniform_(0.5, 2)
        branch.norm.bias.uniform_(-1, 1)
    answer = branch(features, previous=previous)
    norm = branch.norm
    read = F.layer_norm(logits[:, 1], (5,), norm.weight, norm.bias)  # logits or log p: the same but for eps
    expected = branch.classifier(torch.cat([branch.vector(features), read], 1))
    torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-5)
    answer.logits.logsumexp(-1).sum().backward()
    assert logits.grad is None or not logits.grad.any()
    assert branch.norm.weight.grad.abs().sum() > 0


def test_no_gradient_reaches_an_earlier_head_through_a_later_loss() -> None:
    bank = BranchBank([build(ee.BranchSpec("ztw"), POINT, 5, depth=k) for k in range(3)]).train()
    answers = bank([(torch.randn(4, 8, 6, 6),)] * 3)
    F.cross_entropy(answers[2].logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is None or not p.grad.any() for k in (0, 1) for p in bank[k].parameters())
    assert all(p.grad is not None and p.grad.any() for n, p in bank[2].named_parameters() if "ensemble" not in n)


@pytest.mark.parametrize("layout", ["nchw", "class token", "sequence", "vector"])
def test_a_chain_works_on_every_layout_and_counts_what_it_costs(layout: str) -> None:
    points = {
        "nchw": POINT,
        "class token": replace(POINT, shape=(17, 8), layout="tokens", prefix_tokens=1),
        "sequence": replace(POINT, shape=(11, 8), layout="sequence"),
        "vector": replace(POINT, shape=(8,), layout="vector"),
    }
    point = points[layout]
    branches = [build(ee.BranchSpec("ztw", confidence=True), point, 5, depth=k) for k in range(3)]
    bank = BranchBank(branches).eval()
    answers = bank([(torch.randn(4, *point.shape),)] * 3)
    for k, answer in enumerate(answers):
        assert answer.logits.shape == (4, 5)
        assert answer.confidence.shape == (4,)
        assert answer.log_probs.shape == (4, k + 1, 5)
    costs = [branch.macs(point.shape) for branch in branches]
    assert costs[1] - costs[0] == 5 * 5 + 5  # the answer before goes into both linear layers
    assert costs[1] == costs[2]


def test_heads_hand_on_their_own_answers_not_the_ensembles() -> None:
    bank = BranchBank([build(ee.BranchSpec("ztw"), POINT, 5, depth=k) for k in range(3)])
    features = [(torch.randn(4, 8, 6, 6),)] * 3
    own = bank.train()(features)
    combined = bank.eval()(features)
    torch.testing.assert_close(own[-1].log_probs, combined[-1].log_probs)
    torch.testing.assert_close(own[-1].log_probs, torch.stack([torch.log_softmax(a.logits, -1) for a in own], 1))
    assert not torch.allclose(own[1].logits, combined[1].logits)


def test_a_head_that_is_not_chained_hands_on_all_the_same() -> None:
    pool, features = build(ee.BranchSpec("pool"), POINT, 5), torch.randn(3, 8, 6, 6)
    first = run_branch(pool, (features,), None)
    torch.testing.assert_close(first.log_probs, torch.log_softmax(first.logits, -1)[:, None])
    second = run_branch(pool, (features,), first.log_probs)
    torch.testing.assert_close(second.log_probs, append_log_probs(second.logits, first.log_probs))
    assert second.log_probs.shape == (3, 2, 5)


@given(heads=st.integers(1, 5), classes=st.integers(2, 8), seed=st.integers(0, 1000))
def test_the_ensemble_is_its_formula(heads: int, classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    ensemble = Ensemble(heads, classes).double()
    assert ensemble.weight.abs().max() < 0.1
    assert not ensemble.bias.any()
    with torch.no_grad():
        ensemble.weight.copy_(torch.randn(heads, generator=g))
        ensemble.bias.copy_(torch.randn(classes, generator=g))
    p = torch.softmax(2 * torch.randn(3, heads, classes, generator=g, dtype=torch.float64), -1)
    w, b = ensemble.weight.exp(), ensemble.bias
    product = torch.stack([p[:, j] ** (w[j] / heads) for j in range(heads)]).prod(0) * b.exp()
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(torch.softmax(ensemble(p.log()), -1), expected)
    torch.testing.assert_close(expected, torch.softmax((w[:, None] * p.log()).mean(1) + b, -1))


def test_a_fresh_ensemble_of_one_head_hardly_changes_its_answer() -> None:
    branch, features = build(ee.BranchSpec("ztw"), POINT, 5), torch.randn(50, 8, 6, 6)
    own, combined = branch.train()(features).logits, branch.eval()(features).logits
    assert (own.argmax(-1) == combined.argmax(-1)).all()
    torch.testing.assert_close(torch.softmax(own, -1), torch.softmax(combined, -1), atol=0.05, rtol=0.1)


# --- fitting the ensembles


def _answers(n: int = 600, heads: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    """log p of heads that are right to different degrees, too sure, and shy of the last class; and the labels."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=g)
    logits = torch.randn(n, heads, classes, generator=g)
    for j in range(heads):
        logits[torch.arange(n), j, labels] += 0.5 + j
    logits[:, :, -1] -= 1.5
    return torch.log_softmax(3 * logits, -1), labels


def _bank(names: list[str], classes: int = 4) -> BranchBank:
    torch.manual_seed(0)
    return BranchBank([build(ee.BranchSpec(name), POINT, classes, depth=k) for k, name in enumerate(names)])


def _losses(bank: BranchBank, log_p: Tensor, labels: Tensor) -> dict[int, float]:
    return {k: F.cross_entropy(ensemble(log_p[:, : k + 1]), labels).item() for k, ensemble in ensembles(bank).items()}


@pytest.mark.parametrize("names", [["ztw"] * 3, ["pool", "ztw", "ztw"], ["ztw", "pool", "ztw"]], ids=str)
def test_fitting_lowers_the_cross_entropy_of_every_head(names: list[str]) -> None:
    bank, (log_p, labels) = _bank(names), _answers()
    before = _losses(bank, log_p, labels)
    assert before.keys() == {k for k, name in enumerate(names) if name == "ztw"}
    others = {n: p.clone() for n, p in bank.named_parameters() if "ensemble" not in n}
    fit_ensembles(bank, log_p, labels, 100)
    after = _losses(bank, log_p, labels)
    assert all(after[k] < before[k] - 0.01 for k in before)
    assert all(torch.equal(p, others[n]) for n, p in bank.named_parameters() if n in others)
    equal = {k: F.cross_entropy(log_p[:, : k + 1].mean(1), labels).item() for k in before}
    assert all(after[k] < equal[k] for k in before)  # better than the plain geometric mean


def test_fitting_equals_a_plain_fit_of_each_head() -> None:
    bank, (log_p, labels) = _bank(["ztw"] * 3), _answers()
    plain = {k: Ensemble(k + 1, 4) for k in range(3)}
    for k, ensemble in ensembles(bank).items():
        plain[k].load_state_dict(ensemble.state_dict())
    epochs, generator = 30, torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(log_p), generator=generator) for _ in range(epochs)]
    for k, ensemble in plain.items():
        optimizer = torch.optim.Adam(ensemble.parameters(), lr=5e-4)
        for order in orders:
            for rows in order.split(512):
                optimizer.zero_grad()
                F.cross_entropy(ensemble(log_p[rows, : k + 1]), labels[rows]).backward()
                optimizer.step()
    fit_ensembles(bank, log_p, labels, epochs)
    for k, ensemble in ensembles(bank).items():  # the mean over the heads only scales gradients, which Adam takes out
        torch.testing.assert_close(ensemble.weight, plain[k].weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(ensemble.bias, plain[k].bias, atol=1e-4, rtol=1e-3)


def test_fitting_takes_class_probabilities_too() -> None:
    (log_p, labels), hard, soft = _answers(), _bank(["ztw"] * 2), _bank(["ztw"] * 2)
    fit_ensembles(hard, log_p[:, :2], labels, 3)
    fit_ensembles(soft, log_p[:, :2], F.one_hot(labels, 4).float(), 3)
    for k in range(2):
        torch.testing.assert_close(ensembles(soft)[k].weight, ensembles(hard)[k].weight)
        torch.testing.assert_close(ensembles(soft)[k].bias, ensembles(hard)[k].bias)


def test_training_fits_the_ensembles_last_and_only_where_asked() -> None:
    found = graph("cifar-resnet20")
    made = ee.attach(found, ee.place(found, 3), "ztw")
    x = torch.randn(24, 3, 32, 32)
    data = [(x, torch.arange(24) % 10)]
    start = {k: e.weight.clone() for k, e in ensembles(made.branches).items()}
    config = ee.TrainConfig(epochs=1, ensemble_epochs=0, validation=0, progress=False)
    ee.train(made, data, config)
    assert all(torch.equal(e.weight, start[k]) for k, e in ensembles(made.branches).items())
    ee.train(made, data, replace(config, ensemble_epochs=5))
    assert all(not torch.equal(e.weight, start[k]) for k, e in ensembles(made.branches).items())
    assert made.receipt().unchanged


# --- in a whole model


@pytest.mark.parametrize("bank", BANKS)
def test_every_answer_is_the_chain_worked_out_by_hand(bank: str) -> None:
    made, x = model(bank), pictures()[:5]
    features, logits = made.engine.features(x)
    own: list[Tensor] = []
    seen = made.all_exits(x)
    made.branches.eval()
    for k, (branch, (maps,)) in enumerate(zip(made.branches, features, strict=True)):
        vector = branch.vector(maps)
        if isinstance(branch, ZtwBranch) and k:
            read = F.layer_norm(own[-1], (10,), branch.norm.weight, branch.norm.bias)
            vector = torch.cat([vector, read], 1)
        own.append(torch.log_softmax(branch.classifier(vector), -1))
        expected = branch.classifier(vector)
        if isinstance(branch, ZtwBranch) and branch.ensemble is not None:
            mean = torch.stack([w.exp() * p for w, p in zip(branch.ensemble.weight, own, strict=True)]).mean(0)
            expected = mean + branch.ensemble.bias  # pyright: ignore[reportOperatorIssue]
        torch.testing.assert_close(seen[k], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen[-1], logits)


def _check(bank: str, quantile: float, batch: int, fallback: Fallback = "last", closed: frozenset[int] = frozenset()):
    """Run the pictures in batches and compare with the replay of their records."""
    made, records = model(bank), recorded(bank)
    scores = records.scores("max_prob")
    taus = tuple(float("inf") if k in closed else _split(row, quantile) for k, row in enumerate(scores))
    policy = ee.ThresholdPolicy(taus, "max_prob", fallback)
    replay = records.replay(policy)
    made.operate(replay_point(records, policy, "test"))
    try:
        outputs = [made.predict(x) for x in pictures().split(batch)]
    finally:
        made.operate(None)
    exit_index = torch.cat([output.exit_index for output in outputs])
    assert exit_index.tolist() == replay.exit_index.tolist()
    expected = records.logits[replay.answer_index, torch.arange(SAMPLES)]
    torch.testing.assert_close(torch.cat([output.logits for output in outputs]), expected, rtol=1e-3, atol=1e-4)
    assert torch.cat([output.macs for output in outputs]).double().tolist() == replay.macs.tolist()
    return exit_index, replay


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
@pytest.mark.parametrize("bank", BANKS)
def test_routed_equals_replayed(bank: str, batch: int) -> None:
    assert recorded(bank).chained
    for quantile in (0.3, 0.8) if batch <= 2 else (0.0, 0.3, 0.6, 0.9, 1.0):
        exit_index, _ = _check(bank, quantile, batch)
        if 0 < quantile < 1:
            assert len(exit_index.unique()) > 1  # the batch really is split, and what is handed on with it


@settings(max_examples=12)
@given(
    quantiles=st.lists(st.sampled_from([0.2, 0.5, 0.8, None]), min_size=3, max_size=3),
    batch=st.integers(1, 12),
    order=st.permutations(range(12)),
)
def test_permuting_and_splitting_a_batch_permutes_and_splits_the_results(
    quantiles: list[float | None], batch: int, order: list[int]
) -> None:
    made, scores = model(), recorded().scores("max_prob")
    taus = [float("inf") if q is None else _split(row, q) for q, row in zip(quantiles, scores, strict=True)]
    x = pictures()[:12]
    made.operate(thresholds=taus)
    try:
        whole = made.predict(x)
        parts = [made.predict(part) for part in x[order].split(batch)]
    finally:
        made.operate(None)
    assert torch.cat([part.exit_index for part in parts]).tolist() == whole.exit_index[order].tolist()
    torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("bank", ["all", "pool between"])
def test_closed_exits_of_a_chain_still_run_and_are_charged_up_to_the_last_open_one(bank: str, batch: int) -> None:
    made = model(bank)
    exits, n = len(made.exits), SAMPLES
    for opened in range(exits):
        _, replay = _check(bank, 0.5, batch, closed=frozenset(range(exits)) - {opened})
        assert set(replay.exit_index.tolist()) == {opened, exits}
        visits = [k <= opened for k in range(exits)]
        costs = exit_costs(made.trunk_macs, made.branch_macs, visits)
        assert costs[opened] == made.trunk_macs[opened] + sum(made.branch_macs[: opened + 1])
        assert costs[-1] == made.trunk_macs[-1] + sum(made.branch_macs[: opened + 1])
        assert replay.macs.tolist() == [costs[k] for k in replay.exit_index.tolist()]
        assert len(replay.macs) == n
    assert ee.ThresholdPolicy((0.5, float("inf"), 0.5, float("inf"))).visits(chained=True) == (True, True, True, False)
    assert ee.ThresholdPolicy((float("inf"),) * 3).visits(chained=True) == (False,) * 3


class _Counted(nn.Module):
    """Counts how many samples go through a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        self.rows += len(inputs[0])


def test_branches_run_for_exactly_the_samples_that_are_charged() -> None:
    made, records = model(), recorded()
    taus = (float("inf"), _split(records.scores("max_prob")[1], 0.5), float("inf"))
    counters = [_Counted() for _ in made.branches]
    handles = [b.register_forward_hook(c) for b, c in zip(made.branches, counters, strict=True)]
    made.operate(thresholds=taus)
    try:
        made.predict(pictures())
    finally:
        made.operate(None)
        for handle in handles:
            handle.remove()
    assert [counter.rows for counter in counters] == [SAMPLES, SAMPLES, 0]


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
@pytest.mark.parametrize("bank", ["three", "pool between", "all"])
def test_the_most_confident_answer_stands_in_for_the_last(bank: str, batch: int) -> None:
    changed = 0
    for quantile in (0.3, 0.7, 0.95):
        exit_index, replay = _check(bank, quantile, batch, "most_confident")
        last = len(model(bank).exits)
        assert (replay.answer_index[exit_index < last] == exit_index[exit_index < last]).all()
        changed += int((replay.answer_index != replay.exit_index).sum())
    assert changed > 0


@pytest.mark.parametrize("chained", [True, False])
def test_the_most_confident_is_sought_among_the_exits_that_were_asked(chained: bool) -> None:
    records = replace(recorded(), chained=chained)
    assert records.logits is not None
    sure = torch.stack([certainty(row) for row in records.logits])
    policy = ee.ThresholdPolicy((float("inf"), 2.0, float("inf")), "max_prob", "most_confident")
    replay = records.replay(policy)
    asked = [0, 1, 3] if chained else [1, 3]
    assert replay.exit_index.tolist() == [3] * SAMPLES
    assert replay.answer_index.tolist() == [asked[i] for i in sure[asked].argmax(0)]


@pytest.mark.parametrize("bank", ["all", "pool first"])
def test_save_and_load_give_the_same_logits_and_exits(bank: str, tmp_path: Path) -> None:
    made, x = model(bank), pictures()
    taus = [_split(row, 0.5) for row in recorded(bank).scores("max_prob")]
    made.operate(thresholds=taus)
    try:
        again = ee.from_pretrained(made.save_pretrained(tmp_path), original(NAME))
        expected = made.predict(x)
    finally:
        made.operate(None)
    seen = again.predict(x)
    assert seen.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(seen.logits, expected.logits)
    assert torch.equal(again.all_exits(x), made.all_exits(x))
    assert again.branch_macs == made.branch_macs
    assert again.specs == made.specs


def test_records_of_a_chain_survive_the_disk_and_the_taking(tmp_path: Path) -> None:
    records = recorded()
    assert ee.ExitRecords.load(records.save(tmp_path / "r.safetensors")).chained
    assert records.take(torch.arange(3)).chained


def test_augment_makes_a_chain_that_answers_like_the_original_until_told() -> None:
    made = ee.augment(original(NAME), "all", branch="ztw", sample=BY_NAME[NAME].sample(2))
    assert [branch.before for branch in made.branches] == list(range(len(made.exits)))
    assert made.exits == ee.place(graph(NAME), "all").names
    x = pictures()[:3]
    with torch.no_grad():
        assert torch.equal(made(x), original(NAME)(x))
    frontier = ee.calibrate(made, [(pictures(), recorded().logits[-1].argmax(-1))])
    again = replay_point(ee.record(made, [(pictures(), recorded().logits[-1].argmax(-1))]), frontier[0].policy, "again")
    assert again.macs_fraction == frontier[0].macs_fraction  # the search knows what closed exits of a chain cost
