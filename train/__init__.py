"""Programs: training, sampling, evaluation, reports, data preparation."""

import os
import sys

# Before torch is imported: threads that wait for each other spin only briefly, then sleep (GNU OpenMP, torch's on Linux). Two trainings
# of edm2-digits at once on two cores reach 305 images/s each, 122 with the default's long spin; one alone is as fast either way.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if __name__ == "train":
    # `python -m train.X` in a checkout: go on under the one name that every file has
    import mclr.train

    sys.modules["train"] = mclr.train
