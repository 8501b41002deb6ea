"""Files and folders that appear whole or not at all: written under a temporary name beside the target, then renamed."""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from mclr.errors import UserError


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there; a crash leaves the old file or the new one, never a part.

    Raises UserError when the folder does not exist, cannot be written or is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, by write_file; bytes that are no text, which names of files may hold, as backslashes say them."""
    write_file(path, text.encode(errors="backslashreplace"))


def in_memory(write: Callable[..., Any], **options: Any) -> bytes:
    """What `write(file, **options)` puts into a file."""
    buffer = io.BytesIO()
    write(buffer, **options)
    return buffer.getvalue()


def lock(path: Path, wait: bool = False) -> tuple[IO[str], bool]:
    """(the file at `path`, made where it is missing and open to be read and appended to; whether its lock is ours until it is closed).

    wait: for another process that has it. Raises OSError when the file cannot be opened.
    """
    file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return file, False
    return file, True


def regular(path: Path) -> Path:
    """The path; OSError where something else than a file is there: a pipe would be waited for, a device has no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path


def checksum(path: Path) -> str:
    """sha256 of a file, which is read once as long as size and time of change stay. Raises UserError when it cannot be read."""
    try:
        stat = regular(path).stat()
        return _digest(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): copy it again") from error


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where converted weights and statistics of references are kept between programs. We never empty it.

    XDG_CACHE_HOME/mclr, else ~/.cache/mclr. A user without a home gets a temporary folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mclr")
    except RuntimeError:
        # neither HOME nor an entry in the table of users
        return _temporary_cache()


@lru_cache
def _temporary_cache() -> Path:
    """A folder of this user alone. Raises UserError when it is another user's, or cannot be made."""
    folder = Path(tempfile.gettempdir(), f"mclr-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
    except OSError as error:
        raise UserError(f"cannot use {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder with room to spare") from error
    print(f"this user has no home: caches go to {folder}, or where XDG_CACHE_HOME says", file=sys.stderr)
    return folder


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, by write_file."""
    write_file(path, (json.dumps(obj, indent=2) + "\n").encode())


@contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; it becomes `path` when the body ends and vanishes when the body raises.

    Parents are made as needed; an empty folder at `path` is replaced; replace: so is one with content, at the end.
    Raises UserError when `path` is taken, is the current folder, or cannot be made (at the start, before any work), or when the disk
    is full.
    """
    # a link to an empty folder stays: what it points to is replaced
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and os.path.samefile(path, "."):
            # whoever sits in it would sit in a deleted one
            raise UserError(f"{path} is the folder that you are in: choose another name")
        if path.exists() and not (path.is_dir() and (replace or not any(path.iterdir()))):
            raise UserError(f"{path} exists already: remove it or choose another name")
        # / is taken, and has no place beside it
        temporary = _temporary(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                # safetensors lets the owner alone read; as open to others as the folder is
                os.chmod(Path(folder, name), temporary.stat().st_mode & 0o666)
                _sync(Path(folder, name))
            _sync(Path(folder))
        if replace and path.exists():
            _swap(temporary, path)
        else:
            os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        # an error about some other file of the body is not ours to explain
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename in (str(temporary), str(path)):
            raise _cannot_write(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{uuid.uuid4().hex}")


def _swap(new: Path, path: Path) -> None:
    """Put one folder in the place of another, which is removed; between two renames, a crash may leave both beside the place."""
    old = _temporary(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> UserError:
    below_a_file = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "it lies below a regular file" if below_a_file else error.strerror
    return UserError(f"cannot write {path} ({reason}): choose another place, or make this one writable with room to spare")
