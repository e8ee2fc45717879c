"""Tiny but whole pipelines of all backbones, built offline and saved as diffusers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from edit_core.distill.cache import build_cache
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.sources import FolderSource

from . import comfy, models
from .models import randomise

T5_WIDTH = 64
WORDS = "a photograph of a red fox in the snow an old oil painting of two ships at sea portrait with a green hat"


def build(backbone: str, folder: Path, seed: int = 0, for_comfyui: bool = False) -> Path:
    """Saves a pipeline that `DiffusionPipeline.from_pretrained(folder, local_files_only=True)` loads and that draws.

    PixArt: VAE of 4 channels, T5. Stable Diffusion 3: VAE of 16 channels with a shift, two CLIPs and a T5. The
    VAEs make one latent cell of 8x8 pixels; the text encoders are 16, 32 and 64 wide. With `for_comfyui` the
    transformer is one that ComfyUI recognises too, and the text encoders give embeddings as wide as the real ones.
    """
    torch.manual_seed(seed)
    t5_width, projection = (4096, 1024) if for_comfyui else (T5_WIDTH, 16)
    if for_comfyui:
        transformer: Any = comfy.base_model(backbone)
    elif backbone.startswith("pixart"):
        transformer = models.make(backbone, seed=seed, caption=T5_WIDTH)
    else:
        transformer = models.make(backbone, seed=seed, context=T5_WIDTH, pooled=32)
    if backbone.startswith("pixart"):
        pipeline_class: Any = PixArtAlphaPipeline if backbone == "pixart_alpha" else PixArtSigmaPipeline
        pipeline: Any = pipeline_class(
            tokenizer=t5_tokenizer(),
            text_encoder=t5(t5_width),
            vae=vae(4, scaling_factor=0.13025),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
        )
    else:
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip(16, "quick_gelu", projection),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip(32, "gelu", projection),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5(t5_width),
            tokenizer_3=t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def vae(channels: int, **kwargs: Any) -> Any:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=64,
        **kwargs,
    )
    randomise(model, channels)
    return model.eval()


def t5(width: int = T5_WIDTH) -> Any:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def clip(width: int, activation: str, projection: int = 16) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=projection, hidden_act=activation, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def t5_tokenizer() -> Any:
    """A unigram vocabulary in T5's order: padding, end, unknown, pieces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz,.0123456789"]
    pieces += [(f"▁{word}", -5.0) for word in sorted(set(WORDS.split()))]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def clip_tokenizer() -> Any:
    """Byte-level BPE whose words end in `</w>`, with CLIP's 77 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "n"), ("an", "d</w>"), ("t", "h"), ("th", "e</w>"), ("i", "n</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def build_cache_in_child(folder: Path, images: Path, output: Path, **kwargs: Any) -> None:
    """For a process of its own: caches a folder of images, and says with its exit status how that went."""
    torch.set_num_threads(1)
    encoder = PipelineEncoder(folder, torch.device("cpu"), torch.float32)
    try:
        report = build_cache(FolderSource(images), encoder, output, **kwargs)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(report)
