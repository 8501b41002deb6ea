"""`mclr evaluate`: compares samples with real images, in the features of a network, the judge."""

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

Samples are a folder made by `mclr sample`, any folder of images (accuracy and class-wise FD need names like NAME-CONDITION.png), or an
.npz file (arr_0: uint8 NHWC; arr_1: conditions, if known). A run is sampled first into RUN/samples, with its own settings: for each
range as many images as the reference has, at most 50,000. The reference is a data preset, a dataset folder, a folder of images, or
an .npz file of images or of mu and sigma. Its statistics are kept in ~/.cache/mclr (or below $XDG_CACHE_HOME).
Judges: dinov2 (fd is FD_DINOv2), inception (fd is FID), or a classifier; `mclr prepare classifier` makes one for your own data.
The scores go to evaluation.json in the folder (evaluation-dinov2.json, evaluation-inception.json), or beside NAME.npz.
The scores of a run also go into the model card of its weights, RUN/weights/README.md."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mclr evaluate", description="Score samples.", epilog=EXAMPLE)
    add = parser.add_argument
    add("source", type=Path, metavar="SAMPLES_OR_RUN", help="a folder of samples, an .npz file, or a finished run")
    add("--reference", metavar="R", help="real images, or their statistics (default: the data of the model)")
    add("--real", choices=SPLITS, default="all", help="split of a reference that is a dataset (default: train and val together)")
    add("--judge", metavar="J", help="dinov2, inception, or the weights of a classifier (default: the bundled DATA-classifier)")
    add("--judge-weights", type=Path, metavar="FILE", help="published state dict of dinov2 or inception")
    add("--ranges", type=int, default=1, metavar="K", help="score K disjoint ranges of seeds, and the minimum of fd (default: 1)")
    add("--icr", action="store_true", help="also the memorisation monitor: the invariant contamination ratio of a diffusion run")
    evaluate(Request(**vars(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
