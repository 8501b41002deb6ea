"""The command `mclr`: its first argument names a command, which gets the rest."""

import difflib
import importlib
import sys

from mclr import __version__
from mclr.errors import UserError
from mclr.train.system.console import answer, run, run_and_exit

# a command is imported only when it is called: `mclr --help` and typos are answered at once, without torch
PROGRAMS = {
    "train": ("mclr.train.run", "fine-tune or train a generator"),
    "sample": ("mclr.train.sample", "draw images from a run or from weights"),
    "evaluate": ("mclr.train.evaluate", "score samples against real images: FD, precision, recall, FID, FD_DINOv2, ..."),
    "report": ("mclr.train.report", "turn a tour's results into a page"),
    "prepare": (
        "mclr.train.prepare",
        "turn images into a dataset folder; fit a tokenizer or a judge to one; cache latents or tokens",
    ),
    "convert": ("mclr.train.convert", "turn published weights into a weights folder, and back"),
}

HELP = "\n".join(
    [
        "example: mclr train --model edm2-digits --objective mclr --data digits",
        "",
        "usage: mclr COMMAND [ARGUMENTS]",
        "",
        *(f"  {name:10}{summary}" for name, (_, summary) in PROGRAMS.items()),
        "",
        "`mclr COMMAND --help` shows the arguments of a command, `mclr --version` the version.",
    ]
)


def dispatch(argv: list[str] | None = None) -> int | None:
    """Run `mclr ARGV`; without argv, with the arguments of this process."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        answer(HELP)
        return 0
    if argv[0] == "--version":
        answer(f"mclr {__version__}")
        return 0
    name, *rest = argv
    if name not in PROGRAMS:
        close = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(PROGRAMS)}"
        raise UserError(f"unknown command {name}; {hint}")
    return importlib.import_module(PROGRAMS[name][0]).main(rest)


def main(argv: list[str] | None = None) -> int:
    """Exit status of `mclr ARGV`; without argv, as the console script calls it, the process ends with it."""
    return run_and_exit(dispatch) if argv is None else run(dispatch, argv)


if __name__ == "__main__":
    main()
