"""The composition matrix inside a real ComfyUI process, but for its slow cells: see `test_matrix_comfyui.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

from host import SHIPPED, main  # first, since it readies ComfyUI to be imported
import matrix_loras
import matrix_memory
import matrix_saving
import matrix_sampling
from matrix_host import composes, leaves_alone, stock
from matrix_nodes import ROWS, Row

import comfyui_version


def beside_a_stock_node(row: Row, b: str) -> dict[str, Any]:
    if parsed(comfyui_version.__version__) < parsed(row.needs):
        return {"not in this ComfyUI": row.node}
    check = composes if b in row.reaches else leaves_alone
    if not row.reaches or b in row.reaches or row.node.startswith("SkipLayer"):
        return check(b, lambda model: stock(row.node, row.file, model=model, **row.inputs), **row.how)
    return {"not for this model": row.node}


def parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


assert set(SHIPPED) >= {b for row in ROWS.values() for b in row.reaches}

main(
    {f"check_beside_{name}": partial(beside_a_stock_node, row) for name, row in ROWS.items()}
    | vars(matrix_loras)
    | vars(matrix_sampling)
    | vars(matrix_memory)
    | vars(matrix_saving)
)
