"""What a training changed in the base's own attention linears, kept beside the side weights and added to the base.

In a weights file a difference is named after its linear in diffusers, whatever the host: `base.<path>.weight` and
`base.<path>.bias` in full, or `base.<path>.lora_A.weight` and `base.<path>.lora_B.weight` of low rank, whose
product `B @ A` is added with scale 1 (PEFT's names and meaning, with alpha = rank; LoRA is arXiv 2106.09685).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ..config import EDiTConfig
from ..errors import EDiTError, EDiTWeightsError

__all__ = [
    "PREFIX",
    "Differences",
    "LowRank",
    "Trainable",
    "check_differences",
    "check_trainable",
    "count_kinds",
    "group",
    "in_full",
    "initial_differences",
    "module_tree",
    "modules_of",
]

Trainable = Literal["side", "low_rank", "full"]
"""What a training may change: the side weights alone, or also the base's linears, by a low-rank or full difference."""

PREFIX = "base."
FULL = ("weight", "bias")
LOW_RANK = ("lora_A.weight", "lora_B.weight")
_NAME = re.compile(r"base\.(.+?)\.(lora_[AB]\.weight|weight|bias)")

Differences = Mapping[str, Mapping[str, Tensor]]
"""By their linear's diffusers path, each `weight (C, C)` and `bias (C,)`, or `lora_A.weight (r, C)` and
`lora_B.weight (C, r)`."""

T = TypeVar("T")


class LowRank(nn.Module):
    """A difference `B @ A` of a linear: `(..., C)` -> `(..., C)`, to be added to the linear's output.

    Args:
        dim: channels `C`.
        rank: rows of `A` and columns of `B`.
    """

    def __init__(self, dim: int, rank: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.lora_A = nn.Linear(dim, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, dim, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x))


