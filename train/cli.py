"""The command line: how every program reports errors, and `mclr`, which starts them."""

import difflib
import importlib
import sys

from mclr.errors import UserError
from mclr.train.system.console import run

# Imported only when called: `mclr --help` and a typo answer at once, without torch.
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
        "usage: mclr COMMAND [ARGUMENTS]",
        "",
        *(f"  {name:10}{summary}" for name, (_, summary) in PROGRAMS.items()),
        "",
        "example: mclr train --model edm2-digits --objective mclr --data digits",
        "`mclr COMMAND --help` shows the arguments of a command.",
    ]
)


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
