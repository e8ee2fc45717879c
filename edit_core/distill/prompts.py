"""What a pipeline does to a caption before its text encoders see it: cleaning, and cutting off."""

from __future__ import annotations

from typing import Any

from ..backbones import Backbone

__all__ = ["cleans_captions", "limits_passed"]


def cleans_captions() -> bool:
    """Whether PixArt's `clean_caption` does anything here: without ftfy and bs4 its pipeline warns, and leaves it."""
    from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

    return bool(is_bs4_available() and is_ftfy_available())


def limits_passed(pipeline: Any, backbone: Backbone, caption: str, cleans: bool) -> list[str]:
    """The limits that a caption has more tokens than, so that its end is not read.

    Args:
        pipeline: with its tokenizers.
        backbone: what it draws with.
        caption: as it was written.
        cleans: whether `clean_caption` is on.
    """
    if backbone.cleans:
        (caption,) = pipeline._text_preprocessing(caption, clean_caption=cleans)
    found = dict.fromkeys(
        name
        for tokenizer, (name, most) in backbone.limits.items()
        if len(getattr(pipeline, tokenizer)(caption, truncation=False).input_ids) > most
    )
    return list(found)
