"""What a served model counts, in the form of Prometheus."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ee_surgery.monitoring.report import Process
from ee_surgery.monitoring.state import AuditState
from ee_surgery.serving.engine import EngineStats


class EngineCollector(Collector):
    """Counts of an engine and of its audit, read anew by each scrape.

    Args:
        exits: names, the original's head last.
        stats: of the engine.
        macs: mean MACs of the operating point, as a fraction of the original's.
        audit: its state; None without one.
        responses: of HTTP, by status.
    """

    def __init__(
        self,
        exits: list[str],
        stats: Callable[[], EngineStats],
        macs: Callable[[], float],
        audit: Callable[[], AuditState] | None = None,
        responses: Mapping[int, int] | None = None,
    ) -> None:
        self.exits, self.stats, self.macs, self.audit = exits, stats, macs, audit
        self.responses = {} if responses is None else responses

    def registry(self) -> CollectorRegistry:
        """One that has this collector alone."""
        found = CollectorRegistry(auto_describe=False)
        found.register(self)
        return found

    def describe(self) -> list[Metric]:
        """Nothing: registering asks for no numbers."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics, named `ee_surgery_...`."""
        stats = self.stats()
        outcomes = {name: getattr(stats, name) for name in ("answered", "failed", "expired", "cancelled", "refused")}
        yield _counter("requests", "Requests by what became of them.", "outcome", outcomes)
        left = dict(zip(self.exits, stats.exits, strict=True))
        yield _counter("samples", "Samples by the exit they left at.", "exit", left)
        stages = dict(zip(self.exits, stats.stages, strict=True)) | {"whole": stats.whole}
        for name, what in (("batches", "Batches"), ("samples", "Samples"), ("seconds", "Seconds of the worker")):
            values = {stage: getattr(count, name) for stage, count in stages.items()}
            about = f"{what} of the stage up to each exit; whole: of the original where no sample leaves early."
            yield _counter(f"stage_{name}", about, "stage", values)
        yield _gauge("pending_samples", "Samples that have no answer yet.", stats.pending)
        yield _gauge("macs_fraction", "Mean MACs of the operating point, as a fraction of the original's.", self.macs())
        responses = {str(status): n for status, n in [*self.responses.items()]}
        yield _counter("http_responses", "Responses by status.", "status", responses)
        if self.audit is not None:
            yield from _audited(self.audit())


def _audited(state: AuditState) -> Iterator[Metric]:
    found = Process.of(state, "answers")
    served = sum(stream.served for stream in state.streams.values())
    yield _gauge("audit_epsilon", "Limit of the risk.", found.epsilon)
    yield _gauge("audit_log_wealth", "Log of the wealth of bets that the risk is above its limit.", found.log_evidence)
    yield _gauge("audit_log_wealth_alarm", "Log of the wealth that raises an alarm.", -math.log(found.alpha))
    yield _gauge("audit_served_samples", "Samples of routed runs since the bets began.", served)
    yield _gauge("audit_losses", "Audited samples since the bets began.", found.losses)
    risk = GaugeMetricFamily("ee_surgery_audit_risk", "Of the latest 1,000 audited samples.", labels=["bound"])
    for name, value in zip(("mean", "low", "high"), (found.risk, *found.bounds), strict=True):
        risk.add_metric([name], value)
    yield risk
    yield _counter("audit_alarms", "Alarms that were raised, the last 1,000.", "kind", _by_kind(state))


def _by_kind(state: AuditState) -> dict[str, int]:
    return {kind: sum(alarm.kind == kind for alarm in state.alarms) for kind in ("answers", "labels")}


def _counter(name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
    found = CounterMetricFamily(f"ee_surgery_{name}", help, labels=[label])
    for key, value in values.items():
        found.add_metric([key], value)
    return found


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"ee_surgery_{name}", help, value)
