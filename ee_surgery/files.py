"""Atomic file writes, and folders whose files change all at once.

`atomic_write` replaces one file. `change_folder` replaces files that belong together, by one rename of the manifest
that names them all:

    .config.json.<random>.partial/      every new file under its own name                killed here: old state
    .config.json.<digest of list>.new/  the same folder, complete and on the disk        killed here: old state
    config.json                         moved out of it, lists every file's SHA-256      <- the commit
    ee_adapter.safetensors, ...         moved out of it, one after the other             killed here: new state

In the last step a listed file may still be in the `.new` folder, whose name follows from the list: readers take it
from there (`locate`) without writing, and the next writer finishes the move.

A folder may be untrusted. Nothing is written through its links: new files are created in a new folder, and a rename
replaces a link itself. Only files that the manifest lists are moved into place, and only regular files are read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from pydantic_core import from_json
from safetensors import SafetensorError

from ee_surgery.errors import SurgeryError, WriteError

Found = TypeVar("Found")

LISTED, DIGEST = "files", "digest"
"""Keys of a manifest with the SHA-256 of each file, by name (`assets/plot.png`), and of its own other data."""
JSON_LIMIT = 4 << 20
"""Largest size in bytes of a manifest or another JSON file: a hundred times a typical one."""
_MOST_FILES = 256  # that a manifest may list
_PATIENCE = 600.0  # seconds that a writer waits for another one


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write a file or new folder to, then moved to `path`; on an error nothing changes.

    Args:
        durable: wait until it is on the disk, so that it survives a loss of power.
    Raises:
        WriteError: it cannot be written.
    """
    path, replaced = Path(path), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writer(path), _staging(path) as staging:
            new = staging / path.name
            yield new
            _finish(staging, durable)
            os.replace(new, path)
            replaced = True
            if durable:
                _sync(path.parent)
    except SurgeryError:
        raise
    except (OSError, SafetensorError) as error:
        state = "It is written, but may not survive a loss of power." if replaced else "Nothing was changed."
        raise write_error(path, error, state) from error


def write_error(path: Path, error: Exception, state: str = "") -> WriteError:
    """The error for a file that cannot be written.

    Args:
        error: raised by the system or a library.
        state: a sentence on the state of the file.
    """
    found = WriteError(f"{path} cannot be written: {explained(error)} {state}".rstrip())
    found.errno = _number(error)
    return found


def explained(error: Exception) -> str:
    """Why a file could not be written, and what to do, in sentences."""
    said = f"{str(error).rstrip('.')}."
    if isinstance(error, SurgeryError):
        return said
    if isinstance(error, Timeout):
        return f"{said} Another process is writing there: try again later."
    return f"{said} {_WAYS_OUT.get(_number(error), 'Check disk space and write permission.')}"


