"""Everything that decides a run, as one object."""

from typing import Annotated

from pydantic import Field

from mclr.configs.schema.data import Data
from mclr.configs.schema.engine import Engine
from mclr.configs.schema.model import DiffusionModel, NextScaleModel
from mclr.configs.schema.objective import Objective
from mclr.configs.schema.sample import Sample
from mclr.configs.schema.section import Section
from mclr.configs.schema.train import Train


class RunConfig(Section):
    """Everything that decides a run. Made by load(), from_dict() or load_resolved(): they resolve what depends on other keys."""

    model: Annotated[DiffusionModel | NextScaleModel, Field(discriminator="paradigm")]
    data: Data
    objective: Objective
    train: Train
    engine: Engine = Engine()
    sample: Sample = Sample()
