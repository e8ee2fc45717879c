#!/usr/bin/env bash
# torch 2.13.0, CPU. BlockMask.from_kv_blocks says which blocks of keys each block of queries reads:
# the natural form for block-sparse attention whose choice is data, as in sparse diffusion
# transformers. It has no mask_mod, and only the compiled kernel looks at the blocks. Eager
# flex_attention computes full attention over all keys, although block_mask.sparsity() says 75%.
# Worse: a torch.compile'd flex_attention that has once raised a ValueError (a wrong head size, a
# mask for another length) falls back to eager for good. It is dense from then on, with the same
# arguments as before, without an error or a log line (fullgraph=True prevents it).
# One would have guessed: eager is the slow reference of the compiled kernel. A test that compares
# a block-sparse kernel with eager flex, or that first checks a bad call with pytest.raises on the
# same compiled function, tests dense attention.
# Seen, largest difference to dense / to block-sparse attention:
#   eager                       0.0000 / 1.0
#   compiled                    1.0    / 0.0000
#   compiled, after the error   0.0000 / 1.0
#   fullgraph, after the error  1.0    / 0.0000 (there the error is dynamo's Unsupported)
# Wants a C++ compiler, as torch.compile does on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

torch.manual_seed(0)
n, size = 512, 128
q, k, v = (torch.randn(1, 2, n, 64) for _ in range(3))
blocks = n // size
count = torch.ones(1, 2, blocks, dtype=torch.int32)  # each query block reads one: its own
index = torch.zeros(1, 2, blocks, blocks, dtype=torch.int32)
index[..., 0] = torch.arange(blocks, dtype=torch.int32)
mask = BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=size)
assert mask.sparsity() == 75.0

own = torch.block_diag(*[torch.ones(size, size)] * blocks).bool()
dense = F.scaled_dot_product_attention(q, k, v)
sparse = F.scaled_dot_product_attention(q, k, v, attn_mask=own)

def compare(label, out):
    d, s = (out - dense).abs().max().item(), (out - sparse).abs().max().item()
    print(f"{label:28s} {d:.4f} / {s:.4f}")
    return "dense" if d < 1e-4 else "sparse" if s < 1e-4 else "neither"

got = {"eager": compare("eager", flex_attention(q, k, v, block_mask=mask))}
for full in (False, True):
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=full)
    name = "fullgraph" if full else "compiled"
    got[name] = compare(name, compiled(q, k, v, block_mask=mask))
    try:
        compiled(q, k[..., :32], v, block_mask=mask)
        raise AssertionError("a wrong head size was accepted")
    except AssertionError:
        raise
    except Exception as e:
        print("   ", type(e).__name__)
    got[name, "after"] = compare(name + ", after the error", compiled(q, k, v, block_mask=mask))

assert got["eager"] == "dense", got
assert got["compiled"] == got["fullgraph"] == got["fullgraph", "after"] == "sparse", got
assert got["compiled", "after"] == "dense", got
PY
