"""The data section: where the images are and what they look like."""

from typing import Literal

from mclr.configs.schema.section import Fraction, Section, Size, setting

LABEL = r"^[a-z0-9_]+(\.[^.]+)*$"


def is_stream(path: str) -> bool:
    """Whether a path names shards as webdataset writes them: https://..., pipe:COMMAND, or data/{000..099}.tar."""
    return "://" in path or path.startswith(("pipe:", "file:")) or path.endswith(".tar")


class Images(Section):
    """What all images of a dataset have in common."""

    name: str = setting(..., "Name in logs and model cards")
    resolution: Size = setting(..., "Side of the square images, in pixels")
    channels: Literal[1, 3] = setting(..., "1: grey, 3: RGB")
    num_classes: int = setting(..., "Number of conditions, without the null condition", gt=0, le=2**20)


class Data(Images):
    """The images of a run."""

    path: str = setting(..., "Folder made by `mclr prepare`; or shards to stream: https://..., pipe:COMMAND, data/{000..099}.tar")
    flip: bool = setting(False, "Mirror half of the images, at random")
    balanced: bool = setting(False, "Draw every condition equally often; else every image")
    label: str = setting("cls", "Streams: ending of the condition's file, or json.NAME for an entry of the .json", pattern=LABEL)
    damaged: Fraction = setting(0.001, "Largest share of unreadable images that training passes over; more end the run")

    @property
    def streamed(self) -> bool:
        """Whether `path` names shards to stream (train/data/stream.py)."""
        return is_stream(self.path)
