"""Writes that are either complete under their final name or not there at all.

Everything is written under a temporary name beside the target, flushed to the disk and renamed. The temporary
name says which process on which machine made it, so that the next write can tell the leftovers of a killed
process from the work of a living one.
"""

import ctypes
import errno
import fnmatch
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from leantune.errors import CheckpointError

logger = logging.getLogger("leantune")

# A directory that holds anything else is never replaced, whatever `overwrite` says: it may be a home.
REPLACEABLE = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
)

_HOST = hashlib.blake2s(socket.gethostname().encode(), digest_size=4).hexdigest()
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.leantune-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>tmp|old)")
_in_flight: set[Path] = set()  # temporary names that this process is writing now
_RENAME_EXCHANGE = 2  # from <linux/fs.h>
_AT_FDCWD = -100


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, nbytes: int = 0) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it changes all at once, when the block ends without an error.

    Args:
        path: final name; missing parent directories are made, an existing file is replaced.
        nbytes: size that will be written, in bytes, if known: a disk too small is refused at once.
    Yields:
        A buffered binary file on a temporary name in the same directory.
    Raises:
        CheckpointError: the file cannot be written; an existing file of that name is as it was.
    """
    target = Path(path)
    with _explained(target, nbytes):
        if target.is_dir():
            raise CheckpointError(f"cannot write {target}: it is a directory; choose a file name")
        temporary = _begin(target, nbytes)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)  # gone already unless something failed
            _in_flight.discard(temporary)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False, nbytes: int = 0) -> Iterator[Path]:
    """Fill a directory so that it appears under `path` all at once, when the block ends without an error.

    Args:
        path: final name; missing parents are made, an empty directory counts as absent.
        overwrite: replace a directory that holds checkpoint files and nothing else.
        nbytes: size that will be written, in bytes, if known: a disk too small is refused at once.
    Yields:
        The temporary directory to fill, beside the target.
    Raises:
        CheckpointError: the target exists (without `overwrite`), holds other things than checkpoint files, or
            cannot be written; what existed under that name is as it was.
    """
    target = Path(path).expanduser().resolve()
    with _explained(target, nbytes):
        temporary = _begin(target, nbytes)
        try:
            _check_replaceable(target, overwrite)
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            _check_replaceable(target, overwrite)  # another process may have been faster
            if target.is_dir() and any(target.iterdir()):
                _swap_directories(temporary, target)
            else:
                temporary.rename(target)
            _sync_directory(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # what is left of it is swept by the next write
            _in_flight.discard(temporary)


def remove_directory(path: Path) -> None:
    """Delete a directory so that its name never stands for a part of it."""
    with _explained(path, 0):
        doomed = _temporary_name(path)
        _in_flight.add(doomed)
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        finally:
            _in_flight.discard(doomed)


def leftovers(directory: Path) -> list[Path]:
    """Temporary files and directories in `directory` whose process, on this machine, is dead."""
    return [path for path in sorted(directory.iterdir()) if _is_leftover(path)]


def sweep(directory: Path) -> None:
    """Remove the leftovers of killed processes from `directory`; a directory they had set aside goes back."""
    for path in leftovers(directory):
        match = _TEMPORARY.fullmatch(path.name)
        assert match is not None
        if match["kind"] == "old" and not (path.parent / match["name"]).exists():
            path.rename(path.parent / match["name"])
            logger.warning("restored %s, which a killed run had set aside", path.parent / match["name"])
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # another process may be sweeping, too
        else:
            path.unlink(missing_ok=True)
        logger.warning("removed %s, left behind by a killed run", path)


def _temporary_name(target: Path, kind: str = "tmp") -> Path:
    return target.with_name(f".{target.name}.leantune-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def _is_leftover(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or match["host"] != _HOST:
        return False
    pid = int(match["pid"])
    if pid == os.getpid():  # a container gives the same number to every run
        return path not in _in_flight
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _begin(target: Path, nbytes: int) -> Path:
    """Make the parent, clean it, check the space, and return the temporary name, marked as ours."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    if nbytes > shutil.disk_usage(target.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = _temporary_name(target)
    _in_flight.add(temporary)
    return temporary


@contextmanager
def _explained(target: Path, nbytes: int) -> Iterator[None]:
    """Turn an error of the operating system into one that names the target and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"cannot write {target}: {error}") from error
        free = shutil.disk_usage(_existing_parent(target)).free
        needed = f"{nbytes:,} bytes needed, " if nbytes else ""
        raise CheckpointError(
            f"cannot write {target}: the disk is full ({needed}{free:,} bytes free); "
            "free some space or choose a directory on another disk"
        ) from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"cannot write the directory {target}: a file has that name; choose another")
    entries = sorted(target.iterdir())
    if entries and not overwrite:
        raise CheckpointError(
            f"{target} exists and is not empty; choose another directory or pass overwrite=True / --overwrite"
        )
    for entry in entries:
        known = any(fnmatch.fnmatch(entry.name, pattern) for pattern in REPLACEABLE)
        if entry.is_dir() or not (known or _TEMPORARY.fullmatch(entry.name)):
            raise CheckpointError(
                f"overwriting {target} would delete {entry.name!r}, which is not a checkpoint file; "
                "move it away or choose another directory"
            )


def _swap_directories(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; the old content ends under the name of `new`."""
    if _exchange(new, target):
        return
    # This file system cannot exchange two names. Between the two renames nothing has the final name; a
    # process killed there leaves the old directory under a name that `sweep` knows and puts back.
    old = _temporary_name(target, kind="old")
    _in_flight.add(old)
    try:
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(new)
    finally:
        _in_flight.discard(old)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(root))


def _sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(descriptor)
