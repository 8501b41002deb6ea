"""What all sections share: their base class, the declaration of a setting, common types."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mclr.models.options import Dropout as Dropout
from mclr.models.options import Fraction as Fraction
from mclr.models.options import NotNegative as NotNegative
from mclr.models.options import Positive as Positive
from mclr.models.options import Size as Size
from mclr.models.options import Within

Whole = Annotated[int, Within(ge=0)]
Count = Annotated[int, Within(gt=0)]


class Section(BaseModel):
    """A group of settings; a section cannot be changed once it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """Declare a setting: its default (...: required), its meaning for configs/README.md, and pydantic's limits."""
    return Field(default, description=meaning, **limits)
