#!/usr/bin/env bash
# diffusers 0.42.1 (newest), torch 2.13.0. SD3.5 normalises queries and keys (qk_norm="rms_norm").
# Two of diffusers' own processors for the SD3 family do not:
#   - FusedJointAttnProcessor2_0, set by SD3Transformer2DModel.fuse_qkv_projections();
#   - PAGCFGJointAttnProcessor2_0 / PAGJointAttnProcessor2_0, set by StableDiffusion3PAGPipeline.
# norm_q, norm_k, norm_added_q and norm_added_k are never called, nothing is logged, and what
# comes out is another model. With SD3.0 (qk_norm=None) both are exact. (On SD3.5-Medium, which has
# dual attention besides, fusing ends in an AttributeError; SD3.5-Large just draws otherwise.)
# One would have guessed: fusing is the same arithmetic in one matmul; PAG's unperturbed two thirds
# of the batch are what the plain processor gives.
# Seen (norm weights as far from 1 as trained ones are):
#   SD3.0  fused / plain: 0.000 relative difference
#   SD3.5  fused / plain: 0.055
#   SD3.0  PAG's unperturbed part / plain: 0.000
#   SD3.5  PAG's unperturbed part / plain: 0.023 (PAG in one of three blocks)
#   norm_q calls per forward: plain 3, fused 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy==2.4.6
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import PAGCFGJointAttnProcessor2_0

def sd3(layers=3, qk_norm="rms_norm", dual=()):
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=layers,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=16, pos_embed_max_size=16,
        qk_norm=qk_norm, dual_attention_layers=dual).eval()

torch.manual_seed(1)
sd3_in = dict(hidden_states=torch.randn(1, 4, 16, 16), encoder_hidden_states=torch.randn(1, 8, 32),
              pooled_projections=torch.randn(1, 16), timestep=torch.tensor([500.0]))

def rel(a, b):
    return ((a - b).norm() / b.norm()).item()

@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample

def build(qk_norm):
    model = sd3(qk_norm=qk_norm)
    torch.manual_seed(2)
    for name, p in model.named_parameters():  # a trained norm's weights are not 1
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            p.data.copy_(2 + torch.rand_like(p))
    return model

def norm_calls(model):
    calls = []
    handles = [b.attn.norm_q.register_forward_hook(lambda *_: calls.append(1))
               for b in model.transformer_blocks]
    run(model, sd3_in)
    for h in handles:
        h.remove()
    return len(calls)

three = {k: torch.cat([v, v, v]) for k, v in sd3_in.items()}  # uncond, cond, perturbed
got = {}
for label, qk_norm in (("SD3.0", None), ("SD3.5", "rms_norm")):
    model = build(qk_norm)
    plain = run(model, sd3_in)
    if qk_norm:
        n_plain = norm_calls(model)

    # as PAG does it, here in the last block only, the others stay plain
    keep = model.attn_processors
    procs = dict(keep)
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}.attn.processor"
    procs[last] = PAGCFGJointAttnProcessor2_0()
    plain3 = run(model, three)
    model.set_attn_processor(dict(procs))
    got[label, "pag"] = rel(run(model, three)[:2], plain3[:2])
    model.set_attn_processor(dict(keep))

    model.fuse_qkv_projections()
    got[label, "fused"] = rel(run(model, sd3_in), plain)
    if qk_norm:
        n_fused = norm_calls(model)
    print(label, {k[1]: round(v, 4) for k, v in got.items() if k[0] == label})
print("norm_q calls per forward: plain", n_plain, "fused", n_fused)

assert got["SD3.0", "fused"] < 1e-5 and got["SD3.0", "pag"] < 1e-5, got
assert got["SD3.5", "fused"] > 1e-3, "fused SD3.5 now keeps the qk norm"
assert got["SD3.5", "pag"] > 1e-3, "PAG on SD3.5 now keeps the qk norm"
assert (n_plain, n_fused) == (3, 0), (n_plain, n_fused)
PY
