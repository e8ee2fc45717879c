"""The nodes: glue between ComfyUI and `edit_core`, and the only place that imports `comfy`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import EDiTApply, EDiTInit
from .benchmark import EDiTBenchmark
from .calibrate import EDiTCalibrate
from .compare import EDiTCompare
from .files import EDiTLoadModel, EDiTLoadWeights, EDiTSaveWeights, register_model_folder
from .renames import register_renames
from .report import EDiTLayerReport
from .small_world import EDiTSmallWorldText, register_small_world

__all__ = ["comfy_entrypoint"]

NODES: list[type[io.ComfyNode]] = [
    EDiTLoadModel, EDiTLoadWeights, EDiTApply, EDiTInit, EDiTCalibrate, EDiTSaveWeights, EDiTLayerReport,
    EDiTBenchmark, EDiTCompare, EDiTSmallWorldText,
]  # fmt: skip


class EDiTExtension(ComfyExtension):
    async def on_load(self) -> None:
        await register_renames(NODES)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> EDiTExtension:
    register_model_folder()
    register_small_world()
    return EDiTExtension()
