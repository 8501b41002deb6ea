"""What a run is made of: the settings, their types and ranges, and how presets and overrides become one RunConfig.

A preset (configs/<kind>/<name>.yaml, or any YAML file) is a partial RunConfig: a mapping of sections; `base: NAME` beside them names
what it changes: a recipe (configs/<kind>/recipes, shared by presets and none itself), a preset, or a YAML file. They are merged key by key:
schema defaults < engine < data < model < objective < overrides. So a model preset carries its own recipe, and another paradigm is
another model preset. One file per section; load.py and what it reads; messages.py: what is wrong, in one line.
"""

from mclr.configs.schema.config import RunConfig
from mclr.configs.schema.data import Data, is_stream
from mclr.configs.schema.engine import Engine
from mclr.configs.schema.load import FILE, dump, flatten, from_dict, load, load_data, load_resolved
from mclr.configs.schema.model import (
    MODELS,
    VAE_FACTOR,
    DiffusionModel,
    DiffusionNet,
    NextScaleModel,
    NextScaleNet,
    Posterior,
)
from mclr.configs.schema.objective import Objective
from mclr.configs.schema.presets import PRESETS, read_preset
from mclr.configs.schema.sample import Sample
from mclr.configs.schema.schedule import Schedule
from mclr.configs.schema.section import Section
from mclr.configs.schema.train import Train
