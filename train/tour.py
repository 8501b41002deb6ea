"""`make tour`: fine-tunes a model of each kind on the digits, and compares samples of base, control, guided control and MCLR.

Every finished piece (a run, a scored set of samples) is kept: an interrupted tour goes on where it stopped.
"""

import sys
from pathlib import Path
from typing import Any

from mclr.errors import UserError
from mclr.train.studies.report import markdown_table, write_report
from mclr.train.studies.tour import ABOUT, GAMMAS, SEEDS, SEEDS_FULL, DigitsJudge, Tour, compare
from mclr.train.system.console import Parser, run
from mclr.train.system.files import write_json


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m train.tour", description=__doc__, epilog="example: python -m train.tour --out runs/tour")
    parser.add_argument("--out", type=Path, default=Path("runs/tour"), help="folder of the tour (default: runs/tour)")
    parser.add_argument("--full", action="store_true", help=f"{SEEDS_FULL} sampling seeds instead of {SEEDS}, finer sweeps")
    parser.add_argument("--model", choices=list(GAMMAS), help="one model alone (default: all)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every run, for a quick look")
    args = parser.parse_intermixed_args(argv)
    judge = DigitsJudge()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {args.out} ({error.strerror}): choose another --out") from None
    tour = Tour(args.out, args.full, args.overrides, judge)
    print("the judge")
    for key, text in ABOUT.items():
        print(f"  {key}: {text}")
    print("for each model three fine-tunings, then samples: 10 to 25 minutes on two cores", flush=True)
    results: dict[str, Any] = {"judge": ABOUT}
    for model in [args.model] if args.model else list(GAMMAS):
        results[model] = compare(tour, model)
        # write after each paradigm, so that its results can be seen
        results["phases"] = [{"name": name, "seconds": seconds} for name, seconds in tour.phases.items()]
        write_json(args.out / "results.json", results)
        page = write_report(results, args.out, args.out)
    print(markdown_table(results))
    print(f"{sum(tour.phases.values()):.0f} s in all; look at {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
