"""What a request over HTTP may ask for, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from ee_surgery.checks import count, positive


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpLimits:
    """Bounds on requests over HTTP: of memory, before anything is decoded, and of time."""

    body_mib: float = 16.0
    """MiB of one request's body; more is answered with 413."""
    bodies_mib: float = 64.0
    """MiB of all bodies that are being read or decoded at one time; a request beyond it gets 503."""
    pixels: int = 16 << 20
    """Of a picture, width x height, before it is resized. Each decoding thread needs up to 12 bytes per pixel."""
    aspect: float = 20.0
    """The longer side of a picture relative to the shorter one: transforms that keep proportions blow up others."""
    samples: int = 64
    """Per request."""
    decoders: int = 2
    """Threads that decode bodies."""
    timeout_s: float = 30.0
    """Seconds to read a body (408), and seconds for the answer (504)."""

    def __post_init__(self) -> None:
        for name in ("body_mib", "bodies_mib", "aspect", "timeout_s"):
            positive(name, getattr(self, name))
        for name in ("pixels", "samples", "decoders"):
            count(name, getattr(self, name))

    @property
    def body(self) -> int:
        """Bytes."""
        return int(self.body_mib * 2**20)

    @property
    def bodies(self) -> int:
        """Bytes."""
        return int(self.bodies_mib * 2**20)


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what was wrong, in a sentence.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
