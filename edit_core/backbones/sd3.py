"""Stable Diffusion 3-Medium and 3.5-Large (MMDiT): SD3.5-Medium's blocks, none of which has an `attn2`.

Only SD3.5-Large norms queries and keys; with its norms absent both hosts hand on none.
"""

from __future__ import annotations

from .base import Real
from .sd35_medium import SD35Medium


class SD3(SD35Medium):
    name = "sd3"
    title = "Stable Diffusion 3-Medium or 3.5-Large"
    sites = ("joint",)
    layer = "joint attention of one block"
    # SD3.5-Large's; the graphs are not counted, but SD3.5-Medium's, less its attn2 in 13 of 24 blocks.
    real = Real(38, 2432, 38, prompt_tokens=77 + 256, attention_graph=44, block_graph=61, like_most=2)
    dual = 0


BACKBONE = SD3()
