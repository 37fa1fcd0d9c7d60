"""EENet's learned scheduler: a score and a share of the samples per exit, for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.calibration.budget import quota_thresholds
from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.checks import count, instance, numbers, positive
from ee_surgery.errors import ConfigError, OperatingPointError
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.policies.scores import SCORES, FittedScore, State, fitted, precise
from ee_surgery.task import TaskNames, require

_RHO, _ALPHA_KL, _ALPHA_COST, _BETA = 0.5, 1e-3, 1e-2, 1.0
_LR, _WEIGHT_DECAY, _STEPS, _PERIOD, _BATCH = 1e-2, 1e-2, 160, 10, 1024
SCORE_RATES = (1e-3, 1e-2)


def _inputs(logits: Tensor) -> Tensor:
    """[p, max p, 1 - H / log C] of one exit, (B, C + 2)."""
    logits = precise(logits)
    own = [SCORES[name](logits, None, ())[0] for name in ("max_prob", "entropy")]
    return torch.cat([torch.softmax(logits, -1), torch.stack(own, 1)], 1)


@fitted("eenet")
@dataclass(frozen=True, eq=False, repr=False)
class EENetScore(FittedScore):
    """q_k = w_k . [p_k, max p_k, 1 - H(p_k) / log C, q_1 .. q_{k-1}], earlier scores clipped to [0, 1]."""

    tasks: ClassVar[TaskNames] = ("classification",)

    weights: tuple[Tensor, ...]
    """One per exit, (C + 2 + k,)."""

    stateful: ClassVar[bool] = True  # each score reads those before it

    def __call__(
        self, logits: Tensor, confidence: Tensor | None, state: State, exit_index: int
    ) -> tuple[Tensor, State]:
        """Scores (B,), unbounded."""
        known = _inputs(logits)
        if state:
            known = torch.cat([known, state[0]], 1)
        q = known @ self.weights[exit_index].to(known.dtype)
        clipped = q.clamp(0, 1)[:, None]
        return q, (clipped if not state else torch.cat([state[0], clipped], 1),)


class _Scheduler:
    """Scores and shares of all K exits, with weights padded to the widest exit so that one product computes all."""

    def __init__(self, records: ExitRecords, generator: torch.Generator) -> None:
        known = torch.stack([_inputs(torch.nan_to_num(z)) for z in records.recorded_logits()])
        k, n, d = known.shape
        self.k, self.own = k, d
        self.known = torch.cat([known, known.new_zeros(k, n, k)], 2)  # (K, N, D): room for earlier scores
        self.outcomes = records.outcomes.float()
        widths = torch.tensor([d + i for i in range(k)])
        hidden = (widths * _RHO).int()
        units = (torch.arange(int(hidden.max())) < hidden[:, None]).float()  # (K, H)
        self.reach = (torch.arange(d + k) < widths[:, None]).float()  # (K, D)
        bound = 1 / widths.float().sqrt()[:, None]

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=generator) - 1

        # Scores start as the largest probability: from random weights, a few hundred steps end with worse ones.
        self.w = torch.zeros(k, d + k).index_fill(1, torch.tensor([d - 2]), 1.0).requires_grad_()
        self.w1 = (uniform(k, d + k, units.shape[1]) * bound[:, None] * self.reach[:, :, None]).requires_grad_()
        self.w2 = (uniform(k, units.shape[1]) / hidden.float().sqrt()[:, None]).requires_grad_()
        self.units = units

    def refresh(self) -> None:
        """Copy the current scores, clipped and without gradient, into the inputs of later exits."""
        with torch.no_grad():
            for j in range(self.k - 1):
                q = self.known[j] @ (self.w[j] * self.reach[j])
                self.known[j + 1 :, :, self.own + j] = q.clamp(0, 1)

    def scores(self, rows: Tensor) -> Tensor:
        """q, (K, N)."""
        return torch.einsum("knd,kd->kn", self.known[:, rows], self.w * self.reach)

    def shares(self, rows: Tensor) -> Tensor:
        """log pi, (K, N): a softmax over the exits of r_k = W2 sigmoid(W1 a_k)."""
        inner = torch.sigmoid(torch.bmm(self.known[:, rows], self.w1))
        return F.log_softmax(torch.einsum("knh,kh->kn", inner, self.w2 * self.units), 0)


def eenet_scheduler(
    records: ExitRecords,
    budget: float,
    *,
    latency_ms: Sequence[float] | None = None,
    seed: int = 0,
    steps: int = _STEPS,
    rates: Sequence[float] = SCORE_RATES,
) -> OperatingPoint:
    """Train scores and exit shares for a budget, and turn the shares into thresholds whose actual exits meet it.

    Args:
        budget: mean MACs as a fraction of the original's; with `latency_ms`, mean milliseconds.
        latency_ms: of leaving at each of the K exits, including every branch visited; increasing.
        seed: of the initial weights and the batches.
        steps: of Adam, alternating ten for the scores and ten for the shares.
        rates: of Adam for the scores; the one that gives the most accurate point is kept.
    Raises:
        OperatingPointError: even with all samples leaving at the first exit, the budget is not met.
    Source: EENet (Ilhan et al., WACV 2024, arXiv:2301.07099), with errors of its published code fixed: the score is
        one number per sample, gradients are cleared, there is no sigmoid before the softmax over the exits (it
        keeps any of three exits below 57.6 %), the last exit takes all that is left, an exit without a quota is closed,
        and the budget is met by the exits actually taken, not by soft shares within 10 %. Instead of ten restarts at
        3e-5: two rates of Adam for few steps, from scores that start as the largest probability.
    """
    instance("records", records, ExitRecords)
    require("The calibrator 'eenet'", EENetScore.tasks, records.task)
    budget, seed, steps = positive("budget", budget), count("seed", seed, low=0), count("steps", steps)
    if not numbers("rates", rates, above=0):
        raise ConfigError("rates is empty: give at least one.")
    costs = _costs(records, latency_ms)
    unit = "ms" if latency_ms is not None else ""
    tried = []
    for rate in rates:
        score, shares = _train(records, costs, budget, rate, seed, steps)
        tried.append(_meet(records, score, shares, costs, budget, latency_ms, f"eenet({budget:g}{unit})"))
    return max(tried, key=lambda point: point.accuracy)


def _train(
    records: ExitRecords, costs: Tensor, budget: float, rate: float, seed: int, steps: int
) -> tuple[EENetScore, Tensor]:
    """Train scores and shares alternately; returns the branches' scores and the mean shares of all K exits."""
    generator = torch.Generator().manual_seed(seed)
    n, k = len(records), len(records.exits) + 1
    model = _Scheduler(records, generator)
    score_step = torch.optim.AdamW([model.w], lr=rate, weight_decay=_WEIGHT_DECAY)
    share_step = torch.optim.AdamW([model.w1, model.w2], lr=_LR, weight_decay=_WEIGHT_DECAY)
    all_rows = torch.arange(n)
    for step in range(steps):
        rows = torch.randint(n, (_BATCH,), generator=generator) if n > _BATCH else all_rows
        if step % _PERIOD == 0:
            model.refresh()
        if step // _PERIOD % 2 == 0:
            with torch.no_grad():
                pi = model.shares(rows).exp()
            weights = pi / pi.sum(1, keepdim=True)
            # clipping has no gradient outside [0, 1]: a slope of 0.01 brings scores back
            q = model.scores(rows)
            q = (q.clamp(0, 1) + 0.01 * (q - q.detach())).clamp(1e-6, 1 - 1e-6)
            loss = (weights * F.binary_cross_entropy(q, model.outcomes[:, rows], reduction="none")).sum() / k
            optimizer = score_step
        else:
            log_pi = model.shares(rows)
            with torch.no_grad():
                target = model.scores(rows).clamp(1e-6, 1) ** _BETA
                target = target / target.sum(0)
            spent = (log_pi.exp().mean(1) * costs).sum()
            divergence = F.kl_div(log_pi, target, reduction="none").mean()
            loss = _ALPHA_KL * divergence + _ALPHA_COST * (spent - budget).abs() / budget
            optimizer = share_step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.refresh()
    with torch.no_grad():
        shares = model.shares(all_rows).exp().mean(1).double()
        score = EENetScore(tuple((model.w[j, : model.own + j]).clone() for j in range(k - 1)))
    return score, shares


