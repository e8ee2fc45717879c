"""What a pipeline does to a caption before its text encoders see it: cleaning, and cutting off."""

from __future__ import annotations

from typing import Any

__all__ = ["cleans_captions", "limits_passed"]

_LIMITS = {
    "pixart_sigma": {"tokenizer": ("T5's 300 tokens", 300)},
    "sd35_medium": {
        "tokenizer": ("CLIP's 77 tokens", 77),
        "tokenizer_2": ("CLIP's 77 tokens", 77),
        "tokenizer_3": ("T5's 256 tokens", 256),
    },
}
"""Tokens that `encode_prompt` keeps by default, those of a text's begin and end included."""


def cleans_captions() -> bool:
    """Whether PixArt-Σ's `clean_caption` does anything here: without ftfy and bs4 its pipeline warns, and leaves it."""
    from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

    return bool(is_bs4_available() and is_ftfy_available())


def limits_passed(pipeline: Any, backbone: str, caption: str, cleans: bool) -> list[str]:
    """The limits that a caption has more tokens than, so that its end is not read.

    Args:
        pipeline: PixArt-Σ's or SD3's.
        backbone: which of them.
        caption: as it was written.
        cleans: whether `clean_caption` is on.
    """
    if backbone == "pixart_sigma":
        (caption,) = pipeline._text_preprocessing(caption, clean_caption=cleans)
    found = dict.fromkeys(
        name
        for tokenizer, (name, most) in _LIMITS[backbone].items()
        if len(getattr(pipeline, tokenizer)(caption, truncation=False).input_ids) > most
    )
    return list(found)
