"""What all programs say to the user: arguments and errors in one line, exit statuses, progress bars."""

import argparse
import io
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from tqdm import tqdm

from mclr.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line (UserError) and whose help begins with examples, the most frequent one first."""

    def __init__(self, prog: str, epilog: str = "", **settings) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.examples = epilog

    def format_help(self) -> str:
        return f"{self.examples}\n\n{super().format_help()}" if self.examples else super().format_help()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        # of which argparse makes empty lists
        if list(sys.argv[1:] if args is None else args).count("--") > 1:
            self.error("-- twice: give it once, before what begins with a dash")
        return super().parse_known_args(args, namespace)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # so that run() hears of it where nobody reads the help
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows the arguments)")


def run(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Exit status of `main(argv)`: 2 after a UserError or a file that cannot be used, 130 after Ctrl-C, each with one line on stderr;
    141, silently, where nobody reads stdout to its end.

    None counts as 0.
    """
    # names of files may hold bytes that are no text
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main(argv) or 0
        sys.stdout.flush()
        return status
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
            # of what is left for it, Python's own end would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if isinstance(error, OSError):
            # of no file: our own mistake
            if error.filename is None:
                raise
            error = UserError(f"cannot use {os.fsdecode(error.filename)} ({error.strerror}): give another, or make it usable")
        # One line, whatever the message was made of.
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _nobody_reads(stream: TextIO) -> bool:
    """Whether a stream is a pipe without a reader."""
    events = select.poll()
    # errors are told unasked
    events.register(stream, 0)
    return bool(events.poll(0))


def run_rank(main: Callable[[list[str] | None], int | None]) -> NoReturn:
    """End this process as run(main) says, at once where it is one of several ranks.

    Python's own end would take down NCCL, which waits for others where one failed, and now and then aborts after gloo.
    """
    status = 1
    try:
        status = run(main)
    except Exception:
        traceback.print_exc()
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def progress_bar(images: int, begun: int, quiet: bool) -> tqdm:
    """Images, speed and time left, on stderr; rarely where that is a file."""
    every = 1 if sys.stderr.isatty() else 30
    return tqdm(total=images, initial=begun, unit="img", disable=quiet, mininterval=every, smoothing=0.1)
