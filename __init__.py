"""EDiT for ComfyUI: linear attention for PixArt-Σ and Stable Diffusion 3.5-Medium."""

from .nodes import comfy_entrypoint

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./web"
