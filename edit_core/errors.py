"""Errors that a user can cause and mend: each message is one sentence that says what was found and what to do."""

from collections.abc import Iterable

__all__ = [
    "EDiTConfigError",
    "EDiTError",
    "EDiTModelError",
    "EDiTResultError",
    "EDiTWeightsError",
    "quoted",
    "said",
    "shown",
]

_SHOWN = 60  # characters


class EDiTError(ValueError):
    """A mistake that the user can mend. The message is complete: no traceback is needed to act on it."""


def quoted(text: str) -> str:
    """A text as an error shows it: in quotes, on one line, and cut where it is long."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


class EDiTConfigError(EDiTError):
    """A field of :class:`edit_core.EDiTConfig` has a wrong name or value."""


class EDiTModelError(EDiTError):
    """A base model is not one that EDiT knows, or cannot be used as asked."""


class EDiTResultError(EDiTError):
    """A fast path's output is not its specification's: no mistake of the user's."""


class EDiTWeightsError(EDiTError):
    """An EDiT weights file is unreadable, incomplete, or made for another base."""


def said(error: BaseException | str) -> str:
    """What another library's error says, in one line, without what a file may have put into it."""
    text = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300]) + (
        "..." if len(text) > 300 else ""
    )


def shown(names: Iterable[str], most: int = 5) -> str:
    """Names out of a file, for a sentence: a few, each of one short line, whatever they hold."""
    chosen = list(names)
    parts = [name if name.isprintable() and len(name) <= 120 else f"{name[:120]!r}" for name in chosen[:most]]
    return ", ".join(parts) + (", ..." if len(chosen) > most else "")
