#!/usr/bin/env bash
# diffusers 0.42.1 (newest), torch 2.13.0. After each picture a pipeline clears its step caches,
# but only of transformers that are CacheMixin. SD3's and PixArt's are not, so
# apply_pyramid_attention_broadcast and apply_mag_cache, which are public and accept any
# transformer, keep their counters and their tensors from call to call. Where steps and interval
# do not divide, the same seed and prompt draw another picture the second time; where the range of
# timesteps reaches the first step, that step is made of the previous picture's attention or
# residuals. With even numbers of steps (10, interval 2) nothing is seen. Nothing is logged.
# One would have guessed: one call, one picture, whatever ran before, as with CacheMixin models.
# Seen, relative difference between two calls with the same seed:
#              10 steps   9 steps
#   PixArt PAB   0.000     0.015
#   PixArt Mag   0.000     0.083
#   SD3 PAB      0.000     0.002
#   SD3 Mag      0.000     0.009   (and 0.000 again after HookRegistry...reset_stateful_hooks())
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy==2.4.6 transformers==5.24.0
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import torch
from diffusers import (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler,
                       PixArtSigmaPipeline, PixArtTransformer2DModel, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from diffusers.hooks import (HookRegistry, MagCacheConfig, PyramidAttentionBroadcastConfig,
                             apply_mag_cache, apply_pyramid_attention_broadcast)

def sd3(layers=3, qk_norm="rms_norm", dual=()):
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=layers,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=16, pos_embed_max_size=16,
        qk_norm=qk_norm, dual_attention_layers=dual).eval()

def pixart(layers=2, sample_size=16):
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        sample_size=sample_size, num_layers=layers, num_attention_heads=4, attention_head_dim=16,
        in_channels=4, out_channels=8, patch_size=2, cross_attention_dim=64, caption_channels=32,
        num_embeds_ada_norm=1000, use_additional_conditions=False).eval()

def rel(a, b):
    return ((a - b).norm() / b.norm()).item()

@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample

def pipe_pixart(model):
    return PixArtSigmaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model,
                               scheduler=DPMSolverMultistepScheduler())

def pipe_sd3(model):
    return StableDiffusion3Pipeline(
        transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None)

def draw(pipe, seed, steps):
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(seed)
    words, pooled = torch.randn(2, 8, 32, generator=g), torch.randn(2, 16, generator=g)
    kw = dict(prompt_embeds=words[:1], negative_prompt_embeds=words[1:], guidance_scale=3.0,
              num_inference_steps=steps, height=128, width=128, output_type="latent", generator=g)
    if isinstance(pipe, PixArtSigmaPipeline):
        ones = torch.ones(1, 8)
        kw.update(negative_prompt=None, prompt_attention_mask=ones,
                  negative_prompt_attention_mask=ones, use_resolution_binning=False)
    else:
        kw.update(pooled_prompt_embeds=pooled[:1], negative_pooled_prompt_embeds=pooled[1:])
    return pipe(**kw).images

def cached(make_pipe, model, kind):
    if kind == "PAB":
        now = {}
        model.register_forward_pre_hook(
            lambda m, args, kw: now.update(t=float(kw["timestep"].flatten()[0])), with_kwargs=True)
        apply_pyramid_attention_broadcast(model, PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 1001),
            current_timestep_callback=lambda: now["t"]))
    else:
        apply_mag_cache(model, MagCacheConfig(threshold=0.5, max_skip_steps=2,
                                              num_inference_steps=10, mag_ratios=torch.ones(10)))
    return make_pipe(model)

seen = {}
for name, make_pipe, make in (("PixArt", pipe_pixart, pixart), ("SD3", pipe_sd3, sd3)):
    for kind in ("PAB", "Mag"):
        for steps in (10, 9):
            model = make()
            assert not hasattr(model, "_reset_stateful_cache")
            pipe = cached(make_pipe, model, kind)
            first, second = draw(pipe, 1, steps), draw(pipe, 1, steps)
            HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
            third = draw(pipe, 1, steps)
            seen[name, kind, steps] = rel(second, first)
            assert rel(third, first) < 1e-6, "a reset by hand gives the first picture again"
            print(name, kind, steps, "steps:", round(seen[name, kind, steps], 4))

for (name, kind, steps), d in seen.items():
    assert d < 1e-6 if steps == 10 else d > 1e-3, (name, kind, steps, d)
PY
