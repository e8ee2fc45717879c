"""The nodes: glue between ComfyUI and `edit_core`, and the only place that imports `comfy`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import EDiTApply, EDiTInit
from .files import EDiTLoadModel, EDiTLoadWeights, EDiTSaveWeights, register_model_folder

__all__ = ["comfy_entrypoint"]

NODES: list[type[io.ComfyNode]] = [EDiTLoadModel, EDiTLoadWeights, EDiTApply, EDiTInit, EDiTSaveWeights]


class EDiTExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> EDiTExtension:
    register_model_folder()
    return EDiTExtension()
