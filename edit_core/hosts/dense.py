"""Why a call keeps the host's own softmax attention: one answer for both hosts, each reason logged once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..attention import Grid

__all__ = ["DenseLog", "dense_reason"]

logger = logging.getLogger(__name__)


def dense_reason(
    grid: Grid | None,
    tokens: int,
    *,
    min_tokens: int = 0,
    masked: bool = False,
    pictured: bool = False,
    unknown: Sequence[str] = (),
    outside: tuple[float, float] | None = None,
) -> str | None:
    """Why an attention cannot be linear in this call, or is not to be; None where it can.

    Args:
        grid: of the call's latent; None where no call of the transformer is under way.
        tokens: how many image tokens the attention has.
        min_tokens: with fewer it is not to be.
        masked: whether image tokens are masked.
        pictured: whether there is an IP-Adapter's picture, and an attention underneath that sees it.
        unknown: names of arguments that are not known to leave attention as it is.
        outside: the range of the schedule, 0-1, in which it is to be, where the call lies outside of it.
    """
    if grid is None:
        return "an attention was called from outside its transformer"
    if masked:
        return "an attention mask on image tokens, which linear attention cannot honour"
    if pictured:
        return "an IP-Adapter's picture, which the attention that was there before EDiT sees"
    if unknown:
        return f"{' and '.join(unknown)} in the attention's call, which may change what it computes"
    if tokens != grid[0] * grid[1]:
        return f"{tokens} tokens do not fill the {grid[0]}x{grid[1]} grid of the latent"
    if tokens < min_tokens:
        return f"{tokens} tokens are fewer than min_tokens={min_tokens}"
    if outside is not None:
        return f"steps outside {outside[0]:g}-{outside[1]:g} of the schedule"
    return None


class DenseLog:
    """Logs why calls were not linear, once per reason; not from compiled graphs, which cannot log.

    Args:
        level: what the host shows its users without calling it a complaint.
    """

    def __init__(self, level: int = logging.WARNING) -> None:
        self._level = level
        self._said: set[str] = set()

    def note(self, reason: str | None) -> None:
        """Logs what :func:`dense_reason` gave, if that is a reason."""
        if reason is not None and not torch.compiler.is_compiling() and reason not in self._said:
            self._said.add(reason)
            logger.log(self._level, "EDiT: stays dense: %s", reason)
