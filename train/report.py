"""`mclr report TOUR`: turns TOUR/results.json into one self-contained page for a person, its figures, and the README's table.

N images or points; P pixels of a figure's curves; C channels (1 or 3); H, W pixels.
results.json holds `judge` (named texts), `phases` ([{name, seconds}]) and, under any other name, a paradigm: its rows (base,
control, cfg, mclr), gap_closed, sweep, compute and grids. What a tour does not have (yet) is said on the page.
"""

import sys
from pathlib import Path

from mclr.train.studies.report import load_results, markdown_table, write_report
from mclr.train.system.console import Parser, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "mclr report",
        description="Make TOUR/report.html from TOUR/results.json; or finish a study and make its tables and figures.\n"
        "A single training run has neither: `mclr evaluate RUN` scores it.",
        epilog="examples: mclr report runs/tour --markdown\n          mclr report --study family --only edm2-digits/cca",
    )
    parser.add_argument("tour", type=Path, metavar="TOUR", nargs="?", help="folder of `make tour`, with results.json")
    parser.add_argument("--study", choices=("family",), help="instead of TOUR: do what is missing of all objectives compared")
    parser.add_argument("--only", metavar="PREFIX", help="of the study, do the units whose names begin like this")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for page and figures/ (default: TOUR, or runs/STUDY)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown; write and do nothing")
    args = parser.parse_args(argv)
    if (args.tour is None) == (args.study is None):
        parser.error("give the folder of a tour, or --study family")
    if args.study:
        # imports torch, and this file
        from mclr.train.studies.study import report

        report(args.out or Path("runs") / args.study, args.only or "", args.markdown)
        return 0
    if args.only is not None:
        parser.error("--only belongs to --study")
    results = load_results(args.tour)
    print(markdown_table(results) if args.markdown else write_report(results, args.tour, args.out or args.tour))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
