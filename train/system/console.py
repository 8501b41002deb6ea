"""What all commands share: the parser of arguments, errors in one line, exit statuses, progress bars."""

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm

from mclr.errors import UserError
from mclr.train.system.ranks import handle_signals, launched

Main = Callable[[Any], int | None]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a UserError and whose help begins with examples."""

    def __init__(self, prog: str, epilog: str = "", **settings) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.examples = epilog

    def format_help(self) -> str:
        return f"{self.examples}\n\n{super().format_help()}" if self.examples else super().format_help()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        # argparse turns the arguments after a second -- into empty lists
        if list(sys.argv[1:] if args is None else args).count("--") > 1:
            self.error("-- is given twice: give it once, before arguments that begin with a dash")
        return super().parse_known_args(args, namespace)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # argparse itself ignores a failed write of the help
        answer("", end="")
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows the arguments)")


class Output:
    """A standard stream whose writes never fail. After an error (a closed pipe, a full disk) it drops all further output.

    error: that error, or None.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., Any], *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            self.error = error
            # this also silences C libraries and the flush at Python's end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


def answer(text: str, end: str = "\n") -> None:
    """Print the result of a command: help, a plan, settings. Raises OSError when it cannot be written."""
    print(text, end=end, flush=True)
    if error := getattr(sys.stdout, "error", None):
        raise error


def run(main: Main, argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return its exit status, with None as 0. Errors are one line on stderr.

    Status 2: a UserError, or a file that cannot be used. 130: Ctrl-C. 141, without a message: the reader closed the pipe of an answer().
    Other output that cannot be written is dropped, and the work goes on.
    """
    before = sys.stdout, sys.stderr
    # Python sets a stream that was closed (`>&-`) to None
    out, err = (Output(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115 (as long as the process)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    # file names may contain bytes that are not valid text
    if isinstance(out.stream, io.TextIOWrapper):
        out.stream.reconfigure(errors="backslashreplace")
    try:
        return main(argv) or 0
    except (UserError, OSError) as error:
        if error is out.error:
            if isinstance(error, BrokenPipeError):
                return 141
            error = UserError(f"cannot write to stdout ({error.strerror}): make room, or send it elsewhere")
        elif isinstance(error, OSError):
            # an error without a file name is our own bug
            if error.filename is None:
                raise
            error = UserError(f"cannot use {os.fsdecode(error.filename)} ({error.strerror}): give another, or make it usable")
        # a message may contain line breaks of others
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("interrupted", *stop.args, sep=": ", file=sys.stderr)
        return 130
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def run_and_exit(main: Main) -> NoReturn:
    """Run a command, and end this process with its status."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # otherwise the next file to be opened would take this number, and C libraries would write into it
            os.open(os.devnull, os.O_RDWR)
    status: Any = 1
    try:
        status = run(main)
    except SystemExit as end:
        status = end.code
    except Exception:
        traceback.print_exc()
    # the work is done: a late Ctrl-C must not change the status
    handle_signals(signal.SIG_IGN)
    if launched():
        # Python's normal exit destroys NCCL, which may wait for a failed rank, and sometimes aborts after gloo
        os._exit(status or 0)
    sys.exit(status)


def progress_bar(images: int, begun: int, quiet: bool) -> tqdm:
    """Images, speed and time left, on stderr; every 30 s only if stderr is a file."""
    every = 1 if sys.stderr.isatty() else 30
    return tqdm(total=images, initial=begun, unit="img", disable=quiet, mininterval=every, smoothing=0.1)
