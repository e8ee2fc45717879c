#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2 (newest), torch 2.13.0. fuse_qkv_projections() of SD3 and PixArt copies
# to_q.weight, to_k.weight, to_v.weight into a new to_qkv. With a LoRA attached these are the base
# layers' weights, so an adapter loaded before fusing is dropped, and one loaded after it is never
# called: either way its effect is exactly 0 and nothing is said. (Of cross-attention, to_q's part
# survives, to_k's and to_v's does not.) unfuse_qkv_projections() restores the processors only:
# attn.fused_projections stays True, to_qkv stays (a fifth more parameters here, stale after any
# change to to_q, and save_pretrained writes it), so code that asks the flag, as diffusers' newer
# attention classes do, runs on old weights.
# One would have guessed: an error, or fused adapters; and that unfusing undoes fusing.
# Seen, relative change of the output by a LoRA on self-attention's to_q, to_k, to_v:
#   PixArt plain 0.055, LoRA then fused 0.000, fused then LoRA 0.000, unfused again 0.055
#   SD3.0  the same with other figures;  after unfuse: flag True, 188,640 -> 230,240 parameters (PixArt)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import os
import tempfile

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open

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

def add_lora(model):
    torch.manual_seed(3)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False,
                                       target_modules=r".*\.attn1?\.to_[qkv]"), model)

for name, make, inputs in (("PixArt", pixart, pix_in), ("SD3.0", lambda: sd3(qk_norm=None), sd3_in)):
    base = run(make(), inputs)
    model = make()
    add_lora(model)
    plain = rel(run(model, inputs), base)
    model.fuse_qkv_projections()
    before = rel(run(model, inputs), base)
    model = make()
    model.fuse_qkv_projections()
    add_lora(model)
    after = rel(run(model, inputs), base)
    model.unfuse_qkv_projections()
    again = rel(run(model, inputs), base)
    print(f"{name}: LoRA {plain:.4f}, then fused {before:.4f}, fused then LoRA {after:.4f}, unfused {again:.4f}")
    assert plain > 0.005 and abs(again - plain) < 1e-5
    assert before < 1e-6 and after < 1e-6, "fusing now minds adapters"

    model = make()
    small = model.num_parameters()
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    attn = model.transformer_blocks[0].attn1 if name == "PixArt" else model.transformer_blocks[0].attn
    with torch.no_grad():
        attn.to_q.weight.mul_(2)
    stale = (attn.to_qkv.weight[: attn.to_q.weight.shape[0]] - attn.to_q.weight).abs().max().item()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(os.path.join(folder, "diffusion_pytorch_model.safetensors"), "pt") as f:
            written = sum("to_qkv" in key for key in f.keys())
    print(f"  after unfuse: flag {attn.fused_projections}, {small} -> {model.num_parameters()} parameters,"
          f" to_qkv off by {stale:.3f}, {written} to_qkv tensors in the saved file")
    assert attn.fused_projections is True and stale > 0 and written > 0
    assert model.num_parameters() > 1.1 * small
PY
