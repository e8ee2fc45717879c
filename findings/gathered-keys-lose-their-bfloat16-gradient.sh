#!/usr/bin/env bash
# torch 2.13.0, CPU. Sparse attention gathers cells of keys for each tile of queries, and popular
# cells are gathered by nearly every tile. The backward of k[index] adds the gradients of all the
# copies one by one in bfloat16: at a few hundred times an addend the sum no longer grows. torch's
# index_select and gather, which give the same forward bit for bit, sum in float32.
# (F.embedding's backward is k[index]'s.) float16 goes the same way somewhat later.
# One would have guessed: three spellings of one gather have one gradient, to rounding.
# Seen: gradient of a key chosen 1,024 times, each copy's gradient 0.01, as a share of the truth:
#   k[index] 0.39, embedding 0.39, index_select 1.00, gather 1.00;   65,536 times: 0.006, ..., 1.00
# and in a small sparse attention in bfloat16, 1,024 tiles that all choose one cell: error of that
# cell's value gradient against float64: v[index] 0.054, index_select 0.003.
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

torch.set_num_threads(1)

def ways(index):
    wide = index[:, None].expand(-1, 8)
    return {"k[index]": lambda k: k[index], "embedding": lambda k: F.embedding(index, k),
            "index_select": lambda k: k.index_select(0, index), "gather": lambda k: k.gather(0, wide)}

share = {}
for times in (64, 1024, 65536):
    index = torch.zeros(times, dtype=torch.long)
    g = torch.full((times, 8), 0.01, dtype=torch.bfloat16)
    for name, pick in ways(index).items():
        k = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
        pick(k).backward(g)
        share[name, times] = (k.grad[0].double().mean() / g.double()[:, 0].sum()).item()
        print(f"{times:6d} copies  {name:13s} {share[name, times]:.3f} of the gradient")

# block-sparse attention: 1,024 tiles of 4 queries, each reads 2 of 8 cells of 8 keys, one of them shared
torch.manual_seed(0)
tiles, cells, dim = 1024, 8, 32
q, k0, v0 = torch.randn(tiles, 4, dim), torch.randn(cells, 8, dim), torch.randn(cells, 8, dim)
choice = torch.stack([torch.zeros(tiles, dtype=torch.long), torch.randint(1, cells, (tiles,))], 1)
target = torch.randn(tiles, 4, dim) + v0[0].mean(0)

def value_gradient(dtype, select):
    v = v0.to(dtype).requires_grad_()
    flat = choice.flatten()
    pick = (lambda x: x.index_select(0, flat)) if select else (lambda x: x[flat])
    kk, vv = (pick(x).reshape(tiles, 16, dim) for x in (k0.to(dtype), v))
    out = F.scaled_dot_product_attention(q.to(dtype), kk, vv)
    ((out - target.to(dtype)).float() ** 2).mean().backward()
    return v.grad[0].double()

truth = value_gradient(torch.float64, True)
err = {}
for name, select in (("v[index]", False), ("index_select", True)):
    err[name] = ((value_gradient(torch.bfloat16, select) - truth).norm() / truth.norm()).item()
    print(f"sparse attention, shared cell's value gradient by {name}: error {err[name]:.3f}")

for name in ("index_select", "gather"):
    assert all(abs(share[name, t] - 1) < 0.01 for t in (64, 1024, 65536)), share
for name in ("k[index]", "embedding"):
    assert share[name, 1024] < 0.6 and share[name, 65536] < 0.02, share
assert err["v[index]"] > 5 * err["index_select"], err
PY
