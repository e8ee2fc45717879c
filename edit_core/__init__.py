"""EDiT and MM-EDiT: linear compressed attention for PixArt-Σ and Stable Diffusion 3.5-Medium (arXiv 2503.16726).

Knows nothing of ComfyUI; needs torch, safetensors and einops.
"""

from .attention import linear_attention
from .config import EDiTConfig
from .errors import EDiTConfigError, EDiTError, EDiTModelError, EDiTWeightsError
from .hosts.diffusers import EDiTHandle, apply_edit
from .weights import EDiTWeights

__version__ = "0.1.0"

__all__ = [
    "EDiTConfig",
    "EDiTConfigError",
    "EDiTError",
    "EDiTHandle",
    "EDiTModelError",
    "EDiTWeights",
    "EDiTWeightsError",
    "apply_edit",
    "linear_attention",
]
