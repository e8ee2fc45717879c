"""The nodes on a backbone of one file, inside a real ComfyUI process: `python made_up.py CHECKOUT BASE_DIRECTORY PACK
FILES`, where the pack is a copy with that file; `test_third_backbone.py` starts it.
"""

from __future__ import annotations

from typing import Any

from host import load, main, run  # first, since it readies ComfyUI to be imported
import inside_piecewise


def check_the_made_up_one_in_all_nodes(b: str) -> Any:
    made = run("EDiTInit", model=load(b), compression=4, layers="all")
    assert made.backbone == b, made.backbone
    return inside_piecewise.check_the_nodes_that_take_a_model(b)


main(globals(), ("made_up",))
