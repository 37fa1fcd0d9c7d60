"""A served model over HTTP: a Starlette application around an Engine."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import statistics
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from torch import Tensor

from ee_surgery.checks import flag, instance
from ee_surgery.errors import (
    ConfigError,
    DataError,
    OperatingPointError,
    QueueFullError,
    RequestTimeoutError,
    ServingError,
    SurgeryError,
)
from ee_surgery.evaluation.report import render
from ee_surgery.model import EarlyExitModel
from ee_surgery.monitoring.audit import Audit
from ee_surgery.monitoring.report import Process
from ee_surgery.monitoring.state import AuditState
from ee_surgery.runtime.router import ExitOutput
from ee_surgery.serving import knob
from ee_surgery.serving.answers import check_answers, described
from ee_surgery.serving.decode import Decoder
from ee_surgery.serving.engine import Engine
from ee_surgery.serving.limits import HttpLimits, Refused
from ee_surgery.text import visible

try:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    from ee_surgery.serving.metrics import EngineCollector
except ImportError as error:
    raise ConfigError(f"Serving over HTTP needs more packages ({error}): pip install 'ee-surgery[serve]'.") from error

log = logging.getLogger("ee_surgery.serving")
_PAGE = Path(__file__).with_name("status.html")
_RECENT = 1000  # requests that the status page is about
_KNOB_BYTES = 4096
_LATER = {"Retry-After": "1"}


def serve_app(
    engine: Engine,
    *,
    audit: Audit | None = None,
    knob: bool = False,
    limits: HttpLimits | None = None,
    shapes: Sequence[Sequence[int]] = (),
) -> Starlette:
    """A served model over HTTP, as a Starlette application: to be run by uvicorn, or mounted in another one.

    `POST /predict` takes one picture (JPEG, PNG, WebP), prepared as the adapter says, or JSON with samples that are
    prepared: `{"inputs": [...]}`. It answers with a list, one entry per sample. `GET /knob` shows the operating point
    and `PUT /knob` moves it; `GET /metrics` is for Prometheus; `GET /healthz` says 200, or 503 while it drains; `GET /`
    shows it all. Errors are JSON, `{"error": "..."}`.

    The caller closes the engine, once the server has stopped.

    Args:
        engine: of a branched model of one floating-point input, whose answers are no maps.
        audit: of the same model, to be shown.
        knob: whether `PUT /knob` is answered. It changes answers for all, so it must not face the public.
        limits: on requests.
        shapes: of a sample in JSON, beside the size that the model was augmented with; each is captured on first use.
    Raises:
        ConfigError: another model, or starlette and prometheus-client are not installed.
    """
    return Service(engine, audit, flag("knob", knob), limits or HttpLimits(), shapes).app


class Service:
    """What the routes share; `app.state.service` of the application.

    Args:
        engine, audit, may_move, limits, shapes: as of `serve_app`.
    """

    def __init__(
        self,
        engine: Engine,
        audit: Audit | None,
        may_move: bool,
        limits: HttpLimits,
        shapes: Sequence[Sequence[int]] = (),
    ) -> None:
        hint = "An exported file goes behind an application of your own: recipes/serve_fastapi.py."
        self.branched = instance("engine.served", instance("engine", engine, Engine).served, EarlyExitModel, hint=hint)
        check_answers(self.branched)
        if audit is not None and instance("audit", audit, Audit).branched is not self.branched:
            raise ConfigError("The audit is of another model.")
        self.engine, self.audit, self.may_move = engine, audit, may_move
        self.limits = instance("limits", limits, HttpLimits)
        self.decoder = Decoder(self.branched, limits, shapes)
        self.exits = [*map(visible, self.branched.exits), "original"]
        self.draining = False
        """Whether `/healthz` says so; requests are answered all the same."""
        self.responses: Counter[int] = Counter()
        self._recent: deque[tuple[float, list[int]]] = deque(maxlen=_RECENT)
        self._decoding = ThreadPoolExecutor(limits.decoders, thread_name_prefix="ee_surgery-decode")
        self._bytes = 0  # of bodies, read and decoded; changed by the event loop alone
        state = None if audit is None else self._audit_state
        macs = partial(knob.macs_fraction, self.branched)
        self.collector = EngineCollector(self.exits, engine.stats, macs, state, self.responses)
        """What is counted, for Prometheus."""
        self._metrics = self.collector.registry()
        self.app = Starlette(
            routes=[
                Route("/predict", self._answered(self.predict), methods=["POST"]),
                Route("/knob", self._answered(self.knob), methods=["GET", "PUT"]),
                Route("/metrics", self.metrics, methods=["GET"]),
                Route("/status", self.status, methods=["GET"]),
                Route("/healthz", self._answered(self.health), methods=["GET"]),
                Route("/", self.page, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _plain_error},  # pyright: ignore[reportArgumentType]
        )
        self.app.router.redirect_slashes = False
        self.app.state.service = self

    # --- routes

    async def predict(self, request: Request) -> Response:
        """Samples in, answers out."""
        started, limits = time.monotonic(), self.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            decode: Callable[[bytes], Tensor] = self.decoder.numbers
        elif kind == "application/octet-stream" or kind.startswith("image/"):
            decode = self.decoder.picture
        else:
            raise Refused(415, "Send a picture (image/*, application/octet-stream) or application/json.")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "Send bodies without Content-Encoding.")
        samples = await self._samples(request, decode)
        output = await self.engine.submit_async(samples, timeout_s=limits.timeout_s)
        assert isinstance(output, ExitOutput)
        counts = output.exit_index.bincount(minlength=len(self.exits)).tolist()
        self._recent.append((time.monotonic() - started, counts))
        return JSONResponse(described(self.branched, output))

    async def knob(self, request: Request) -> Response:
        """The operating point, read or moved."""
        if request.method == "PUT":
            if not self.may_move:
                raise Refused(403, "The knob is off here: it is moved where the server runs (--knob).")
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise Refused(415, "Send application/json.")  # which pages of other sites may not
            body, held = b"", [0]
            try:
                body = await self._body(request, _KNOB_BYTES, held)
            finally:
                self._bytes -= held[0]
            try:
                wanted = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise Refused(400, "No JSON.") from error
            # it may wait for the lock of an audit that is being saved
            await anyio.to_thread.run_sync(knob.move, self.branched, wanted, self.audit)
        return JSONResponse(knob.state(self.branched))

    def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self._metrics), media_type=CONTENT_TYPE_LATEST)

    async def health(self, request: Request) -> Response:
        """Whether to send requests here."""
        if self.draining or not self.engine.open:
            raise Refused(503, "Draining: send requests elsewhere.")
        return JSONResponse({"status": "ok"})

    def status(self, request: Request) -> Response:
        """What the page shows, as JSON."""
        return JSONResponse(self.described())

    def page(self, request: Request) -> Response:
        """The status page: one file, nothing from elsewhere."""
        nonce = secrets.token_urlsafe(16)
        base = request.scope.get("root_path", "").rstrip("/") + "/"
        frontier = self.branched.frontier
        found = {
            "model": visible(self.branched.engine.backbone.model_id),
            "exits": self.exits,
            "base": base,
            "what": "" if frontier is None else frontier.what,
            "may_move": self.may_move,
            "nonce": nonce,
            "now": self.described(),
        }
        policy = (
            f"default-src 'none'; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(render(_PAGE, found), headers={"Content-Security-Policy": policy})

    def described(self) -> dict[str, Any]:
        """Exits and latencies of the latest requests, the audit, and the knob, as plain data."""
        recent = [*self._recent]
        left = [sum(column) for column in zip(*(counts for _, counts in recent), strict=True)]
        times = sorted(1e3 * seconds for seconds, _ in recent)
        return {
            "requests": len(recent),
            "shares": [count / sum(left) for count in left] if left else [0.0] * len(self.exits),
            "p50_ms": statistics.median(times) if times else None,
            "p95_ms": times[min(len(times) - 1, int(0.95 * len(times)))] if times else None,
            "pending": self.engine.stats().pending,
            "audit": None if self.audit is None else _audited(self._audit_state()),
            "knob": knob.state(self.branched),
        }

    def _audit_state(self) -> AuditState:
        assert self.audit is not None
        return self.audit.state

    # --- bodies

    async def _samples(self, request: Request, decode: Callable[[bytes], Tensor]) -> Tensor:
        """Read and decode a body; its bytes are counted until it is decoded, whatever becomes of the request."""
        held = [0]
        job: asyncio.Future[Tensor] | None = None
        try:
            body = await self._body(request, self.limits.body, held)
            job = asyncio.get_running_loop().run_in_executor(self._decoding, decode, body)
            del body
            return await asyncio.shield(job)  # a thread cannot be stopped
        finally:
            if job is None or job.done():
                self._bytes -= held[0]
            else:
                job.add_done_callback(lambda _: self._free(held[0]))

    def _free(self, size: int) -> None:
        self._bytes -= size

    async def _body(self, request: Request, most: int, held: list[int]) -> bytes:
        """All of a body.

        Args:
            most: bytes.
            held: one number, the bytes that are counted for it; grows as it is read.
        Raises:
            Refused: 400, its length is none; 408, it takes too long; 413, it is too large; 503, other bodies are.
        """
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            raise Refused(400, "Content-Length is no number.")
        too_large = Refused(413, f"A body of more than {most:,} bytes.")
        read = bytearray()
        try:
            with anyio.fail_after(self.limits.timeout_s):
                if int(length) > most:
                    await _skip(request, 4 * most)
                    raise too_large
                async for part in request.stream():
                    if len(read) + len(part) > most:
                        await _skip(request, 4 * most)
                        raise too_large
                    if self._bytes + len(part) > self.limits.bodies:
                        raise Refused(503, "Too many bodies at once: try again later.")
                    self._bytes += len(part)
                    held[0] += len(part)
                    read += part
        except TimeoutError as error:
            raise Refused(408, f"The body did not come within {self.limits.timeout_s:g} s.") from error
        return bytes(read)

    # --- errors

    def _answered(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The route, with whatever it raises as a JSON error of the right status."""

        async def answered(request: Request) -> Response:
            try:
                response = await route(request)
            except ClientDisconnect:
                response = _error(400, "The client went away.")
            except Exception as error:
                response = _refusal(error)
            self.responses[response.status_code] += 1
            return response

        return answered


