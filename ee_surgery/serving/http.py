"""Run a served model on one machine: uvicorn around the application, drained when it is told to end."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from ee_surgery.serving.app import Service

_CONNECTIONS = 1000
_HEADER_BYTES = 16 << 10
_LAST_S = 60.0


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then `/healthz` says 503 for `grace_s`, and what is in is answered.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float = 0.0) -> None:
        super().__init__(config)
        self.service, self.grace_s = service, grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of both signals; runs between two steps of the event loop."""
        if self.service.draining:
            self.force_exit = self.should_exit = True
            return
        self.service.draining = True
        asyncio.get_running_loop().call_later(self.grace_s, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def run(app: Starlette, listening: socket.socket, *, grace_s: float = 0.0) -> None:
    """Serve an application of `serve_app` on a socket until a signal ends it.

    Args:
        grace_s: seconds in which requests still come in after the signal, so that a balancer sees `/healthz` first.
    """
    config = uvicorn.Config(
        app,
        http="h11",  # which bounds headers
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=int(_LAST_S),
    )
    Server(config, app.state.service, grace_s).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any that is free.

    Raises:
        OSError: the address is taken or unknown.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=512)


def url(listening: socket.socket) -> str:
    """Where it listens."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"
