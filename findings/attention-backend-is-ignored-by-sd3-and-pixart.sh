#!/usr/bin/env bash
# diffusers 0.42.1 (newest), torch 2.13.0. transformer.set_attention_backend("_native_math") and
# `with attention_backend("_native_math")` are documented as ModelMixin's, for every model. SD3's and
# PixArt's processors call torch's scaled_dot_product_attention directly and have no
# _attention_backend, so both are accepted and change nothing: no error, and the only thing logged
# is that backends are experimental. A comparison of backends (sage, flash, flex, ...) on SD3.5 or
# PixArt compares one kernel with itself. Flux, in the same library, obeys.
# One would have guessed: a setter that cannot set anything raises, as it does for a wrong name.
# Seen: modules of which the backend was set, attention calls that reached it
#   SD3 0 of 3, 0;  PixArt 0 of 4, 0;  Flux 2 of 2, 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy==2.4.6
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

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

torch.manual_seed(1)
sd3_in = dict(hidden_states=torch.randn(1, 4, 16, 16), encoder_hidden_states=torch.randn(1, 8, 32),
              pooled_projections=torch.randn(1, 16), timestep=torch.tensor([500.0]))

torch.manual_seed(1)
pix_in = dict(hidden_states=torch.randn(1, 4, 16, 16), encoder_hidden_states=torch.randn(1, 8, 32),
              timestep=torch.tensor([500]))

def rel(a, b):
    return ((a - b).norm() / b.norm()).item()

@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample

torch.manual_seed(0)
flux = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
    axes_dims_rope=[4, 4, 8]).eval()
flux_in = dict(hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 8, 32),
               pooled_projections=torch.randn(1, 16), timestep=torch.tensor([0.5]),
               img_ids=torch.rand(16, 3), txt_ids=torch.zeros(8, 3))

# count what arrives at a backend other than the default one
target = AttentionBackendName._NATIVE_MATH
registry = attention_dispatch._AttentionBackendRegistry
original, calls = registry._backends[target], []

def counted(*args, **kwargs):
    calls.append(1)
    return original(*args, **kwargs)

registry._backends[target] = counted
seen = {}
for name, model, inputs in (("SD3", sd3(), sd3_in), ("PixArt", pixart(), pix_in),
                            ("Flux", flux, flux_in)):
    with attention_backend(target.value):
        calls.clear()
        run(model, inputs)
        in_context = len(calls)
    model.set_attention_backend(target.value)  # never complains
    calls.clear()
    run(model, inputs)
    procs = list(model.attn_processors.values())
    was_set = sum(getattr(p, "_attention_backend", None) is not None for p in procs)
    seen[name] = (was_set, len(procs), len(calls), in_context)
    print(f"{name}: set on {was_set} of {len(procs)} processors; calls that reached the backend: "
          f"{len(calls)} after the setter, {in_context} in the context")
    try:
        model.set_attention_backend("no_such_backend")
        raise AssertionError("a wrong name was accepted")
    except ValueError:
        pass

assert seen["Flux"] == (2, 2, 2, 2), seen
assert seen["SD3"] == (0, 3, 0, 0), seen
assert seen["PixArt"] == (0, 4, 0, 0), seen
PY
