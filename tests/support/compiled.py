"""Compiles the kernels for GPUs that are not there: a process of its own, since it stands in for Triton's driver."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from edit_core.bench.kernels import WIDTHS
from edit_core.kernels.conv_fusion import conv_fusion
from edit_core.kernels.depthwise import depthwise
from edit_core.kernels.read import Local, read
from edit_core.kernels.state import state


class Driver:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int, dtype: torch.dtype, backbone: str) -> list[dict[str, Any]]:
    """Of each kernel at a real model's width, its name, shared memory, and bytes of registers spilled to the stack."""
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        stack = int(usage.partition("STACK:")[2].split()[0])
        found.append({"name": self.__name__, "shared": kernel.metadata.shared, "stack": stack})

    driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    channels, heads = WIDTHS[backbone]
    d, hidden, grid = channels // heads, channels // 4, (64, 64)
    q, k, v = torch.empty(2, 4096, 3 * channels, dtype=dtype).chunk(3, -1)
    weight, bias = torch.empty(channels, 1, 3, 3, dtype=dtype), torch.empty(channels, dtype=dtype)
    state(k, v, heads, "squared_relu")
    of_keys = torch.empty(2, heads, d, d + 1)
    read(q, of_keys, "squared_relu", 1e-6, dtype)
    read(q, of_keys, "squared_relu", 1e-6, dtype, torch.empty_like(q), 0.9, Local(v, weight, bias, grid))
    depthwise(k, grid, weight, bias, 2)
    norm, up = torch.empty(hidden, dtype=dtype), torch.empty(channels, hidden, dtype=dtype)
    conv_fusion(torch.empty(2, 4096, hidden, dtype=dtype), q, norm, norm, 32, 1e-5, up, bias)
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3])))
