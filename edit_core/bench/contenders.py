"""What runs side by side: the teacher on several softmax kernels, EDiT and what it is compared with, and the limit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PRESETS, EDiTConfig
from ..errors import EDiTConfigError, EDiTError
from ..hosts.diffusers import apply_edit
from ..weights import EDiTWeights
from .subjects import Subject

__all__ = ["CONTENDERS", "Contender", "SoftmaxProcessor", "contender", "install", "processors"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A softmax attention on token-major heads: `(B, N, h, d)` queries, keys and values -> `(B, N, h, d)`."""


def _flash_attn() -> Attend:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _sage() -> Attend:
    from sageattention import sageattn

    return partial(sageattn, tensor_layout="NHD")


_KERNELS: dict[str, tuple[str, Callable[[], Attend]]] = {
    "flash_attn": ("flash-attn", _flash_attn),
    "sage": ("sageattention", _sage),
}
"""Softmax kernels of other packages: the distribution's name, and what imports it."""

CONTENDERS = ("teacher", *PRESETS, *_KERNELS, "limit")
"""`teacher` is the base as diffusers runs it, on PyTorch's scaled_dot_product_attention; then EDiT's presets, the
teacher on other kernels, and `limit`: the base without its softmax."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a base's self-attentions; with neither a config nor a processor the base's own."""

    name: str
    config: EDiTConfig | None = None
    """A student's."""
    processor: SoftmaxProcessor | None = None
    """Stands in for the base's own processors."""
    versions: tuple[tuple[str, str], ...] = ()
    """Packages that it needs beside PyTorch and diffusers."""


class SoftmaxProcessor:
    """The base's attention between its own linears and norms, on another kernel or on none.

    Args:
        attend: the kernel. None leaves the softmax out: every token gets its own value, and image and prompt are
            nowhere put together. That is the limit of what any other attention between these linears can reach.
    """

    def __init__(self, attend: Attend | None) -> None:
        self.attend = attend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Any:
        linears = (attn.to_q, attn.to_k, attn.to_v)
        image = _heads(attn, hidden_states, linears, attn.norm_q, attn.norm_k)  # 3 x (B, N, h, d)
        if encoder_hidden_states is None:
            return self._output(attn, image[2] if self.attend is None else self.attend(*image))
        linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        prompt = _heads(attn, encoder_hidden_states, linears, attn.norm_added_q, attn.norm_added_k)  # 3 x (B, P, h, d)
        if self.attend is None:
            y_image, y_prompt = image[2], prompt[2]
        else:
            q, k, v = (torch.cat(pair, 1) for pair in zip(image, prompt, strict=True))  # (B, N+P, h, d)
            y_image, y_prompt = self.attend(q, k, v).split((image[0].shape[1], prompt[0].shape[1]), 1)
        # The last block's caller drops the prompt rows.
        prompt_out = None if attn.context_pre_only else attn.to_add_out(y_prompt.flatten(2))
        return self._output(attn, y_image), prompt_out

    @staticmethod
    def _output(attn: Any, y: Tensor) -> Tensor:
        return attn.to_out[1](attn.to_out[0](y.flatten(2)))  # (B, N, C)


def _heads(
    attn: Any, x: Tensor, linears: Sequence[nn.Module], norm_q: nn.Module | None, norm_k: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)) for linear in linears)  # (B, N, h, d)
    return norm_q(q) if norm_q else q, norm_k(k) if norm_k else k, v


def contender(text: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Contender:
    """A contender by its name.

    Args:
        text: one of :data:`CONTENDERS`; behind a preset's name may stand fields that differ from it, as in
            `paper:compression=8,kv_stride=1`.
        device: where it is to run.
        dtype: in what.
        heads: the base's, for kernels that do not take all.
        head_dim: likewise.

    Raises:
        EDiTError: there is no such contender, or it cannot run here; the message says why.
    """
    name, _, changes = text.partition(":")
    if name in PRESETS:
        fields = (change.partition("=") for change in changes.split(",") if change)
        return Contender(text, _config(name, {field: value for field, _, value in fields}))
    if name not in CONTENDERS or changes:
        raise EDiTError(f"no contender {text!r}; there are {', '.join(CONTENDERS)}, and a preset's with :field=value")
    if name == "teacher":
        return Contender(name)
    if name == "limit":
        return Contender(name, processor=SoftmaxProcessor(None))
    distribution, load = _KERNELS[name]
    try:
        attend = load()
    except (ImportError, OSError):
        raise EDiTError(f"{name} cannot run here: no {distribution} is installed that works") from None
    q = torch.zeros(1, 128, heads, head_dim, device=device, dtype=dtype)
    try:
        attend(q, q, q)
    except Exception as error:  # kernels raise every kind there is for what they cannot do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EDiTError(f"{name} cannot run here with heads of {head_dim} channels: {reason}") from None
    version = importlib.metadata.version(distribution)
    return Contender(name, processor=SoftmaxProcessor(attend), versions=((distribution, version),))


def _config(preset: str, changes: dict[str, str]) -> EDiTConfig:
    kinds = {field.name: type(getattr(EDiTConfig, field.name)) for field in dataclasses.fields(EDiTConfig)}
    values: dict[str, Any] = {}
    for name, text in changes.items():
        if name not in kinds:
            raise EDiTConfigError(f"a contender's {name!r} is none of the fields {', '.join(kinds)}")
        try:
            values[name] = {"true": True, "false": False}[text] if kinds[name] is bool else kinds[name](text)
        except (KeyError, ValueError):
            raise EDiTConfigError(f"a contender's {name}={text} cannot be read as {kinds[name].__name__}") from None
    return EDiTConfig.preset(preset, **values)


def processors(subject: Subject, one: Contender, seed: int = 0) -> list[Any]:
    """What makes the subject's attentions run a contender, for :func:`install`; the base's own must be in place.

    A student's side weights are random in all their parts, so that a check of its outputs sees all of them.
    """
    if one.config is None:
        return [one.processor or attention.processor for attention in subject.attentions]
    weights = _random_weights(subject, one.config, seed) if one.config.needs_weights else one.config
    with apply_edit(subject.transformer, weights, subject.layers) as handle:
        found = [attention.processor for attention in subject.attentions]
    for processor in found:  # a student's would be merged into the linears before anyone times it
        processor.site.differences = nn.ModuleDict()
    # An attention called alone has no transformer to tell it of the call.
    return [partial(processor, edit_call=handle.call(subject.grid)) for processor in found]


def _random_weights(subject: Subject, config: EDiTConfig, seed: int) -> EDiTWeights:
    # A config without side weights has only differences on the base's linears, which are taken away again.
    trainable: Any = "side" if config.side_weights else "low_rank"
    weights = EDiTWeights.init(subject.transformer, config, subject.layers, seed, trainable, rank=1)
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.tensors.values():
        noise = torch.randn(tensor.shape, generator=generator) * (0.5 * tensor[0].numel() ** -0.5)
        tensor += noise if tensor.ndim > 1 else 0.1 * noise
    return weights


def install(attentions: Sequence[Any], own: Sequence[Any]) -> None:
    """Gives each attention its processor."""
    for attention, processor in zip(attentions, own, strict=True):
        attention.set_processor(processor)
