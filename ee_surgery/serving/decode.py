"""Bodies of requests as samples of a model: one picture, or numbers in JSON. Nothing in them is trusted."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ee_surgery.errors import OUT_OF_MEMORY, ConfigError, DataError
from ee_surgery.model import EarlyExitModel
from ee_surgery.serving.limits import HttpLimits, Refused

FORMATS = ("JPEG", "PNG", "WEBP")
_MOST_SCANS = 64  # of a JPEG; progressive ones have about ten
_FORM = '{"inputs": [...]}, numbers of one sample or of a batch'


class Decoder:
    """Makes samples, (B, *shape), of bodies. Bounded in memory, and safe in several threads.

    Pictures are prepared as the adapter says (`branched.transform()`), numbers are taken as they are.

    Args:
        branched: reads one floating-point tensor whose first dimension is the batch.
        limits: on pictures and samples.
        shapes: of a sample, beside that of the size the model was augmented with.
    Raises:
        ConfigError: the model reads something else.
    """

    def __init__(self, branched: EarlyExitModel, limits: HttpLimits, shapes: Sequence[Sequence[int]] = ()) -> None:
        own = branched.engine.backbone.own_batch()
        (self.name, sample), *others = own.arguments.items()
        if others or own.dims[self.name] != 0 or not sample.is_floating_point():
            raise ConfigError(
                f"Models of one floating-point input are served over HTTP, and this one reads {sorted(own.arguments)}: "
                "put an ee.Engine into an application of your own."
            )
        self.limits = limits
        self.shapes = tuple(dict.fromkeys([tuple(sample.shape[1:]), *(tuple(map(int, each)) for each in shapes)]))
        """Of the samples that are taken; the first is that of the model's own sample."""
        self.device, self.dtype = sample.device, sample.dtype
        self.transform = _transform(branched)
        """From a picture to a sample; None where nothing says how pictures are prepared."""

    def picture(self, body: bytes) -> Tensor:
        """A JPEG, PNG or WebP as (1, C, H, W).

        Raises:
            Refused: 413, too many pixels; 415, the model takes no pictures; 422, it is damaged, or of a shape that the
                model is not served at.
        """
        if self.transform is None:
            raise Refused(415, "This model has no preprocessing for pictures: send JSON.")
        try:
            if body.count(b"\xff\xda") > _MOST_SCANS:  # each is a pass over all pixels, from a few bytes
                raise ValueError("too many scans")
            with Image.open(io.BytesIO(body), formats=FORMATS) as found:
                self._check(*found.size)
                found.load()
                picture = found.copy()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            self._too_large("far too many")
        except (Refused, *OUT_OF_MEMORY):
            raise
        except Exception as error:  # PIL raises whatever its parsers run into
            raise Refused(422, f"No readable {', '.join(FORMATS)} picture: {type(error).__name__}.") from error
        try:
            pixels = torch.as_tensor(self.transform(picture))
        except DataError as error:
            raise Refused(422, "The model's preprocessing does not take this picture.") from error
        return self._batch(pixels[None])

    def numbers(self, body: bytes) -> Tensor:
        """JSON as (B, *shape).

        Raises:
            Refused: 400, it is no JSON; 413, too many samples or lists; 422, it is something else than numbers of
                samples.
        """
        lists = 16 + 2 * self.limits.samples * max(math.prod(shape[:-1]) for shape in self.shapes)
        if body.count(b"[") + body.count(b"{") > lists:  # each takes far more memory than its two bytes
            raise Refused(413, f"More lists than {self.limits.samples} samples have.")
        try:
            found = json.loads(body.decode(), parse_constant=_no_number)  # str: no other encodings
        except RecursionError as error:
            raise Refused(422, f"Nested too deep: send {_FORM}.") from error
        except ValueError as error:  # UnicodeDecodeError among them
            raise Refused(400, f"No JSON: {str(error).splitlines()[0][:100]}.") from error
        # The one name is all text that it may have: numpy would read numbers in strings, and pad lists of long ones.
        if not isinstance(found, dict) or [*found] != ["inputs"] or body.count(b'"') != 2:
            raise Refused(422, f"Send {_FORM}.")
        if b"true" in body or b"false" in body or b"null" in body:
            raise Refused(422, f"Flags and null are no numbers: send {_FORM}.")
        try:
            array = np.array(found["inputs"], dtype=np.float64)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Refused(422, f"Not numbers in lists of equal lengths: send {_FORM}.") from error
        if array.shape in self.shapes:
            array = array[None]
        return self._batch(torch.from_numpy(array))

    def _check(self, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            self._too_large(f"{width} x {height}")
        if max(width, height) > self.limits.aspect * min(width, height):
            raise Refused(422, f"A picture of {width} x {height} pixels: sides may differ {self.limits.aspect:g}-fold.")

    def _too_large(self, size: str) -> NoReturn:
        raise Refused(413, f"A picture of {size} pixels; at most {self.limits.pixels:,} are taken.")

    def _batch(self, samples: Tensor) -> Tensor:
        if samples.shape[1:] not in self.shapes or not len(samples):
            raise Refused(422, f"Samples of shape {_shown(samples.shape)}; taken are {_known(self.shapes)}.")
        if len(samples) > self.limits.samples:
            raise Refused(413, f"{len(samples)} samples; at most {self.limits.samples} per request.")
        samples = samples.to(self.device, self.dtype)
        if not torch.isfinite(samples).all():
            raise Refused(422, f"Numbers that are not finite in {str(self.dtype).removeprefix('torch.')}.")
        return samples


def _transform(branched: EarlyExitModel) -> Callable[[Image.Image], Tensor] | None:
    try:
        return branched.transform()
    except DataError:
        return None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _shown(shape: Sequence[Any]) -> str:
    return "(B)" if len(shape) < 2 else f"(B, {', '.join(map(str, shape[1:]))})"


def _known(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(_shown((0, *shape)) for shape in shapes)