def _refusal(error: Exception) -> Response:
    """An error as a response."""
    if isinstance(error, Refused):
        return _error(error.status, str(error), _LATER if error.status == 503 else None)
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return _error(status, str(error), _LATER if status == 503 else None)
    log.exception("A request failed", exc_info=error)
    return _error(500, "The model failed on this request.")


_STATUSES: list[tuple[type[SurgeryError], int]] = [
    (QueueFullError, 503),
    (RequestTimeoutError, 504),
    (ServingError, 503),  # closed
    (OperatingPointError, 409),
    (DataError, 422),
]


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


async def _plain_error(request: Request, error: HTTPException) -> Response:
    """Unknown routes and methods."""
    return JSONResponse({"error": f"{error.detail}."}, error.status_code, error.headers)


async def _skip(request: Request, most: int) -> None:
    """Read some of what is not wanted: many clients listen only once they have sent it all."""
    async for part in request.stream():
        most -= len(part)
        if most < 0:
            return


def _audited(state: AuditState) -> dict[str, Any]:
    """What the page shows of an audit."""
    found = Process.of(state, "answers")
    low, high = found.bounds
    return {
        "epsilon": found.epsilon,
        "alpha": found.alpha,
        "log_wealth": found.log_evidence,
        "losses": found.losses,
        "risk": found.risk if found.losses else None,
        "low": low,
        "high": high,
        "alarms": [str(alarm) for alarm in state.alarms[-5:]],
    }
