"""The JSON files of an adapter, as files: bounded in size, read whole or not at all. Their forms are in `schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ee_surgery.errors import AdapterError
from ee_surgery.files import JSON_LIMIT, read_object

FORMAT_VERSION = 3
OLD_FORMAT = 2
"""Without digests: read with a warning, and written in the new format by the next save."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file, bounded in size and depth.

    Raises:
        AdapterError: it is missing, not a regular file, too large, no JSON, or no object.
    """
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is missing or damaged: {error}. Save the adapter again.") from error


def check_size(path: Path) -> None:
    """Refuse to write a file that would be too large to read.

    Raises:
        AdapterError: the file is too large.
    """
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise AdapterError(f"{path.name} would have {size:,} bytes; at most {JSON_LIMIT:,} can be read again.")
