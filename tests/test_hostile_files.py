"""Folders of a stranger: nothing that is no regular file is waited for, nothing outside is read or written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ee_surgery.files import read_bytes, sha256

needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos on this system")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _missing(path: Path) -> None:
    pass


# --- what is no regular file


@needs_fifo
@pytest.mark.parametrize("plant", [_fifo, _device, _folder, _loop, _missing])
def test_only_regular_files_are_read_and_nothing_is_waited_for(plant: Callable[[Path], None], tmp_path: Path) -> None:
    plant(tmp_path / "there")
    for read in (lambda path: read_bytes(path, 100), sha256):
        with pytest.raises(OSError, match="there"):
            read(tmp_path / "there")


def test_a_bounded_read_takes_up_to_the_bound_and_follows_a_link_to_a_file(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"0123456789")
    link.symlink_to(path)
    assert read_bytes(link, 10) == b"0123456789"
    with pytest.raises(OSError, match="holds 10 bytes; 9 at most"):
        read_bytes(link, 9)
