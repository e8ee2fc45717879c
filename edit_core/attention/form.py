"""What a form of attention has to say, and what those have in common whose queries and keys are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .call import ALL, Image, Projections, Sides
from .keys import KEYS
from .modules import LocalBranch, Parts
from .queries import QUERIES
from .variant import Variant

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = ["Form", "StudentForm"]


class Form(Variant, ABC):
    """What a student's attentions compute. One without parts has no side weights."""

    keeps_masks: ClassVar[bool] = False
    """Whether a self-attention honours masks of image tokens."""
    as_is: ClassVar[bool] = False
    """Whether it is near the base's own attention without any training, so that without parts it needs no weights."""

    @classmethod
    def check(cls, config: EDiTConfig) -> None:
        """Whether the config's other choices go with this form.

        Raises:
            EDiTConfigError: they do not.
        """

    @classmethod
    def parts(cls, config: EDiTConfig) -> Parts:
        """The side modules of an attention, by the names that weights files give them."""
        return {}

    @abstractmethod
    def self_rows(self, sides: Sides, image: Image) -> Tensor:
        """Attention of the image tokens to themselves, `(B, N, C)`; `sides` holds the parts."""

    @abstractmethod
    def joint_rows(
        self, sides: Sides, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Joint attention: image rows `(B, N, C)`, and prompt rows `(B, P, C)` if they are wanted."""


class StudentForm(Form):
    """A form whose queries and keys are trained: what the config's `query`, `key` and `local` make of the base's."""

    reads = frozenset({"query", "key", "local"})

    def __init__(self, config: EDiTConfig) -> None:
        super().__init__(config)
        self.query = QUERIES[config.query](config)
        self.key = KEYS[config.key](config)

    @classmethod
    def parts(cls, config: EDiTConfig) -> Parts:
        local: Parts = {"local": LocalBranch} if config.local else {}
        return {**QUERIES[config.query].parts, **KEYS[config.key].parts, **local}

    def features(self, sides: Sides, image: Image) -> Projections:
        """Queries `(B, N, C)`, keys and values `(B, M, C)`, normed but not yet rectified; `M` is `N` uncompressed."""
        keys, v = self.key.rows(sides, image)
        return Projections(self.query.rows(sides, image)(ALL), keys(ALL), v)

    def local(self, sides: Sides, image: Image) -> Tensor | None:
        """What the local branch gathers, if the config asks for one: `(B, N, C)`, its own memory."""
        return LocalBranch.rows(sides.local, image.base.v, image.grid) if self.config.local else None
