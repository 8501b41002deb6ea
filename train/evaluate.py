"""`mclr evaluate`: scores samples against a reference, in the features of a network that acts as judge.

N real and M fake images; C H W image.
"""

import sys
from pathlib import Path

from mclr.train.scoring.evaluation import Request, evaluate
from mclr.train.scoring.statistics import SPLITS
from mclr.train.system.console import Parser, run

EXAMPLE = """examples:
  mclr evaluate samples/mine --reference digits --judge digits-classifier
  mclr evaluate runs/mine
  mclr evaluate runs/mine --icr
  mclr evaluate runs/mine --reference PHOTOS --judge dinov2 --ranges 3
  mclr evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --judge inception --judge-weights FILE

Samples are a folder made by `mclr sample`, any folder of PNG files (accuracy and class-wise FD need names NAME-CONDITION.png), or an
.npz file (arr_0: uint8 NHWC; arr_1: conditions, where known). A run is sampled first into RUN/samples, by its own settings: as many
images as the reference has, at most 50,000, for each range. The reference is a data preset, a dataset folder, a folder of images, or
an .npz file of images or of mu and sigma. What a judge saw of it is kept in ~/.cache/mclr (or below $XDG_CACHE_HOME).
Judges: dinov2 (fd is FD_DINOv2), inception (fd is FID), or a classifier, which for your own data comes from `mclr prepare classifier`.
The scores go to evaluation.json in the folder (evaluation-dinov2.json, evaluation-inception.json), or beside NAME.npz;
those of a run also into its weights' model card, RUN/weights/README.md."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mclr evaluate", description="Score samples.", epilog=EXAMPLE)
    parser.add_argument(
        "source", type=Path, metavar="SAMPLES_OR_RUN", help="a folder of samples, an .npz file, or a finished run"
    )
    parser.add_argument(
        "--reference", metavar="R", help="real images, or their statistics (default: the data that the model was for)"
    )
    parser.add_argument(
        "--real", choices=SPLITS, default="all", help="split of a reference that is a dataset (default: train and val together)"
    )
    parser.add_argument(
        "--judge", metavar="J", help="dinov2, inception, or a classifier's weights (default: the bundled DATA-classifier)"
    )
    parser.add_argument("--judge-weights", type=Path, metavar="FILE", help="published state dict of dinov2 or inception")
    parser.add_argument(
        "--ranges", type=int, default=1, metavar="K", help="score K disjoint ranges of seeds, and the minimum of fd (default: 1)"
    )
    parser.add_argument(
        "--icr", action="store_true", help="also the invariant contamination ratio of a diffusion run, the memorisation monitor"
    )
    evaluate(Request(**vars(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
