"""The data section: where the images are and what they look like."""

from typing import Annotated, Literal

from pydantic import Field

from mclr.configs.schema.section import Fraction, Section, Size


def is_stream(path: str) -> bool:
    """Whether a path names shards in webdataset's notation: https://..., pipe:COMMAND, or data/{000..099}.tar."""
    return "://" in path or path.startswith(("pipe:", "file:")) or path.endswith(".tar")


class Data(Section):
    name: str
    path: str  # folder with dataset.json; or shards to stream, as is_stream() knows them
    resolution: Size
    channels: Literal[1, 3]
    num_classes: Annotated[int, Field(gt=0, le=2**20)]
    flip: bool = False
    balanced: bool = False  # every condition equally often; else every sample
    # of a stream: the file kind that holds the condition, as in cls; or json.NAME, an entry of the .json
    label: Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[^.]+)*$")] = "cls"
    damaged: Fraction = 0.001  # largest share of unreadable samples that training passes over

    @property
    def streamed(self) -> bool:
        """Whether path names shards to stream (train/data/stream.py), and no folder."""
        return is_stream(self.path)
