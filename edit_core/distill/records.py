"""What a cache's own JSON files must hold before anything relies on them: they may be damaged, or another's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import EDiTError, said, shown

__all__ = ["Manifest", "Record", "check"]

Natural = Annotated[int, Field(ge=0)]
ShardFile = Annotated[str, Field(pattern=r"^[0-9]{1,6}/[0-9]{1,6}x[0-9]{1,6}/[0-9A-Za-z_-]{1,100}\.tar$")]
"""Below the cache's folder, and nowhere else."""


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class EmptyPrompt(Strict):
    bytes: Natural
    sha256: str


class Shard(Strict):
    file: ShardFile
    samples: Natural
    bytes: Natural
    sha256: str


class Manifest(Strict):
    """Of `manifest.json`, what is read."""

    backbone: str
    dtype: str
    encoder: Any
    resolutions: list[int]
    empty_prompt: EmptyPrompt
    shards: list[Shard]


class Record(Strict):
    """Of a shard's `.json`, what is read."""

    samples: Natural
    sha256: str
    keys: list[str]
    places: list[Annotated[list[Natural], Field(min_length=2, max_length=2)]]


def check(kind: type[BaseModel], data: Any, source: str) -> None:
    """Compares what a JSON file holds with what it must.

    Args:
        kind: one of the above.
        data: the file's content.
        source: what to call the file in an error.

    Raises:
        EDiTError: a field is missing or wrong; names it.
    """
    try:
        kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = shown([".".join(map(str, first["loc"]))]) or "the file"
        raise EDiTError(f"{source} is damaged: {place}: {said(first['msg'])}") from None
