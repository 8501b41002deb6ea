"""What all sections are made of: their base class, and the ranges that several settings share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=2**16)]  # of images and layers
Blocks = Annotated[int, Field(gt=0, le=100)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
EMAStd = Annotated[float, Field(ge=0.01, le=0.25)]
# A list in YAML, a tuple here: configs are constants.
Sizes = Annotated[tuple[Size, ...], Field(strict=False, min_length=1, max_length=16)]
MaybeSizes = Annotated[tuple[Size, ...], Field(strict=False)]


class Section(BaseModel):
    """A group of settings. A ValueError of its validator starts with the name of one of its keys: the message gets the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
