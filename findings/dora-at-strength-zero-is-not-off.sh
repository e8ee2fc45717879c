#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2 (newest), torch 2.13.0. A trained DoRA on SD3 and
# set_adapters("style", 0.0): the picture is not the base model's. The strength scales B A, but
# DoRA's learnt magnitude stays in the weight (m / |W| instead of 1), so at 0 much of the adapter's
# effect is still there, and the way from 0 to 1 does not begin at the base. The same through
# joint_attention_kwargs={"scale": 0}. Only disable_lora() turns it off. An ordinary LoRA at 0 is
# exactly the base.
# One would have guessed: 0 is off, as every slider for adapters says; and strength 0.5 is half way.
# Seen, after 60 steps of Adam towards another model's output, distance to the base:
#   LoRA  1.0: 0.050   0.5: 0.031   0.0: 0.000   disabled 0.000
#   DoRA  1.0: 0.050   0.5: 0.042   0.0: 0.030   disabled 0.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

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

base = run(sd3(), sd3_in)
other = sd3()
torch.manual_seed(5)
with torch.no_grad():
    for name, p in other.named_parameters():
        if ".attn.to_" in name and "weight" in name:
            p.mul_(1 + 0.4 * torch.randn(p.shape[0], 1))
            p.add_(0.05 * torch.randn_like(p))
target = run(other, sd3_in)

def trained(dora):
    model = sd3()
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, use_dora=dora,
                                 target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "style")
    assert rel(run(model, sd3_in), base) < 1e-5  # untrained, both are the base
    params = [p for n, p in model.named_parameters() if "lora_" in n]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.Adam(params, lr=1e-2)
    for _ in range(60):
        opt.zero_grad()
        (model(**sd3_in).sample - target).square().mean().backward()
        opt.step()
    return model.requires_grad_(False)

far = {}
for name, dora in (("LoRA", False), ("DoRA", True)):
    model = trained(dora)
    for strength in (1.0, 0.5, 0.0):
        model.set_adapters("style", strength)
        far[name, strength] = rel(run(model, sd3_in), base)
    model.set_adapters("style", 1.0)
    far[name, "kwargs 0"] = rel(run(model, {**sd3_in, "joint_attention_kwargs": {"scale": 0.0}}), base)
    model.disable_lora()
    far[name, "disabled"] = rel(run(model, sd3_in), base)
    print(name, {k[1]: round(v, 4) for k, v in far.items() if k[0] == name})

assert far["LoRA", 0.0] < 1e-5 and far["LoRA", "kwargs 0"] < 1e-5, far
assert far["DoRA", "disabled"] < 1e-5, far
assert far["DoRA", 0.0] > 0.2 * far["DoRA", 1.0], "a DoRA at strength 0 is now the base"
assert far["DoRA", "kwargs 0"] > 0.2 * far["DoRA", 1.0], far
PY