def _number(error: Exception) -> int | None:
    """The errno of an error; safetensors has it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


_FULL = "Free some disk space, or write to another disk."
_DENIED = "Choose a folder with write permission."
_WAYS_OUT: dict[int | None, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _DENIED),
    errno.EIO: "The disk may be failing: write to another one.",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "Something else is at that path: choose another."),
}


class FolderChange:
    """New files of a folder, staged until all of them are moved into place; see `change_folder`."""

    def __init__(self, folder: Path, manifest: str, staging: Path) -> None:
        self.folder, self.manifest, self.staging = folder, manifest, staging
        self.data = read_manifest(folder / manifest)
        """Data of the manifest; the list of files is added at the end."""
        self.before = dict(listed(self.data))
        self.kept = dict(self.before)
        """SHA-256 of listed files to keep unless rewritten; all by default."""
        self.stray: set[str] = set()
        """Unlisted files to remove: left by an interrupted change or by older versions."""
        self.committed = False

    def place(self, name: str) -> Path:
        """The staging path for a file name, which may include folders (`assets/plot.png`)."""
        new = self.staging / name
        new.parent.mkdir(parents=True, exist_ok=True)
        return new

    def wrote(self, name: str) -> bool:
        """Whether a file of this name was staged."""
        return (self.staging / name).exists()

    def holds(self, name: str) -> bool:
        """Whether the folder will have a file of this name."""
        there = name not in self.before or name in self.kept
        return self.wrote(name) or (there and name not in self.stray and (self.folder / name).exists())

    def commit(self) -> None:
        """Commit the change.

        Raises:
            OSError: a file cannot be written: before `committed` nothing has changed, after it everything has.
        """
        new = {path.relative_to(self.staging).as_posix(): sha256(path) for path in _files(self.staging)}
        files = dict(sorted({**self.kept, **new}.items()))
        gone = (self.before.keys() | self.stray) - files.keys()
        for name in (*files, *gone):
            _refuse_linked_folders(self.folder, name)
        for name in (self.manifest, *new):
            _refuse_folder(self.folder / name)
        text = json.dumps(sealed({**self.data, LISTED: files}), indent=1) + "\n"
        self.place(self.manifest).write_text(text, encoding="utf-8")
        _finish(self.staging, durable=True)
        ready = _ready(self.folder / self.manifest, files)
        try:
            os.replace(self.staging, ready)
            _sync(self.folder)
            os.replace(ready / self.manifest, self.folder / self.manifest)
        except BaseException:
            if (ready / self.manifest).exists():
                shutil.rmtree(ready, ignore_errors=True)
            raise
        self.committed = True
        _sync(self.folder)
        _roll_forward(self.folder / self.manifest)
        for name in gone:
            path = self.folder / name
            mine = not _is_folder(path) if name in self.stray else _is(path, self.before[name])
            if mine:  # never a file that the user has edited
                path.unlink(missing_ok=True)


@contextmanager
def change_folder(folder: Path, manifest: str) -> Iterator[FolderChange]:
    """Change files of a folder atomically: either all staged files are in place at the end or, on an error, none.

    One writer at a time; an earlier interrupted change is finished or undone first.

    Args:
        manifest: name of the JSON file that lists the others.
    Raises:
        OSError: the folder cannot be written, or another process holds the lock for ten minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _writer(folder / manifest):
        _roll_forward(folder / manifest)
        with _staging(folder / manifest) as staging:
            change = FolderChange(folder, manifest, staging)
            yield change
            change.commit()


# --- reading


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest as plain data; empty if it is missing or unreadable."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def listed(data: Mapping[str, Any]) -> Mapping[str, str]:
    """SHA-256 of each file that a manifest lists, by name; empty for older manifests without a list.

    Names that lead out of the folder are dropped, and so is a list with too many names.
    """
    files = data.get(LISTED)
    files = files if isinstance(files, dict) and len(files) <= _MOST_FILES else {}
    return {name: digest for name, digest in files.items() if isinstance(digest, str) and _is_inside(name)}


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a manifest with its digest, which is independent of key order and formatting."""
    rest = {key: value for key, value in data.items() if key != DIGEST}
    return {**rest, DIGEST: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def locate(manifest: Path, name: str, files: Mapping[str, str]) -> Path | None:
    """The path of a file that matches the manifest's digest; None if there is none.

    An unlisted name is taken as it is.

    Raises:
        OSError: an unlisted file is not a regular file.
    """
    place = manifest.parent / name
    if name not in files:
        if not os.path.lexists(place):
            return None
        open_regular(place).close()
        return place
    # Check the final path twice: a writer may move the file there in between.
    for path in (place, _ready(manifest, files) / name, place):
        if _is(path, files[name]):
            return path
    return None


def by_hand(folder: Path, name: str) -> Path | None:
    """The path of an unlisted file in the folder; None if it is missing.

    Raises:
        OSError: it is not a regular file, is a link or behind one, or is a hard link.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    if _behind_link(folder, name):
        raise OSError(f"{path} is a link, or behind one, and could be any file on this machine.")
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_nlink > 1:
            raise OSError(f"{path} is a hard link to another file on this machine: copy the file.")
    return path


