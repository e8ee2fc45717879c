"""Triton kernels for NVIDIA devices, each used only where a measurement on this very device said that it wins.

Not run on a GPU yet: they are tested in Triton's interpreter, and compiled for sm_80 and sm_90, on a CPU. Until
`python -m edit_core.bench.kernels` has run on a device, everything there takes the eager path, and so does everything
without Triton, on other kinds of devices, under autocast, where a gradient is wanted (the kernels are for inference)
and while `torch.compile` traces: Inductor fuses the eager path by itself.

The parts that have a kernel:

- `linear`: linear attention's two passes (:mod:`.state` and :mod:`.read`), with the features of queries and keys, the
  share of the prompt's softmax rows and the local branch;
- `conv_fusion`: ConvFusion behind its 3x3 convolution (:mod:`.conv_fusion`);
- `depthwise`: SpatialCompressor, and the local branch where it is not part of `linear` (:mod:`.depthwise`).

This module imports without Triton; those with kernels do not.
"""

from .choice import PARTS, available, chosen, using

__all__ = ["PARTS", "available", "chosen", "using"]