def initial_differences(
    paths: Iterable[str], dim: int, trainable: Trainable, rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Differences without an effect for some linears, by their names in a file; float32.

    `A` is as PEFT makes it (Kaiming-uniform with a = sqrt(5), which is uniform within 1/sqrt(C)), all else zero.

    Raises:
        EDiTError: `rank` is not from 1 to `dim`.
    """
    if trainable == "side":
        return {}
    if trainable == "full":
        shapes = {"weight": (dim, dim), "bias": (dim,)}
        return {f"{PREFIX}{path}.{part}": torch.zeros(shape) for path in paths for part, shape in shapes.items()}
    if not 1 <= rank <= dim:
        raise EDiTError(f"rank must be from 1 to the model's {dim} channels, not {rank}")
    tensors = {}
    for path in paths:
        down = torch.empty(rank, dim).uniform_(-(dim**-0.5), dim**-0.5, generator=generator)
        tensors.update({f"{PREFIX}{path}.lora_A.weight": down, f"{PREFIX}{path}.lora_B.weight": torch.zeros(dim, rank)})
    return tensors


def check_trainable(config: EDiTConfig, trainable: Trainable) -> None:
    """Whether a training would have something to change.

    Raises:
        EDiTError: it would have nothing.
    """
    if trainable == "side" and not config.needs_weights:
        raise EDiTError(
            f"kernel={config.kernel} needs no weights, so there are none to make and nothing to train: apply it as it "
            "is, or choose trainable=low_rank or full to train the base's attention linears for it"
        )
    if trainable == "side" and not config.side_weights:
        raise EDiTError(
            "a student with query=plain and key=plain has no side weights, and with trainable=side nothing else is "
            "trained; choose trainable=low_rank or full"
        )


def width_of(shapes: Mapping[str, tuple[int, ...]], known: Container[str], source: str) -> int:
    """Channels `C` of the base that differences were made for.

    Args:
        shapes: of all tensors of a file.
        known: paths of the linears that may have a difference.
        source: what to call the file in an error.

    Raises:
        EDiTWeightsError: there is none to tell it by.
    """
    for path, parts in group(shapes).items():
        shape = parts.get("weight") or parts.get("lora_B.weight") or ()
        if path in known and len(shape) == 2:
            return shape[0]
    raise EDiTWeightsError(
        f"{source}: holds no {PREFIX}<linear>.weight or .lora_B.weight; with query=plain and key=plain these are all "
        "that EDiT weights have"
    )


def group(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """A file's differences by their linear's path, each with its parts (`lora_A.weight` and so on)."""
    found: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = tensor
    return found


def check_differences(shapes: Mapping[str, tuple[int, ...]], known: Container[str], dim: int, source: str) -> list[str]:
    """The names in a file that make up differences of known linears, their shapes checked.

    Args:
        shapes: of all tensors of the file.
        known: paths of the linears that may have a difference.
        dim: channels `C` of the base.
        source: what to call the file in an error.

    Raises:
        EDiTWeightsError: a difference is not whole, or a shape is wrong; names the tensor and the numbers.
    """
    names = []
    for path, parts in group(shapes).items():
        if path not in known:
            continue
        if set(parts) == set(FULL):
            expected: dict[str, tuple[int, ...]] = {"weight": (dim, dim), "bias": (dim,)}
        elif set(parts) == set(LOW_RANK):
            rank = min(max((*parts["lora_A.weight"], 1)[0], 1), dim)  # any that makes sense is right
            expected = {"lora_A.weight": (rank, dim), "lora_B.weight": (dim, rank)}
        else:
            raise EDiTWeightsError(
                f"{source}: {PREFIX}{path}.{sorted(parts)[0]} is not a whole difference: it takes "
                f"{' and '.join(FULL)}, or {' and '.join(LOW_RANK)}, and there is {' and '.join(sorted(parts))}"
            )
        for part, shape in expected.items():
            if parts[part] != shape:
                raise EDiTWeightsError(
                    f"{source}: {PREFIX}{path}.{part} is {'x'.join(map(str, parts[part][:8])) or 'a scalar'}, but a "
                    f"difference for {dim} channels is {'x'.join(map(str, shape))}"
                )
            names.append(f"{PREFIX}{path}.{part}")
    return names


def modules_of(
    differences: Differences, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, nn.Module]:
    """Differences as filled modules, a :class:`LowRank` or an `nn.Linear` each.

    A module maps `(..., C)` to what is to be added to its linear's output for the same input, `(..., C)`.
    """
    modules: dict[str, nn.Module] = {}
    for path, parts in differences.items():
        if "weight" in parts:
            dim = len(parts["bias"])
            module: nn.Module = nn.Linear(dim, dim, device="meta")
        else:
            rank, dim = parts["lora_A.weight"].shape
            module = LowRank(dim, rank, torch.device("meta"))
        own = {name: tensor.to(device, dtype, copy=True) for name, tensor in parts.items()}
        module.load_state_dict(own, assign=True)
        modules[path] = module
    return modules


def module_tree(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """One module that holds these, its state dict named by their paths."""
    root = nn.ModuleDict()
    for path, module in modules.items():
        *parents, last = path.split(".")
        node = root
        for name in parents:
            if name not in node:
                node[name] = nn.ModuleDict()
            node = cast(nn.ModuleDict, node[name])
        node[last] = module
    return root


def in_full(parts: Mapping[str, Tensor], part: str) -> Tensor | None:
    """A difference's `weight (C, C)` or `bias (C,)` in float32; None where it leaves that part alone."""
    if part in parts:
        return parts[part].float()
    if part == "weight" and "lora_A.weight" in parts:
        return parts["lora_B.weight"].float() @ parts["lora_A.weight"].float()
    return None


def count_kinds(differences: Differences) -> dict[str, int]:
    """How many linears have a difference of which kind: `{"full": 3, "rank 16": 8}`."""
    ranks = (parts.get("lora_A.weight") for parts in differences.values())
    return dict(sorted(Counter("full" if down is None else f"rank {len(down)}" for down in ranks).items()))
