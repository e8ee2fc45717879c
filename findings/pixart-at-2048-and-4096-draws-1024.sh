#!/usr/bin/env bash
# diffusers 0.42.1 (newest), torch 2.13.0. PixArtSigmaPipeline(height=2048, width=2048) with a 1024-px
# transformer (sample_size 128, the released "1024-MS" one) runs the transformer on 4,096 tokens, not
# 16,384, at 4096 x 4096 on 4,096 too, decodes 1024 x 1024 and enlarges the picture by interpolation;
# asked for 640 x 640 it draws 1024 x 1024 and shrinks. The sizes that come back are those asked for.
# That is use_resolution_binning, True by default; nothing is logged. A measurement of speed or
# memory over picture sizes is flat, and an attention made for many tokens is never given many.
# output_type="latent" shows it: the latent does not grow.
# One would have guessed: tokens grow with the picture that is asked for.
# Seen: size asked -> tokens per forward, size returned
#   640 -> 4096, 640   1024 -> 4096, 1024   2048 -> 4096, 2048   4096 -> 4096 (latent 128 x 128)
#   2048 with use_resolution_binning=False -> 16384
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 numpy==2.4.6
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import torch
from diffusers import (AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline,
                       PixArtTransformer2DModel)

torch.manual_seed(0)
model = PixArtTransformer2DModel(
    sample_size=128, num_layers=1, num_attention_heads=1, attention_head_dim=8, in_channels=4,
    out_channels=8, patch_size=2, cross_attention_dim=8, caption_channels=8,
    num_embeds_ada_norm=1000, use_additional_conditions=False).eval()
vae = AutoencoderKL(latent_channels=4, block_out_channels=(4, 4, 4, 4), norm_num_groups=2,
                    layers_per_block=1, mid_block_add_attention=False,
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4).eval()
pipe = PixArtSigmaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=model,
                           scheduler=DPMSolverMultistepScheduler())
pipe.set_progress_bar_config(disable=True)
tokens = []
model.transformer_blocks[0].register_forward_pre_hook(lambda m, args: tokens.append(args[0].shape[1]))

def ask(side, kind, **kw):
    tokens.clear()
    out = pipe(prompt_embeds=torch.randn(1, 4, 8), prompt_attention_mask=torch.ones(1, 4),
               negative_prompt=None, guidance_scale=1.0, num_inference_steps=1, height=side,
               width=side, output_type=kind, **kw).images
    print(side, kw, "->", tokens, "tokens,", kind, tuple(out.shape[-2:]))
    return tokens[0], out.shape[-1]

assert ask(1024, "pt") == (4096, 1024)
assert ask(2048, "pt") == (4096, 2048), "2048 is now drawn at 2048"
assert ask(640, "pt") == (4096, 640)
assert ask(4096, "latent") == (4096, 128)
assert ask(2048, "latent", use_resolution_binning=False) == (16384, 256)
PY
