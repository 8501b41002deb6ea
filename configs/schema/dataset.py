"""What dataset.json says of a folder made by `mclr prepare`."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from mclr.configs.schema.data import Images
from mclr.configs.schema.section import Section, Whole
from mclr.errors import UserError

DATASET = "dataset.json"
UNFINISHED = "preparing.json"  # in place of DATASET until all shards are there


class Shard(Section):
    """A tar file of samples. file: relative to the folder, like train/000000.tar."""

    file: str = Field(pattern=r"^\w+/\d+\.tar$")
    count: Whole
    bytes: Whole
    sha256: str


class Split(Section):
    """The samples of train or val."""

    count: Whole
    shards: tuple[Shard, ...]


class DatasetInfo(Images):
    """A dataset folder. source: where the images come from; seed: of the split into train and val.

    Where a network made the images, drawn holds its settings. Where it was a token model, tokens is the checksum of their tokens, which
    lie beside the shards in shard order.
    """

    path: Path = Path()
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    source: str
    seed: int
    drawn: dict[str, Any] | None = None
    tokens: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if {"train", "val"} - self.splits.keys():
            raise ValueError("splits must be train and val")
        for name, split in self.splits.items():
            if (counts := sum(shard.count for shard in split.shards)) != split.count:
                raise ValueError(f"split {name} counts {split.count} samples, its shards {counts}")
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, class_names are {len(self.class_names)}")
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.resolution, self.resolution

    @property
    def shards(self) -> list[Shard]:
        """Those of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]


def read_dataset(folder: Path) -> DatasetInfo:
    """What dataset.json says. Raises UserError where there is none, or it contradicts itself."""
    file = folder / DATASET
    try:
        if not folder.is_dir():
            raise UserError(f"no dataset folder at {folder}: make one with `mclr prepare`")
        if not file.is_file():
            if (folder / UNFINISHED).is_file():
                raise UserError(f"{folder} is not finished: run its `mclr prepare` command again")
            make = f"`mclr prepare images {folder} OUT --resolution N`"
            raise UserError(f"{folder} holds no {DATASET}: if it holds your images, run {make} and give OUT")
        return DatasetInfo.model_validate_json(file.read_bytes()).model_copy(update={"path": folder})
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): make it readable") from error
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])
        raise UserError(f"{file} does not describe a dataset ({what}): prepare the dataset again") from error
