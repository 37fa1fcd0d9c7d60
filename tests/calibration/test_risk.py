"""Risk control: the bounds against their definitions, the promise against a population that stands for the truth."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import ee_surgery as ee
from ee_surgery.calibration import bounds
from ee_surgery.calibration import risk as rc
from ee_surgery.calibration.records import replay_point
from ee_surgery.policies.certificate import Certificate
from ee_surgery.task import CLASSIFICATION
from tests.strategies import synthetic

EVERY = [(name, method) for name in rc.RISKS for method in rc.RISKS[name].scale.methods() if method != "crc"]
CERTIFYING = [(name, method) for name, method in EVERY if rc._suits(rc.RISKS[name], CLASSIFICATION)]
"""Of one right class; those of maps: tests/test_segmentation.py."""


def broken_often(broken: np.ndarray, delta: float) -> bool:
    """More often than `delta` and two standard errors of the draws."""
    return bool(broken.mean() > delta + 2 * math.sqrt(delta * (1 - delta) / len(broken)))


# --- Bounds


@given(n=st.integers(1, 500), share=st.floats(0, 1), eps=st.floats(0.001, 0.5))
def test_the_binomial_test_and_bound_are_exact(n: int, share: float, eps: float) -> None:
    errors = int(share * n)
    p = stats.binom.cdf(errors, n, eps)
    for delta in (p * 0.999, min(p * 1.001, 1.0)):
        assert bounds.cleared_by_counts("ltt-binomial", errors, 0, n, eps, delta) == (p <= delta)
    bound = float(bounds.clopper_pearson(errors, n, 0.05))
    exact = stats.binomtest(errors, n, alternative="less").proportion_ci(0.95).high
    assert bound == pytest.approx(exact, abs=1e-9)


@given(n=st.integers(2, 500), mean=st.floats(0, 1), eps=st.floats(0.001, 0.9))
def test_hoeffding_bentkus_is_its_formula(n: int, mean: float, eps: float) -> None:
    a = min(mean, eps)
    kl = sum(p * math.log(p / q) for p, q in ((a, eps), (1 - a, 1 - eps)) if p > 0)
    bentkus = math.e * stats.binom.cdf(math.ceil(n * mean - 1e-9), n, eps)
    want = min(1.0, math.exp(-n * kl), bentkus)
    assert float(bounds.hoeffding_bentkus_p_value(mean, n, eps)) == pytest.approx(want, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("n", "eps", "delta"), [(300, 0.02, 0.1), (1000, 0.005, 0.05), (2500, 0.01, 0.05)])
def test_the_paired_test_keeps_its_level_whatever_the_share_that_moves(n: int, eps: float, delta: float) -> None:
    for share in (*np.geomspace(eps, 0.9, 100), *np.linspace(0.9, 1, 50)):  # not the grid it was made with
        moved = np.arange(n + 1)
        moved = moved[stats.binom.pmf(moved, n, share) > 1e-12]
        cut = bounds._paired_cut(moved, n, eps, bounds._paired_critical(n, eps, delta))
        most = np.floor((cut + moved) / 2 + 1e-9)
        given_moved = stats.binom.cdf(most, moved, (share + eps) / (2 * share))
        level = (stats.binom.pmf(moved, n, share) * given_moved).sum()
        assert level <= delta
    assert level > delta / 2


def test_wsr_bets_as_written_step_by_step() -> None:
    x, eps, delta = np.random.default_rng(0).random(40) * 0.3, 0.4, 0.1
    stake = most = 1.0
    for i in range(40):
        past = x[:i]
        means = [(0.5 + past[: j + 1].sum()) / (j + 2) for j in range(i)]
        spread = (0.25 + sum((v - m) ** 2 for v, m in zip(past, means, strict=True))) / (i + 1)
        bet = min(math.sqrt(2 * math.log(1 / delta) / (40 * spread)), 0.75 / (1 - eps))
        stake *= 1 + bet * (eps - x[i])
        most = max(most, stake)
    assert bounds.wsr_p_value(x[None], eps, delta)[0] == pytest.approx(1 / most)


def test_bounds_lie_above_the_mean_and_know_the_variance() -> None:
    g, unit = np.random.default_rng(0), bounds.Scale(0, 1, False)
    for spread in (0.05, 0.3):
        x = 0.4 + spread * (g.random((1, 1000)) - 0.5)
        upper = {method: bounds.upper_bound(method, x, unit, 0.05) for method in ("wsr", "ltt-hb")}
        hoeffding = x.mean() + math.sqrt(math.log(1 / 0.05) / 2000)
        assert x.mean() < upper["wsr"] < upper["ltt-hb"] <= hoeffding + 1e-5


@pytest.mark.parametrize(("risk", "method"), EVERY)
@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_a_risk_just_at_eps_is_cleared_no_more_often_than_delta(risk: str, method: str, delta: float) -> None:
    g, kind, draws, n = np.random.default_rng(1), rc.RISKS[risk], 500 if method == "wsr" else 2000, 1000
    for eps in (0.005, 0.01, 0.02):
        u = g.random((draws, n))
        if risk == "disagreement":
            losses = (u < eps).astype(np.float64)
        elif risk == "accuracy_gap":
            losses = (u < 0.015 + eps).astype(np.float64) - (u > 1 - 0.015)
        elif kind.scale.low == 0:
            losses = np.where(u < 0.2, 2 * g.random((draws, n)) * eps / 0.2, 0.0)
        else:
            losses = np.where(u < 0.2, 2 * (g.random((draws, n)) - 0.5) + eps / 0.2, 0.0)
        ok = bounds.cleared(method, losses, kind.scale, eps, delta)
        assert not broken_often(ok, delta)
        if (risk, method) == ("disagreement", "ltt-binomial"):  # and it is not idle: the exact test's own size
            most = stats.binom.ppf(delta, n, eps)
            most -= stats.binom.cdf(most, n, eps) > delta
            assert ok.mean() == pytest.approx(stats.binom.cdf(most, n, eps), abs=0.02)


# --- The path


@pytest.mark.parametrize("score", ["max_prob", "margin", "patience"])
@pytest.mark.parametrize("per_exit", [False, True])
def test_the_whole_path_does_what_replays_do(score: str, per_exit: bool) -> None:
    records = synthetic(300, 5)
    kind = rc.RISKS["accuracy_gap"]
    taus = (
        rc._searched_path(synthetic(200, 5, seed=1), kind, score, 0.05) if per_exit else rc._shared_path(records, score)
    )
    path = rc._Path(records, taus, score)
    assert not np.isfinite(path.thresholds[0]).any()
    for row in range(0, len(path), 7):
        point = replay_point(records, path.policy(row), "")
        assert path.fractions[row] == pytest.approx(point.macs_fraction)
        assert (records.replay(path.policy(row)).exit_index.numpy() == path.exit_index[row]).all()
    gap = np.concatenate([[0.0], *(rows.mean(1) for rows in path.losses(kind.loss(records)))])
    points = [replay_point(records, path.policy(row), "").accuracy_drop for row in range(len(path))]
    assert gap == pytest.approx(points)


def test_the_searched_path_starts_safe_and_ends_with_the_search() -> None:
    part = synthetic(400, 4)
    taus = rc._searched_path(part, rc.RISKS["disagreement"], "max_prob", 0.02)
    path = rc._Path(part, taus, "max_prob")
    risks = np.concatenate([rows.mean(1) for rows in path.losses(rc.RISKS["disagreement"].loss(part))])
    assert risks[0] == 0  # not a leap to the cheapest that did no harm here
    assert path.fractions[-1] == path.fractions.min()


# --- The promise

EPS, DELTA = (0.005, 0.01, 0.02), (0.05, 0.1)


@cache
def population() -> ee.ExitRecords:
    """200,000 samples that stand for the truth; the original is right more often than the exits, by far."""
    records = synthetic(200_000, 4, seed=3)
    return replace(records, logits=records.logits * torch.tensor([1.5, 1.5, 1.5, 2.0])[:, None, None])


@cache
def losses_of_population(risk: str, per_exit: int) -> np.ndarray:
    """Of every policy on a path (the shared one, or one searched on other samples), shape (N, P), int8."""
    kind = rc.RISKS[risk]
    taus = rc._shared_path(population(), "max_prob")[::3]
    if per_exit:
        taus = rc._searched_path(synthetic(400, 4, seed=per_exit), kind, "max_prob", 0.01)[::3]
    path = rc._Path(population(), taus, "max_prob")
    of_exits = kind.loss(population()).astype(np.int8)
    blocks = list(path.losses(of_exits))  # pyright: ignore[reportArgumentType]
    return np.ascontiguousarray(np.concatenate(blocks).T)


@pytest.mark.parametrize("per_exit", [0, 1, 2])
@pytest.mark.parametrize(("risk", "method"), [("disagreement", "ltt-binomial"), ("accuracy_gap", "ltt-paired")])
def test_no_policy_cleared_breaks_the_promise(risk: str, method: str, per_exit: int) -> None:
    g, draws, n = np.random.default_rng(per_exit), 2000, 1000
    losses = losses_of_population(risk, per_exit)
    truth = losses.mean(0, dtype=np.float64)
    worse, better = np.zeros((2, draws, losses.shape[1]), dtype=np.int64)
    for draw in range(draws):
        seen = losses[g.integers(len(losses), size=n)]
        worse[draw], better[draw] = (seen > 0).sum(0), (seen < 0).sum(0)
    for eps in EPS:
        for delta in DELTA:
            ok = bounds.cleared_by_counts(method, worse, better, n, eps, delta)
            cleared = np.logical_and.accumulate(ok, 1)
            assert not broken_often((cleared & (truth > eps)).any(1), delta)  # any, so the cheapest too
        assert cleared[:, 0].mean() > 0.9  # it does certify something


@pytest.mark.parametrize(
    ("per_exit", "draws"),
    [
        (False, 100),
        (True, 10),
        pytest.param(False, 2000, marks=pytest.mark.slow),
        pytest.param(True, 400, marks=pytest.mark.slow),
    ],
)
def test_the_promise_holds_through_the_front_door(per_exit: bool, draws: int) -> None:
    eps, delta, g = 0.02, 0.1, torch.Generator().manual_seed(0)
    broken, saved = [], []
    truth = population().take(torch.arange(20_000))
    for seed in range(draws):
        rows = torch.randint(len(population()), (1000,), generator=g)
        point = rc.risk_control(population().take(rows), eps, delta, per_exit=per_exit, seed=seed)
        certificate = point.certificate
        answers = truth.logits.argmax(-1)
        taken = answers.gather(0, truth.replay(point.policy).exit_index[None])[0]
        broken.append((taken != answers[-1]).double().mean().item() > eps)
        saved.append(1 - point.macs_fraction)
        assert certificate.certified
        assert certificate.n == point.samples == (700 if per_exit else 1000)
    assert not broken_often(np.array(broken), delta)
    assert np.mean(saved) > 0.02


def test_conformal_control_keeps_the_mean_risk() -> None:
    eps, n, g = 0.02, 200, np.random.default_rng(0)
    losses = losses_of_population("disagreement", 0)
    peak = np.maximum.accumulate(losses, 1)
    risks = []
    for _ in range(1000):
        cleared = bounds.conformal_bound(peak[g.integers(len(peak), size=n)].sum(0), n, 1) <= eps
        last = len(cleared) - 1 if cleared.all() else int(cleared.argmin()) - 1
        risks.append(losses[:, last].mean() if last >= 0 else 0.0)
    assert np.mean(risks) < eps + 2 * np.std(risks) / math.sqrt(len(risks))
    assert np.mean(np.array(risks) > eps) > 0.2  # but a single draw is not promised anything


def test_crc_equals_its_definition() -> None:
    records = synthetic(500, 4)
    path = rc._Path(records, rc._shared_path(records, "max_prob"), "max_prob")
    losses = np.concatenate(list(path.losses(rc.RISKS["accuracy_gap"].loss(records))))
    for eps in (0.01, 0.05):
        harm = [np.maximum(losses[: row + 1].max(0), 0).sum() for row in range(len(losses))]
        cleared = sum((h + 1) / 501 <= eps for h in harm)  # harm only grows
        best = min(range(cleared + 1), key=lambda row: path.fractions[row])
        point = rc.risk_control(records, eps, risk="accuracy_gap", method="crc")
        certificate = point.certificate
        assert point.thresholds == tuple(path.thresholds[best])
        assert "in expectation" in certificate.promise


# --- Too few samples


def sure(n: int) -> ee.ExitRecords:
    """All exits are certain and right."""
    records = synthetic(n, 3)
    assert records.labels is not None
    logits = 30.0 * torch.nn.functional.one_hot(records.labels, 5).float().expand(3, n, 5)
    return replace(records, logits=logits.contiguous())


@pytest.mark.parametrize(
    ("risk", "method"), [*CERTIFYING[:-1], ("disagreement", "crc"), ("accuracy_gap", "crc"), ("brier_gap", "crc")]
)
def test_the_warning_names_how_many_samples_are_needed(risk: str, method: str) -> None:
    eps = 0.1 if method == "ltt-hb" else 0.02
    needed = bounds.samples_needed(eps, 0.05, method, rc.RISKS[risk].scale)
    with pytest.warns(UserWarning, match=f"too few: at least {needed} are needed"):
        point = rc.risk_control(sure(needed - 1), eps, risk=risk, method=method)
    certificate = point.certificate
    assert point.policy.closed
    assert point.macs_fraction == 1
    assert (certificate.certified, certificate.bound) == (False, None)
    assert "nothing" in str(certificate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = rc.risk_control(sure(needed), eps, risk=risk, method=method)
        certificate = point.certificate
    assert certificate.certified
    assert point.exit_shares[0] == 1


def test_what_is_needed_for_the_exact_test_is_known() -> None:
    for eps, delta in ((0.005, 0.05), (0.01, 0.1), (0.2, 0.01)):
        needed = bounds.samples_needed(eps, delta)
        assert (1 - eps) ** needed <= delta < (1 - eps) ** (needed - 1)


def test_a_harmful_path_is_not_blamed_on_the_samples() -> None:
    records = sure(1000)
    logits = records.logits.clone()
    logits[0] = logits[0].roll(1, -1)  # certain and wrong
    with pytest.warns(UserWarning, match="even the safest policy may lose more"):
        point = rc.risk_control(replace(records, logits=logits), 0.01)
    certificate = point.certificate
    assert point.policy.closed
    assert not certificate.certified


# --- Certificates


@pytest.mark.parametrize(
    ("risk", "method"), [*CERTIFYING[:-1], ("disagreement", "crc"), ("accuracy_gap", "crc"), ("brier_gap", "crc")]
)
@pytest.mark.parametrize("per_exit", [False, True])
def test_a_certificate_is_checked_on_its_own_and_on_other_data(risk: str, method: str, per_exit: bool) -> None:
    records = synthetic(3000, 4)
    eps = 0.2 if method == "ltt-hb" else 0.1
    point = rc.risk_control(records, eps, risk=risk, method=method, per_exit=per_exit, seed=5)
    certificate = point.certificate
    assert certificate == Certificate.from_dict(json.loads(json.dumps(certificate.to_dict())))
    assert certificate.thresholds == point.thresholds
    assert certificate.bound is not None
    assert certificate.observed < certificate.bound <= eps
    own = rc.check_certificate(certificate, records)
    assert own.same_data
    assert own.holds
    assert not own.contradicted
    assert (own.n, own.observed) == (certificate.n, pytest.approx(certificate.observed))
    assert "certify it" in str(own)
    fresh = rc.check_certificate(certificate, synthetic(3000, 4, seed=9))
    assert not fresh.same_data
    assert not fresh.contradicted
    bad = synthetic(3000, 4, seed=9)
    logits = bad.logits.clone()
    logits[:-1] = 3 * logits[:-1].roll(1, -1)  # sure and wrong
    worst = rc.check_certificate(certificate, replace(bad, logits=logits))
    assert worst.contradicted
    assert not worst.holds
    assert worst.bound > worst.observed > eps
    assert "contradict" in str(worst)


def test_closed_exits_hold_on_any_data() -> None:
    with pytest.warns(UserWarning, match="too few"):
        certificate = rc.risk_control(synthetic(50), 0.01).certificate
    again = Certificate.from_dict(json.loads(json.dumps(certificate.to_dict())))
    assert again == certificate
    assert again.thresholds == (math.inf,) * 3
    check = rc.check_certificate(again, synthetic(500, seed=4))
    assert (check.observed, check.holds, check.contradicted) == (0, False, False)


def test_a_check_on_other_exits_is_an_error() -> None:
    certificate = rc.risk_control(synthetic(2000, 4), 0.1).certificate
    with pytest.raises(ee.DataError, match="about 3 exits, these records have 2"):
        rc.check_certificate(certificate, synthetic(100, 3))
    with pytest.raises(ee.DataError, match="damaged certificate"):
        Certificate.from_dict({"risk": "disagreement"})


def test_labels_are_needed_only_where_they_are() -> None:
    records = synthetic(2000)
    bare = replace(records, labels=None)
    assert rc.risk_control(bare, 0.05).thresholds == rc.risk_control(records, 0.05).thresholds
    for risk in ("accuracy_gap", "brier_gap"):
        with pytest.raises(ee.DataError, match=f"{risk}' needs labels.*Without labels: 'disagreement'"):
            rc.risk_control(bare, 0.05, risk=risk)
        with pytest.raises(ee.DataError, match="needs labels"):
            rc.risk_table(bare, risk)
        with pytest.raises(ee.DataError, match="needs labels"):
            rc.check_certificate(rc.risk_control(records, 0.1, risk=risk).certificate, bare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "must be a number in .*got 0.0"),
        ({"eps": 1.0}, "must be a number in .*got 1.0"),
        ({"eps": math.nan}, "must be a number in .*got nan"),
        ({"delta": 1.5}, "must be a number in .* 1.5"),
        ({"method": "ltt-binomal"}, "Valid: 'ltt-binomial'"),
        ({"method": "ltt-binomial", "risk": "accuracy_gap"}, "does not fit the losses.*Valid: 'ltt-paired', 'wsr'"),
        ({"risk": "disagrement"}, "Did you mean 'disagreement'"),
        ({"score": "max_porb"}, "Did you mean 'max_prob'"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises((ee.ConfigError, ee.UnknownNameError), match=message):
        rc.risk_control(synthetic(100), **{"eps": 0.1, **settings})


def test_a_handful_of_records_cannot_be_split() -> None:
    with pytest.raises(ee.DataError, match="got only 3 records"):
        rc.risk_control(synthetic(3), 0.1, per_exit=True)


# --- Properties


@given(
    seed=st.integers(0, 100),
    eps=st.floats(0.005, 0.3),
    more=st.floats(1, 4),
    delta=st.floats(0.01, 0.3),
    later=st.floats(1, 3),
    method=st.sampled_from(["ltt-binomial", "ltt-hb", "crc"]),
)
@pytest.mark.filterwarnings("ignore:No early exit is certified")
def test_asking_less_never_costs_more(
    seed: int, eps: float, more: float, delta: float, later: float, method: str
) -> None:
    records = synthetic(300, 4, seed=seed)
    strict = rc.risk_control(records, eps, delta, method=method)
    for e, d in ((eps * more, delta), (eps, delta * later)):
        if e < 1 and d < 1:
            assert rc.risk_control(records, e, d, method=method).macs_fraction <= strict.macs_fraction


@given(
    seed=st.integers(0, 100),
    eps=st.floats(0.005, 0.3),
    more=st.floats(1, 3),
    risk=st.sampled_from(sorted({name for name, _ in CERTIFYING})),
)
@pytest.mark.filterwarnings("ignore:No early exit is certified")
def test_accepting_more_risk_never_costs_more_where_bets_are_made(
    seed: int, eps: float, more: float, risk: str
) -> None:
    records = synthetic(300, 4, seed=seed)
    strict, loose = (rc.risk_control(records, e, risk=risk, method="wsr") for e in (eps, eps * more))
    assert loose.macs_fraction <= strict.macs_fraction


# --- The table


@pytest.mark.parametrize(("risk", "method"), [("disagreement", "ltt-binomial"), ("accuracy_gap", "ltt-trinomial")])
@pytest.mark.filterwarnings("ignore:No early exit is certified")
def test_the_table_knows_what_the_records_know(risk: str, method: str) -> None:
    records = synthetic(2000, 5)
    table = rc.risk_table(records, risk)
    assert rc.RiskTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    for eps in (0.001, 0.01, 0.03, 0.1, 0.4):
        for delta in (0.01, 0.1):
            point = table.at(eps, delta)
            certificate = point.certificate
            same = rc.risk_control(records, eps, delta, risk=risk, method=method)
            for mine, theirs in ((point, same), (certificate, same.certificate)):
                for name in mine.__dataclass_fields__.keys() - {"certificate"}:
                    a, b = getattr(mine, name), getattr(theirs, name)
                    assert a == (pytest.approx(b, abs=1e-9, nan_ok=True) if isinstance(b, float) else b), name
            if certificate.certified:
                assert rc.check_certificate(certificate, records).holds
    costs = [point.macs_fraction for point in table.points[1:]]
    assert costs == sorted(costs, reverse=True)


def test_only_whole_losses_make_a_table() -> None:
    with pytest.raises(ee.ConfigError, match="'brier_gap' are not integers"):
        rc.risk_table(synthetic(100), "brier_gap")


def test_a_damaged_table_is_named() -> None:
    data = rc.risk_table(synthetic(100)).to_dict()
    with pytest.raises(ee.DataError, match="format 99"):
        rc.RiskTable.from_dict({**data, "format_version": 99})
    with pytest.raises(ee.DataError, match="damaged risk table"):
        rc.RiskTable.from_dict({key: value for key, value in data.items() if key != "worse"})
