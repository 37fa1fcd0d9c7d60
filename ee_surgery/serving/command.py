"""What `ee-surgery serve` does: load, warm up, listen, serve, drain."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ee_surgery.checks import number
from ee_surgery.errors import ConfigError
from ee_surgery.model import EarlyExitModel
from ee_surgery.monitoring.audit import Audit
from ee_surgery.names import AlarmAction
from ee_surgery.serving.app import serve_app
from ee_surgery.serving.engine import Engine
from ee_surgery.serving.http import listen, run, url
from ee_surgery.serving.limits import HttpLimits


def serve(
    load: Callable[[], EarlyExitModel],
    host: str,
    port: int,
    *,
    say: Callable[[str], object],
    epsilon: float | None,
    audit_file: Path | None,
    on_alarm: AlarmAction,
    max_batch: int,
    max_pending: int,
    timeout_s: float,
    grace_s: float,
    knob: bool | None,
    compiled: bool,
) -> None:
    """Serve a model over HTTP until a signal ends it.

    Args:
        load: makes it, once the arguments are known to be right and the address is free.
        host, port: to listen at; port 0 takes any that is free.
        say: told where, and how it went.
        epsilon: of an audit; None: there is none.
        audit_file, on_alarm: of the audit.
        max_batch, max_pending: of the engine.
        timeout_s: for a body, and for an answer.
        grace_s: see `http.run`.
        knob: whether `PUT /knob` is answered; None: where only this machine can send it.
        compiled: whether to run under torch.compile.
    Raises:
        ConfigError: an argument is invalid, or the address cannot be listened at.
    """
    limits = HttpLimits(timeout_s=timeout_s)
    number("--grace", grace_s, low=0)
    if epsilon is None and audit_file is not None:
        raise ConfigError("--audit-file goes with --audit.")
    try:
        listening = listen(host, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"Cannot listen at {host}, port {port}: {error}. Give another --host or --port.") from error
    with listening, ExitStack() as stack:
        branched = load()
        if compiled:
            branched.compile()
        engine = stack.enter_context(Engine(branched, max_batch=max_batch, max_pending=max_pending))
        # captured and compiled before the first request
        engine.submit(branched.engine.backbone.own_batch().tensors[0][:1]).result()
        audit = None
        if epsilon is not None:
            audit = stack.enter_context(Audit(branched, epsilon=epsilon, on_alarm=on_alarm, path=audit_file))
        stack.callback(engine.close)  # before the audit, which it hands over to
        open_knob = _is_local(listening) if knob is None else knob
        app = serve_app(engine, audit=audit, knob=open_knob, limits=limits)
        say(f"{branched.engine.backbone.model_id} at {url(listening)}{'' if open_knob else ', knob off'}")
        say(f"operating point: {branched.operating_point or 'none: no sample leaves early'}")
        run(app, listening, grace_s=grace_s)
        stats = engine.stats()
        say(f"drained: {stats.answered} requests answered, {stats.failed + stats.expired + stats.refused} not")


def _is_local(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback
