#!/usr/bin/env bash
# diffusers 0.42.1 (newest), torch 2.13.0. Two prompts and num_images_per_prompt=2 in SanaPipeline:
# encode_prompt orders the embeddings a, a, b, b but the attention masks a, b, a, b
# (repeat(n, 1) instead of repeat(1, n) and a view). So the second picture of the first prompt sees
# only as many of its words as the second prompt has, and the first picture of the second prompt
# attends to padding. No error, no log, and one prompt at a time is right, so is one picture each.
# PixArtSigmaPipeline does it right; AuraFlow and Lumina2 do it as Sana does.
# One would have guessed: a batch draws what its members draw one by one.
# Seen: words attended to, per picture of prompts with 6 and 2 words
#   PixArtSigma 6 6 2 2;  Sana, AuraFlow, Lumina2 6 2 6 2
#   Sana's latents, batch against the same prompts one at a time, same noise:
#   0.000 0.201 0.251 0.000 relative difference
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy==2.4.6 transformers==5.24.0
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import torch
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

def rel(a, b):
    return ((a - b).norm() / b.norm()).item()

@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample

torch.manual_seed(0)
transformer = SanaTransformer2DModel(
    patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
    attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
    cross_attention_dim=16, caption_channels=8, sample_size=32).eval()
pipe = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
                    scheduler=FlowMatchEulerDiscreteScheduler())
pipe.set_progress_bar_config(disable=True)
embeds = torch.randn(2, 6, 8)
mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])

def words(name):
    """How many words each of 2 x 2 pictures may look at, by the pipeline's own encode_prompt."""
    cls = getattr(diffusers, name)

    class Bare(cls):  # encode_prompt alone needs none of the parts
        def __init__(self):
            self.text_encoder = self.transformer = self.tokenizer = None
            self.system_prompt = ""

        def __getattr__(self, key):
            return self.__dict__.get(key)

    out = cls.encode_prompt(Bare(), prompt=None, do_classifier_free_guidance=False, device="cpu",
                            prompt_embeds=embeds, prompt_attention_mask=mask, num_images_per_prompt=2)
    m = next(t for t in out if torch.is_tensor(t) and t.ndim == 2)
    e = next(t for t in out if torch.is_tensor(t) and t.ndim == 3)
    assert [torch.equal(e[i].float(), embeds[i // 2]) for i in range(4)] == [True] * 4, name
    return m.sum(1).tolist()

counts = {n: words(n) for n in ("PixArtSigmaPipeline", "SanaPipeline", "AuraFlowPipeline",
                                "Lumina2Pipeline")}
print(counts)

noise = torch.randn(4, 4, 8, 8)

def draw(which, n, latents):
    return pipe(prompt_embeds=embeds[which], prompt_attention_mask=mask[which],
                num_images_per_prompt=n, latents=latents.clone(), height=256, width=256,
                num_inference_steps=2, guidance_scale=1.0, output_type="latent",
                use_resolution_binning=False).images

batch = draw([0, 1], 2, noise)
alone = torch.cat([draw([0], 2, noise[:2]), draw([1], 2, noise[2:])])
diff = [rel(batch[i], alone[i]) for i in range(4)]
once = rel(draw([0, 1], 1, noise[1:3]), alone[1:3])
print("batch against one at a time:", [round(d, 4) for d in diff], "one picture each:", once)

assert counts.pop("PixArtSigmaPipeline") == [6, 6, 2, 2]
assert all(c == [6, 2, 6, 2] for c in counts.values()), counts
assert diff[0] < 1e-5 and diff[3] < 1e-5 and once < 1e-5
assert diff[1] > 0.02 and diff[2] > 0.02, "Sana now orders masks as it orders embeddings"
PY
