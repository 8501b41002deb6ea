"""`mclr report TOUR`: turns TOUR/results.json into one self-contained page, its figures, and the README's table.

results.json holds `judge` (named texts), `phases` ([{name, seconds}]) and, under any other name, a model: its rows (base,
control, cfg, mclr), gap_closed, sweep, compute and grids. The page names what the tour lacks.
"""

import sys
from pathlib import Path

from mclr.train.studies.report import load_results, markdown_table, write_report
from mclr.train.system.console import Parser, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "mclr report",
        description="Make TOUR/report.html and TOUR/figures from TOUR/results.json.\n"
        "A single training run has no report: `mclr evaluate RUN` scores it.",
        epilog="example: mclr report runs/tour --markdown",
    )
    parser.add_argument("tour", type=Path, metavar="TOUR", help="folder of `make tour`, with results.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for page and figures/ (default: TOUR)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown and write nothing")
    args = parser.parse_args(argv)
    results = load_results(args.tour)
    print(markdown_table(results) if args.markdown else write_report(results, args.tour, args.out or args.tour))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