def _costs(records: ExitRecords, latency_ms: Sequence[float] | None) -> Tensor:
    """Cost of leaving at each exit, (K,)."""
    if latency_ms is None:
        paid = exit_costs(records.trunk_macs, records.branch_macs, [True] * len(records.exits))
        return torch.tensor(paid, dtype=torch.float64) / records.base_macs
    latency_ms = numbers("latency_ms", latency_ms, above=0)
    if len(latency_ms) != len(records.exits) + 1 or list(latency_ms) != sorted(latency_ms):
        raise ConfigError(f"latency_ms must be {len(records.exits) + 1} rising positive numbers, got {latency_ms}.")
    return torch.tensor(latency_ms, dtype=torch.float64)


def _meet(
    records: ExitRecords,
    score: EENetScore,
    shares: Tensor,
    costs: Tensor,
    budget: float,
    latency_ms: Sequence[float] | None,
    rule: str,
) -> OperatingPoint:
    """The most expensive thresholds within the budget, over shares tilted towards cheap or expensive exits."""
    scores, n = records.scores(score), len(records)

    def at(tilt: float) -> tuple[float, ThresholdPolicy]:
        tilted = torch.softmax(shares.clamp_min(1e-12).log() - tilt * costs / costs[-1], 0)
        quotas = (tilted[:-1] * n).floor().int().tolist()
        if tilt >= _TILT:
            quotas = [n] + [0] * (len(quotas) - 1)
        policy = ThresholdPolicy(quota_thresholds(scores, quotas), score)
        replay = records.replay(policy)
        if latency_ms is None:
            return replay.macs.mean().item() / records.base_macs, policy
        return costs[replay.exit_index].mean().item(), policy

    low, high = -_TILT, _TILT
    cheapest, best = at(high)
    if cheapest > budget:
        raise OperatingPointError(
            f"No exits meet a budget of {budget:g}: the cheapest possible mean is {cheapest:.3f}"
            f"{' ms' if latency_ms is not None else ' of the MACs'}. Add an earlier exit or allow a larger budget."
        )
    never = ThresholdPolicy((NEVER,) * len(records.exits))
    if (1.0 if latency_ms is None else float(costs[-1])) <= budget:
        best, high = never, low
    for _ in range(40):
        if high <= low:
            break
        middle = (low + high) / 2
        cost, policy = at(middle)
        if cost <= budget:
            high, best = middle, policy
        else:
            low = middle
        if high - low < 1e-3:
            break
    return replay_point(records, best, rule)


_TILT = 60.0
