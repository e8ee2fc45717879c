"""The models that `make_workflows.py` writes workflows of, with their files and where these are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edit_core.world.files import shipped

HF = "https://huggingface.co"
FLUX_TEXT = f"{HF}/comfyanonymous/flux_text_encoders/resolve/main"
SD35_TEXT = f"{HF}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/text_encoders"
SD35_RELEASE = f"{HF}/stabilityai/stable-diffusion-3.5-medium/resolve/main"
SD35_LARGE_RELEASE = f"{HF}/stabilityai/stable-diffusion-3.5-large/resolve/main"
PIXART_RELEASE = f"{HF}/PixArt-alpha/PixArt-Sigma-XL-2-1024-MS/resolve/main/transformer"
PIXART_ALPHA_RELEASE = f"{HF}/PixArt-alpha/PixArt-XL-2-1024-MS/resolve/main/transformer"
TURBO_RELEASE = f"{HF}/tensorart/stable-diffusion-3.5-medium-turbo/resolve/main"
CONTROLNET_RELEASE = f"{HF}/tensorart/SD3.5M-Controlnet-Canny/resolve/main"

PROMPT = (
    "A red fox asleep on a mossy stone in a misty pine forest, soft morning light between the trees, "
    "dew on the fur, shallow depth of field, detailed photograph"
)
NEGATIVE = "blurry, low quality, deformed, watermark, text"
SMALL_PROMPT = (
    "a large green bar in the top left, at the middle left a large red circle, over grey rows, "
    "the right half mirrors the left"
)


@dataclass(frozen=True)
class Model:
    """What differs between the base models."""

    name: str
    title: str
    file: str
    source: str
    text_loader: str
    text_inputs: dict[str, str]
    text_files: dict[str, str]
    vae: str
    vae_source: str
    latent: str
    sampling: dict[str, Any]
    blocks: int
    edit_file: str = ""
    """Weights of a student of it; none are published for the real models."""
    sized: bool = False
    """Whether its prompts also say how large the picture is."""
    shift: float | None = None
    lora: str = ""
    lora_source: str = ""
    control: str = ""
    control_source: str = ""
    prompt: str = PROMPT
    negative: str = NEGATIVE
    side: int = 1024
    kinds: tuple[str, ...] = ("", "_edit", "_ab", "_ab_2048", "_4096", "_calibrate", "_benchmark")
    calibration_steps: int = 200
    timed_sizes: str = "512, 1024, 2048"


def small_model(backbone: str, title: str, latent: str, sampler: str, scheduler: str) -> Model:
    """One of the small models that come with the pack, with the sampler that it was judged with."""
    return Model(
        name=f"small_world_{backbone}",
        title=f"small {title}",
        file=shipped("diffusion_models", backbone).name,
        source="",
        text_loader="EDiTSmallWorldText",
        text_inputs={"backbone": backbone},
        text_files={},
        vae=shipped("vae", backbone).name,
        vae_source="",
        latent=latent,
        sampling={"steps": 16, "cfg": 3.0, "sampler_name": sampler, "scheduler": scheduler, "denoise": 1.0},
        edit_file=shipped("edit", backbone).name,
        blocks={"pixart_sigma": 6, "sd35_medium": 3}[backbone],
        prompt=SMALL_PROMPT,
        negative="",
        side=272,
        kinds=("_ab", "_calibrate", "_benchmark"),
        calibration_steps=100,
        timed_sizes="288, 512, 1024",
    )


PIXART_PARTS: dict[str, Any] = {
    "text_loader": "CLIPLoader",
    "text_inputs": {"clip_name": "t5xxl_fp16.safetensors", "type": "pixart", "device": "default"},
    "text_files": {"t5xxl_fp16.safetensors": f"{FLUX_TEXT}/t5xxl_fp16.safetensors"},
    "latent": "EmptyLatentImage",
    # The solver, spacing, steps and guidance of the models' own pipelines.
    "sampling": {"steps": 20, "cfg": 4.5, "sampler_name": "dpmpp_2m", "scheduler": "normal", "denoise": 1.0},
}
"""What both PixArts have in common."""

SD35_PARTS: dict[str, Any] = {
    "text_loader": "TripleCLIPLoader",
    "text_inputs": {
        "clip_name1": "clip_l.safetensors",
        "clip_name2": "clip_g.safetensors",
        "clip_name3": "t5xxl_fp8_e4m3fn.safetensors",
    },
    "text_files": {
        name: f"{SD35_TEXT}/{name}"
        for name in ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp8_e4m3fn.safetensors")
    },
    "vae": "sd3.5_vae.safetensors",
    "vae_source": f"{SD35_RELEASE}/vae/diffusion_pytorch_model.safetensors",
    "latent": "EmptySD3LatentImage",
    "sampling": {"steps": 28, "cfg": 4.5, "sampler_name": "dpmpp_2m", "scheduler": "sgm_uniform", "denoise": 1.0},
    "shift": 3.0,
}
"""What Stable Diffusion 3.5's sizes have in common."""

