"""The command line: how every program reports errors, and `mclr`, which starts them."""

import argparse
import difflib
import importlib
import io
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from mclr.errors import UserError

# Imported only when called: `mclr --help` and a typo answer at once, without torch.
PROGRAMS = {
    "train": ("mclr.train.run", "fine-tune or train a generator"),
    "sample": ("mclr.train.sample", "draw images from a run or from weights"),
    "evaluate": ("mclr.train.evaluate", "score samples against real images: FD, precision, recall, FID, FD_DINOv2, ..."),
    "report": ("mclr.train.report", "turn a tour's results into a page; finish a study"),
    "prepare": (
        "mclr.train.prepare",
        "turn images into a dataset folder; fit a tokenizer or a judge to one; cache latents or tokens",
    ),
    "convert": ("mclr.train.convert", "turn published weights into a weights folder, and back"),
}

HELP = "\n".join(
    [
        "usage: mclr COMMAND [ARGUMENTS]",
        "",
        *(f"  {name:10}{summary}" for name, (_, summary) in PROGRAMS.items()),
        "",
        "example: mclr train --model edm2-digits --objective mclr --data digits",
        "`mclr COMMAND --help` shows the arguments of a command.",
    ]
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as every other error is said. Epilogs keep their lines."""

    def __init__(self, prog: str, **settings) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

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


def main(argv: list[str] | None = None) -> int:
    """The console script `mclr`: the first argument names the program, the rest are the program's own."""
    return run(dispatch, sys.argv[1:] if argv is None else argv)


def dispatch(argv: list[str] | None) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    name, *rest = argv
    if name not in PROGRAMS:
        close = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(PROGRAMS)}"
        raise UserError(f"unknown command {name}; {hint}")
    return importlib.import_module(PROGRAMS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