def read_consistently(manifest: Path, read: Callable[[], Found]) -> Found:
    """The result of `read`, repeated if a writer changed the folder meanwhile."""
    while True:
        before = _state(manifest)
        try:
            found = read()
        except Exception:
            if _state(manifest) == before:
                raise
            continue
        if _state(manifest)[0] == before[0]:  # moving files into place does not change their content
            return found


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; never blocks, as opening a fifo would.

    Raises:
        OSError: it is missing or not a regular file: a folder, a fifo, a socket, a device, a broken link.
    """
    # Without O_NONBLOCK, opening a fifo waits for a writer; it does not affect regular files.
    extra = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra))  # noqa: SIM115 (returned)
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(f"{path} is {_kind(mode)}, not a regular file.")
    return file


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file.

    Args:
        limit: largest size in bytes.
    Raises:
        OSError: it is missing, not a regular file, or larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        found = b"" if size > limit else file.read(limit + 1)  # the file may grow meanwhile
    if size > limit or len(found) > limit:
        raise OSError(f"{path} has {max(size, len(found))} bytes; at most {limit} are read.")
    return found


def read_object(path: str | os.PathLike[str], limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in a regular file.

    Args:
        limit: largest size in bytes.
    Raises:
        OSError: see `read_bytes`.
        ValueError: it is not a JSON object, is nested too deep, or has numbers with thousands of digits.
    """
    data = from_json(read_bytes(path, limit), allow_inf_nan=False)  # unlike the standard library, bounded in depth
    if not isinstance(data, dict):
        raise ValueError(f"{path} contains a {type(data).__name__}, not an object")
    return data


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, as hex."""
    found = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# --- parts


@contextmanager
def _writer(path: Path) -> Iterator[None]:
    """Lock out other writers of `path`, and remove leftovers of killed ones."""
    # The last holder removes the lock file; filelock retries if it was removed meanwhile.
    lock = path.with_name(f".{path.name}.lock")
    _check_lock(lock)
    with FileLock(lock, timeout=_PATIENCE):
        try:
            for left in path.parent.glob(f".{escape(path.name)}.*.partial"):
                _remove(left)
            yield
        finally:
            with suppress(OSError):  # Windows cannot remove an open file
                lock.unlink()


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path`, removed at the end."""
    staging = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    staging.mkdir()  # fails if it exists, and follows no link
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_lock(lock: Path) -> None:
    """Refuse anything but a lock file: filelock would block on a fifo, or truncate the target of a link."""
    with suppress(FileNotFoundError):
        found = lock.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            kind = "a hard link to another file" if stat.S_ISREG(found.st_mode) else _kind(found.st_mode)
            raise WriteError(f"{lock} is {kind}, not a lock file: remove it.")


def _roll_forward(manifest: Path) -> None:
    """Move the staged files of a committed change into place, and remove those of an uncommitted one.

    The staged files are untrusted: only files that match the manifest's digests are moved, and none out of a link.
    """
    folder = manifest.parent
    files = listed(read_manifest(manifest))
    ready = _ready(manifest, files)
    for name, digest in files.items() if _is_folder(ready) else ():
        if not _behind_link(ready, name) and _is(ready / name, digest):
            _refuse_linked_folders(folder, name)
            _refuse_folder(folder / name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(ready / name, folder / name)
            _sync((folder / name).parent)
    for left in folder.glob(f".{escape(manifest.name)}.*.new"):
        _remove(left)


def _is_inside(name: str) -> bool:
    """Whether a name in an untrusted manifest stays inside its folder."""
    path = PurePath(name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _refuse_linked_folders(folder: Path, name: str) -> None:
    for parent in PurePath(name).parents:
        if parent != PurePath() and (folder / parent).is_symlink():
            raise WriteError(f"{folder / parent} is a link, and nothing is written through links: remove it.")


def _refuse_folder(path: Path) -> None:
    if _is_folder(path):
        raise WriteError(f"{path} is a folder where a file is expected: remove it.")


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _behind_link(folder: Path, name: str) -> bool:
    """Whether a file in a folder, or a folder on its path, is a link."""
    path = PurePath(name)
    return any((folder / part).is_symlink() for part in (path, *path.parents[:-1]))


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a fifo",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _ready(manifest: Path, files: Mapping[str, str]) -> Path:
    """The folder of the staged files of this list."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return manifest.with_name(f".{manifest.name}.{digest[:16]}.new")


def _finish(staging: Path, durable: bool) -> None:
    """Set modes according to the umask, and sync to disk."""
    mode = staging.stat().st_mode & 0o666
    for path in _files(staging):
        path.chmod(mode)
        if durable:
            _sync(path)
    if durable:
        for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
            _sync(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is(path: Path, digest: str) -> bool:
    """Whether this file has this SHA-256."""
    try:
        return sha256(path) == digest
    except OSError:
        return False


def _state(manifest: Path) -> tuple[tuple[int, ...], list[str]]:
    """Identity of the manifest, and the files that are still staged."""
    try:
        found = manifest.stat()
    except OSError:
        return (), []
    ready = manifest.parent.glob(f".{escape(manifest.name)}.*.new")
    folders = [path for path in ready if _is_folder(path)]
    waiting = [os.path.join(place, name) for path in folders for place, _, names in os.walk(path) for name in names]
    return (found.st_ino, found.st_size, found.st_mtime_ns), sorted(waiting)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # folders cannot be synced there
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
