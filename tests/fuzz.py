"""What both fuzz suites share: a program run as a user would, what must hold whatever it was given, and the count of cases."""

import contextlib
import io
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mclr.train import cli

SECONDS = 60  # that a case may take: the plan of a very deep network takes 20
MEMORY = 3 * 2**30  # bytes that a case may take beside what the process has already


def cases(count: int) -> Callable:
    """The same `count` cases at every run of `make test-fuzz`."""
    rules = settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    return lambda test: pytest.mark.fuzz(rules(test))


class Hang(BaseException):
    """No error that a program could handle."""


def _hang(number: int, frame: object) -> None:
    raise Hang(f"more than {SECONDS} seconds")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bounded time, also of a system call that waits, and bounded memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = signal.signal(signal.SIGALRM, _hang)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path with its mode, a file also with its time of change."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders + files:
            stat = os.lstat(os.path.join(where, name))
            found[os.path.relpath(os.path.join(where, name), folder)] = (stat.st_mode, stat.st_mtime_ns if name in files else 0)
    return found


def mclr(argv: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `mclr ARGV` in this process; stdout takes UTF-8 alone, as a terminal's."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(argv)
        except SystemExit as end:
            status = end.code or 0
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return status, *said


def check(folder: Path, argv: list[str], run: Callable = mclr, may_write: tuple[str, ...] = (), keep: bool = False) -> int:
    """Run it in `folder`; what must hold after any program. Returns the exit status.

    may_write: paths that even a program that ends with an error may write to. Files that a good run made are taken away, unless keep.
    """
    before = files_below(folder)
    status, out, err = run(argv)
    after = files_below(folder)
    assert status in (0, 2), err
    assert "Traceback" not in out + err
    new = sorted(after.keys() - before.keys())
    assert not [path for path in new if ".tmp-" in path]
    if status == 2:
        # said before it: a file of others is converted, a damaged sample passed over
        *notes, line = err.splitlines()
        assert line.startswith("error: ") and not any(note.startswith("error: ") for note in notes), err
        changed = {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
        assert not [path for path in changed if not path.startswith(may_write)], changed
    for path in new if not keep else []:
        place = folder / path
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    return status


@pytest.fixture(scope="module", autouse=True)
def counts(request: pytest.FixtureRequest) -> Iterator[Counter]:
    """Cases and exit statuses by strategy, told at the end."""
    seen: Counter = Counter()
    yield seen
    if not seen:
        return
    lines = [
        f"{name}: {sum(n for (each, _), n in seen.items() if each == name)} cases, {seen[name, 0]} accepted, {seen[name, 2]} refused"
        for name in dict.fromkeys(name for name, _ in seen)
    ]
    plugin = request.config.pluginmanager.getplugin
    with plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, f"{request.module.__name__}: {sum(seen.values())} cases", sep="\n")