MODELS = [
    Model(
        name="pixart_sigma",
        title="PixArt-Σ",
        file="PixArt-Sigma-XL-2-1024-MS.safetensors",
        source=f"{PIXART_RELEASE}/diffusion_pytorch_model.safetensors",
        **PIXART_PARTS,
        vae="sdxl_vae.safetensors",
        vae_source=f"{HF}/stabilityai/sdxl-vae/resolve/main/sdxl_vae.safetensors",
        blocks=28,
    ),
    Model(
        name="sd35_medium",
        title="Stable Diffusion 3.5 Medium",
        file="sd3.5_medium.safetensors",
        source=f"{SD35_RELEASE}/sd3.5_medium.safetensors",
        **SD35_PARTS,
        blocks=24,
        lora="lora_sd3.5m_turbo_8steps.safetensors",
        lora_source=f"{TURBO_RELEASE}/lora_sd3.5m_turbo_8steps.safetensors",
        control="sd35_medium_controlnet_canny.safetensors",
        control_source=f"{CONTROLNET_RELEASE}/diffusion_pytorch_model.safetensors",
        kinds=("", "_edit", "_ab", "_ab_2048", "_4096", "_calibrate", "_benchmark", "_lora_controlnet_slg"),
    ),
    Model(
        name="sd35_large",
        title="Stable Diffusion 3.5 Large",
        file="sd3.5_large.safetensors",
        source=f"{SD35_LARGE_RELEASE}/sd3.5_large.safetensors",
        **SD35_PARTS,
        blocks=38,
        kinds=("_edit", "_ab", "_ab_2048"),  # its positions end at 3072 pixels
    ),
    Model(
        name="pixart_alpha",
        title="PixArt-α",
        file="PixArt-XL-2-1024-MS.safetensors",
        source=f"{PIXART_ALPHA_RELEASE}/diffusion_pytorch_model.safetensors",
        **PIXART_PARTS,
        vae="vae-ft-ema-560000-ema-pruned.safetensors",
        vae_source=f"{HF}/stabilityai/sd-vae-ft-ema-original/resolve/main/vae-ft-ema-560000-ema-pruned.safetensors",
        blocks=28,
        sized=True,
        kinds=("_edit", "_ab", "_ab_2048", "_4096"),
    ),
    small_model("pixart_sigma", "PixArt-Σ", "EmptyLatentImage", "dpmpp_2m", "sgm_uniform"),
    small_model("sd35_medium", "Stable Diffusion 3.5-Medium", "EmptySD3LatentImage", "euler", "normal"),
]

KINDS = {
    "": "plain",
    "_edit": "fast, without training",
    "_ab": "as it is, and fast",
    "_ab_2048": "as it is, and fast, at 2048x2048",
    "_4096": "a picture of 4096x4096",
    "_calibrate": "train, look, draw, save",
    "_benchmark": "how much faster",
    "_lora_controlnet_slg": "fast, with LoRA, ControlNet and SkipLayerGuidance",
}
