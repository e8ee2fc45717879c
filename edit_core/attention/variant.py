"""What a name in a config stands for: one class per name, which says what it reads of the config."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = ["Variant", "named"]


class Variant:
    """One of the names that a field of :class:`~edit_core.EDiTConfig` can hold."""

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    """The config's fields that have a meaning because of it."""

    def __init__(self, config: EDiTConfig) -> None:
        self.config = config


V = TypeVar("V", bound=Variant)


def named(*variants: type[V]) -> dict[str, type[V]]:
    """A field's variants by their names, in the order in which they are offered."""
    return {variant.name: variant for variant in variants}
