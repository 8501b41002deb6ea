"""The settings of a run: their types, ranges and meanings, and how presets and overrides become one RunConfig.

A preset (configs/<kind>/<name>.yaml, or any YAML file) is a part of a RunConfig: sections with some of their keys. `base: NAME` names
the file that it changes: a recipe (configs/<kind>/recipes), a preset, or a YAML file. Presets are merged key by key, in this order:
defaults, engine, data, model, objective, overrides. So a model preset can hold a recipe of its own, and a model preset selects the
paradigm. Each section has a file. load.py reads, checks.py tells which settings go together, messages.py writes the errors.
"""

from mclr.configs.schema.config import RunConfig, flatten
from mclr.configs.schema.data import Data, Images, is_stream
from mclr.configs.schema.dataset import DATASET, UNFINISHED, DatasetInfo, Shard, read_dataset
from mclr.configs.schema.engine import Engine
from mclr.configs.schema.load import FILE, PRESETS, dump, from_dict, load, load_data, load_resolved, read_preset
from mclr.configs.schema.model import VAE_FACTOR, DiffusionModel, NextScaleModel, fits, kind_of_model, net_section
from mclr.configs.schema.objective import Objective, Schedule
from mclr.configs.schema.sample import Sample
from mclr.configs.schema.section import Section
from mclr.configs.schema.train import Train
