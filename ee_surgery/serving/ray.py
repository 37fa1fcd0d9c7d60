"""A served model on Ray Serve: replicas with an Engine each, one operating point for all, and their audits joined."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from torch import nn

from ee_surgery.checks import count
from ee_surgery.errors import ConfigError, OperatingPointError, ServingError
from ee_surgery.monitoring.audit import Audit
from ee_surgery.monitoring.state import AuditState
from ee_surgery.pipeline import from_pretrained
from ee_surgery.runtime.router import ExitOutput
from ee_surgery.serving import knob
from ee_surgery.serving.app import Service, serve_app
from ee_surgery.serving.engine import Engine
from ee_surgery.serving.limits import HttpLimits
from ee_surgery.share.adapter import load_adapter
from ee_surgery.share.hub import fetch

try:
    from ray import serve
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise ConfigError(f"Serving on Ray needs more packages ({error}): pip install 'ee-surgery[ray]'.") from error

_METRICS_S = 10.0


@dataclass(frozen=True, kw_only=True)
class RayService:
    """How replicas serve one adapter. The same settings in another process mean the same running service.

    service = RayService(adapter="runs/adapter", options={"num_replicas": 4})
    handle = service.run()
    service.move({"budget": 0.6})  # all replicas, and those that are started later
    print(service.audited().risk())
    """

    adapter: str
    """Folder or repository of the adapter, as every node finds it."""
    base: Callable[[], nn.Module] | None = None
    """Makes the original; by default its library does, by its name in the adapter."""
    name: str = "ee_surgery"
    """Of the Serve application."""
    route: str = "/"
    """Prefix of its URLs."""
    threads: int = 1
    """Of torch, per replica."""
    max_batch: int = 32
    max_pending: int = 1024
    """Samples that may be in, per replica."""
    epsilon: float | None = None
    """Of an audit in every replica, see `Audit`; None: there is none. An alarm warns and changes nothing by itself."""
    audit_settings: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of `Audit`: `alpha`, `q`, ..."""
    audit_folder: str | None = None
    """A folder that all nodes share: a replica keeps its state in a file of its own there, which outlives it."""
    limits: HttpLimits = field(default_factory=HttpLimits)
    """On requests."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the deployment: `num_replicas`, `autoscaling_config`, `ray_actor_options`, ..."""

    def run(self, request: Mapping[str, Any] | None = None, *, blocking: bool = False) -> DeploymentHandle:
        """Start it, or move the knob of the one that runs with these settings: replicas go on then.

        Args:
            request: for an operating point, as `PUT /knob` takes it; None: the one that is stored in the adapter.
            blocking: until it is interrupted.
        Returns:
            A handle, whose `predict` takes samples and gives an `ExitOutput`.
        Raises:
            DataError: no such request.
            OperatingPointError: no point meets it. What runs goes on as it was.
        """
        count("threads", self.threads)
        if request is not None:
            self._check(knob.read_request(request))
        config = {"knob": None if request is None else dict(request)}
        deployment = _deployment.options(name=self.name, max_ongoing_requests=256, **self.options, user_config=config)
        # Of the same version, Ray tells running replicas the new `user_config`; else it would replace them in turn,
        # which is slower and gives the same answers.
        deployment._version = self._version
        return serve.run(deployment.bind(self), blocking=blocking, name=self.name, route_prefix=self.route)

    def move(self, request: Mapping[str, Any]) -> None:
        """Set the operating point of all replicas, and of those that are started later; see `run`.

        It starts no replica anew, and requests in flight keep the point that they came under.
        """
        self.run(request)

    def audited(self) -> AuditState:
        """All that the replicas' audits have seen, and with an `audit_folder` those that are gone.

        Raises:
            ServingError: there is no audit.
        """
        handle = serve.get_app_handle(self.name)
        found = [AuditState.from_dict(each) for each in handle.broadcast("audit_state").results() if each is not None]
        if self.audit_folder is not None:
            found += [AuditState.load(path) for path in sorted(Path(self.audit_folder).glob("*.json"))]
        if not found:
            raise ServingError("There is no audit: RayService(epsilon=0.02).")
        return AuditState.merge(*found)

    @property
    def _version(self) -> str:
        """Of the code that Ray sees: another one restarts replicas."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("base", "options")}
        made_by = None if self.base is None else f"{self.base.__module__}.{self.base.__qualname__}"
        return hashlib.sha256(repr((sorted(own.items()), made_by)).encode()).hexdigest()[:16]

    def _check(self, asked: Mapping[str, Any]) -> None:
        """A replica that cannot take its point would be replaced for ever: so the frontier is asked here."""
        if "off" in asked:
            return
        adapter = Path(self.adapter) if Path(self.adapter).is_dir() else fetch(self.adapter)
        frontier = load_adapter(adapter)[2]
        if frontier is None:
            raise OperatingPointError(f"{self.adapter} has no frontier: run ee-surgery calibrate first.")
        if "point" not in asked:
            frontier.at(**asked)
        elif asked["point"] >= len(frontier):
            raise OperatingPointError(f"There is no point {asked['point']}: the frontier has {len(frontier)}.")


class Replica:
    """One process of a service: the HTTP application of `serve_app` around an Engine of its own."""

    def __init__(self, service: RayService) -> None:
        global _app
        torch.set_num_threads(service.threads)
        self.branched = from_pretrained(service.adapter, None if service.base is None else service.base())
        self.stored = self.branched.operating_point
        self.engine = Engine(self.branched, max_batch=service.max_batch, max_pending=service.max_pending)
        self.engine.submit(self.branched.engine.backbone.own_batch().tensors[0][:1]).result()  # captured by now
        self.audit: Audit | None = None
        if service.epsilon is not None:
            folder = service.audit_folder
            path = None if folder is None else Path(folder) / f"{uuid.uuid4().hex}.json"
            self.audit = Audit(self.branched, epsilon=service.epsilon, path=path, **service.audit_settings)
        _app = serve_app(self.engine, audit=self.audit, limits=service.limits)
        self._stopped = threading.Event()
        threading.Thread(target=_export, args=(_app.state.service, self._stopped), daemon=True).start()

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Ray before the first request, and whenever the knob is moved."""
        if config["knob"] is None:
            self.branched.operate(self.stored)
        else:
            knob.move(self.branched, config["knob"], self.audit)

    async def predict(self, inputs: Any, timeout_s: float | None = None) -> ExitOutput:
        """The answer to samples, for other deployments; as of `Engine.submit_async`."""
        found = await self.engine.submit_async(inputs, timeout_s=timeout_s)
        assert isinstance(found, ExitOutput)
        return found

    def audit_state(self) -> dict[str, Any] | None:
        """Of the audit; None without one."""
        return None if self.audit is None else self.audit.state.to_dict()

    def status(self) -> dict[str, Any]:
        """What the status page shows, and the `pid`."""
        assert _app is not None
        return {**_app.state.service.described(), "pid": os.getpid()}

    def check_health(self) -> None:
        """Called by Ray, which replaces replicas that raise.

        Raises:
            ServingError: the engine has stopped.
        """
        if not self.engine.open:
            raise ServingError("The engine has stopped.")

    def __del__(self) -> None:
        """Ray waits for requests first."""
        self._stopped.set()
        self.engine.close()
        if self.audit is not None:
            self.audit.close()


_app: Starlette | None = None  # of this process: Ray asks for it once the replica is made


def _application() -> Starlette:
    assert _app is not None
    return _app


_deployment: Any = serve.deployment(serve.ingress(_application)(Replica))


def _export(service: Service, stopped: threading.Event) -> None:
    """Hand the metrics of a replica to Ray, whose nodes export them to Prometheus, each with its replica as a tag."""
    from ray.serve import metrics

    gauges: dict[str, metrics.Gauge] = {}
    while not stopped.wait(_METRICS_S):
        for family in service.collector.collect():
            for name, tags, value, *_ in family.samples:
                if name not in gauges:
                    keys: Any = tuple(tags)
                    gauges[name] = metrics.Gauge(name, family.documentation, keys)
                gauges[name].set(value, tags)
