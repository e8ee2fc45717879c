"""Text files of unknown origin: decoded by what they say of themselves, never by a guess."""

from __future__ import annotations

import codecs

__all__ = ["decode_text"]

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with UTF-16's mark, and so is looked for before it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(data: bytes) -> str:
    """The text of a file: in the encoding that its byte-order mark names, or in UTF-8 where there is none.

    Raises:
        ValueError: it is not text in that encoding; the message says what was found and what to do.
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        raise ValueError(f"byte {place} is not {encoding.upper()}; save it as UTF-8") from None
    if "\0" in text:  # as UTF-16 without a mark is in UTF-8, and many a file that is no text
        raise ValueError("it holds zero bytes, as UTF-16 without a byte-order mark does; save it as UTF-8")
    return text
