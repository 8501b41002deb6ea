"""Files and folders that appear whole or not at all: they are written under a temporary name beside the target, then renamed."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from mclr.errors import UserError

CHUNK = 2**26  # bytes between two beats of a rank that writes or reads
# how file systems refuse what they cannot do; anything else (EIO, ENOSPC) is a fault
UNSUPPORTED = {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOLCK}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class CannotWrite(UserError):
    """A file or folder cannot be written. reason: why, in a few words."""

    def __init__(self, path: Path, error: OSError):
        below_a_file = isinstance(error, FileExistsError | NotADirectoryError)
        self.path, self.error = Path(path), error
        self.reason = "it lies below a regular file" if below_a_file else error.strerror
        super().__init__(
            f"cannot write {path} ({self.reason}): choose another place, or make this one writable with room to spare"
        )


class NoLocks(OSError):
    """The file system has no locks."""


def ignore() -> None:
    """The beat of a process that nobody watches."""


def write_file(path: str | Path, data: bytes | Iterable[Any], beat: Callable[[], None] = ignore) -> str:
    """Replace the file at `path` by these bytes, or by these buffers in turn; returns their sha256. A crash leaves no part of a file.

    beat: called after every CHUNK that is on the disk. Raises CannotWrite when the folder does not exist, cannot be written or is full.
    """
    path, digest = Path(path), hashlib.sha256()
    temporary = _temporary(path)
    blocks: Iterable[Any] = [data] if isinstance(data, bytes) else data
    try:
        with open(temporary, "xb") as file:
            for block in blocks:
                view = memoryview(block)
                for start in range(0, len(view), CHUNK):
                    chunk = view[start : start + CHUNK]
                    digest.update(chunk)
                    file.write(chunk)
                    if len(chunk) == CHUNK:
                        # one fsync of everything at the end would be one long silence
                        _flush(file)
                        beat()
            _flush(file)
        beat()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CannotWrite(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return digest.hexdigest()


def write_tensors(
    path: str | Path, tensors: Mapping[str, Any], about: Mapping[str, str] | None = None, beat: Callable[[], None] = ignore
) -> str:
    """Write a safetensors file with these tensors and metadata by write_file, without a copy of all tensors in memory."""
    import torch

    # safetensors aligns by size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    end = 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        # torch.bfloat16 -> BF16, torch.uint8 -> U8
        dtype = str(t.dtype).removeprefix("torch.").replace("float", "f").replace("uint", "u").replace("int", "i")
        header[name] = {"dtype": dtype.upper(), "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()

    return write_file(path, blocks(), beat)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, by write_file; undecodable bytes in file names are written as backslash escapes."""
    write_file(path, text.encode(errors="backslashreplace"))


def write_json(path: str | Path, obj: Any) -> str:
    """Write `obj` as indented JSON; returns the file's sha256."""
    return write_file(path, (json.dumps(obj, indent=2) + "\n").encode())


def in_memory(write: Callable[..., Any], **options: Any) -> bytes:
    """The bytes that `write(file, **options)` writes."""
    buffer = io.BytesIO()
    write(buffer, **options)
    return buffer.getvalue()


def lock(path: Path, wait: bool = False, none: bool = False) -> tuple[IO[str], bool]:
    """Open the file at `path` and try to lock it: (the file, open for reading and appending; whether we hold the lock).

    The lock lasts until the file is closed. wait: wait until another process releases it. none: where the file system has no locks, say
    so and go on. Raises OSError when the file cannot be opened, and NoLocks.
    """
    file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return file, False
    except OSError as error:
        if not none or error.errno not in UNSUPPORTED:
            file.close()
            raise (NoLocks if error.errno in UNSUPPORTED else OSError)(error.errno, error.strerror, str(path)) from error
        _without("locks", path, error)
    return file, True


def try_folder(path: Path) -> None:
    """Check that a folder with a file in it can be renamed here, as checkpoints need. Raises UserError when it cannot."""
    made = _temporary(path / "any")
    try:
        with new_folder(made) as folder:
            (folder / "file").touch()
    except CannotWrite as error:
        raise UserError(
            f"the file system of {path} cannot rename folders ({error.reason}), as checkpoints need: choose another"
        ) from error
    shutil.rmtree(made, ignore_errors=True)


def regular(path: Path) -> Path:
    """The path. Raises OSError when a pipe (reading it would wait) or a device (it has no end) is there."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path


def checksum(path: Path) -> str:
    """sha256 of a file, read again only when its size or time of change differs. Raises UserError when it cannot be read."""
    try:
        stat = regular(path).stat()
        return _digest(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): copy it again") from error


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    return digest(path)


def digest(path: Path, beat: Callable[[], None] = ignore) -> str:
    """sha256 of a file. beat: called after every CHUNK. Raises OSError."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            beat()
    return found.hexdigest()


def cache_folder() -> Path:
    """The folder of converted weights and statistics of real images. The user may delete it: we make its content again.

    XDG_CACHE_HOME/mclr, else ~/.cache/mclr. A user without a home gets a temporary folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mclr")
    except RuntimeError:
        # this user has neither HOME nor an entry in the table of users
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


@contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`. It becomes `path` when the body ends, and vanishes when the body raises.

    Makes the parents, too. Replaces an empty folder at `path`, and with `replace` also one with content. Raises UserError at the start
    when `path` is taken, is the current folder or cannot be made, and at any time when the disk is full.
    """
    # a link to an empty folder stays, and its target is replaced
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and os.path.samefile(path, "."):
            # the user's shell would be left in a deleted folder
            raise UserError(f"{path} is the folder that you are in: choose another name")
        if path.exists() and not (path.is_dir() and (replace or not any(path.iterdir()))):
            raise UserError(f"{path} exists already: remove it or choose another name")
        # after these checks: the path / has no name that could be exchanged
        temporary = _temporary(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise CannotWrite(path, error) from error
    try:
        yield temporary
        for below, _, names in os.walk(temporary):
            for name in names:
                # not every writer syncs its files
                with open(Path(below, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(Path(below))
        if replace and path.exists():
            _swap(temporary, path)
        else:
            os.rename(temporary, path)
        _sync_folder(path.parent)
    except CannotWrite as error:
        if temporary not in error.path.parents:
            raise
        # the user knows the folder by this name
        raise CannotWrite(path, error.error) from error
    except OSError as error:
        # errors about other files come from the body
        if error.errno in FULL or error.filename in (str(temporary), str(path)):
            raise CannotWrite(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{uuid.uuid4().hex}")


def _swap(new: Path, path: Path) -> None:
    """Replace the folder at `path` by a new one. A crash between the two renames leaves both folders beside `path`."""
    old = _temporary(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Sync the names in a folder, so that they survive a power cut, where the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _without("syncing of folders", path, error)


SAID: set[str] = set()  # what _without has printed


def _without(what: str, path: Path, error: OSError) -> None:
    """Print once per process that a file system lacks something."""
    if what not in SAID:
        SAID.add(what)
        print(f"the file system of {path} has no {what} ({error.strerror}): going on without", file=sys.stderr)
