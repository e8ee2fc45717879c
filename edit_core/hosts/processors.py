"""EDiT as diffusers attention processors; plain PyTorch, since a processor needs nothing of diffusers itself."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..attention import Grid, Projections, SideAttention
from .dense import DenseLog, dense_reason

__all__ = [
    "CALL",
    "Call",
    "Host",
    "JointProcessor",
    "Processor",
    "SelfProcessor",
    "Site",
    "Tap",
    "is_fused",
    "make_processor",
    "pass_arguments",
]

CALL = "edit_call"
"""The processors' argument of this name is the :class:`Call`."""
THEIRS = "edit_theirs"
"""The processors' argument of this name holds those that only the original processor knows."""

_KNOWN = frozenset({"hidden_states", "encoder_hidden_states", "attention_mask", "ip_hidden_states", "temb", CALL})
_MASKED = frozenset({"AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0"})
"""diffusers' processors that honour an attention mask as :class:`SelfProcessor` can."""


class Tap(Protocol):
    """Stands in for a replaced attention's call: may run the original, EDiT, or both, and says what comes out."""

    def __call__(self, key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any: ...


class Host(Protocol):
    """What processors ask of whoever applied them."""

    min_tokens: int
    """Pictures of fewer image tokens keep the original attention."""
    log: DenseLog | None
    """Is told why calls could not be linear, for as long as EDiT is applied."""


class Call:
    """One call of a transformer. It travels with the arguments of the blocks, so that it is with them in every thread,
    and again when gradient checkpointing runs them once more.

    Args:
        host: whoever applied EDiT.
        grid: token grid of the latent.
        tap: stands in for every replaced attention's call; None for EDiT itself.
    """

    def __init__(self, host: Host, grid: Grid, tap: Tap | None) -> None:
        self.host = host
        self.tap = tap
        # An empty tensor's shape: a compiled graph would take a pair of numbers for constants, and be one per size.
        self._extent = torch.empty((*grid, 0))

    @property
    def grid(self) -> Grid:
        return self._extent.shape[0], self._extent.shape[1]


class Site(nn.Module):
    """What EDiT adds to an attention: as a submodule of it, it moves and is cast with the transformer.

    Args:
        side: the side weights.
        differences: what to add to the outputs of the attention's own linears, by the linear's name, if anything. The
            linears stay as they are, so the original processor computes what it always did.
    """

    def __init__(self, side: SideAttention, differences: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.side = side
        # Not under the linears' own names: PEFT puts LoRAs into whatever is called `to_q`.
        self.differences = nn.ModuleDict({f"on_{name}": module for name, module in differences.items()})

    def changed(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """A linear's output `y` for `x`, with the linear's difference if it has one; all `(B, N, C)`."""
        key = f"on_{name}"
        return y + self.differences[key](x) if key in self.differences else y


class Processor:
    """What the processors share: the choice between EDiT and the processor that was there before.

    To others it is the latter (see :func:`make_processor`): its attributes, to read and to set, are the original's.

    Args:
        key: `<block>.<site>`, as in weights files.
        site: what EDiT adds to the attention.
        original: the processor that was there before.
        host: whoever applies it.
    """

    key: str
    site: Site
    original: Any
    host: Host
    named: frozenset[str]
    """The original's arguments: diffusers hands a processor what its signature names, and nothing else."""

    def __init__(self, key: str, site: Site, original: Any, host: Host) -> None:
        named = frozenset(inspect.signature(original.__call__).parameters)
        self.__dict__.update(key=key, site=site, original=original, host=host, named=named)

    def __getattr__(self, name: str) -> Any:
        if "original" not in self.__dict__:  # a copy in the making
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # not as a module would, where the original is one

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        edit_call: Call | None = None,
        edit_theirs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {"ip_hidden_states": ip_hidden_states, "temb": temb, **(edit_theirs or {})}
        more = {name: value for name, value in given.items() if name in self.named and value is not None}
        # A picture has a sentence of its own, and of diffusers' processors `temb` serves nothing else.
        unknown = more.keys() - {"ip_hidden_states", *(("temb",) if _is_diffusers(self.original) else ())}
        # A call of another EDiT's may reach one that was removed, which `unfuse_qkv_projections` can put back.
        call = edit_call if edit_call is not None and edit_call.host is self.host else None
        reason = _overridden() or dense_reason(
            call.grid if call is not None else None,
            hidden_states.shape[1],
            min_tokens=self.host.min_tokens,
            masked=attention_mask is not None and not self.keeps_masks,
            pictured="ip_hidden_states" in more,
            unknown=sorted(unknown),
        )
        if self.host.log is not None:
            self.host.log.note(reason)
        dense = partial(self.original, attn, hidden_states, encoder_hidden_states, attention_mask, **more)
        if call is None or reason is not None:
            return dense()
        edit = partial(self.edit, attn, hidden_states, encoder_hidden_states, call.grid, attention_mask)
        return self.whole(edit() if call.tap is None else call.tap(self.key, dense, edit), encoder_hidden_states)

    @property
    def keeps_masks(self) -> bool:
        """Whether an attention mask is honoured."""
        return False

    @abstractmethod
    def edit(self, attn: Any, x: Tensor, prompt: Any, grid: Grid, mask: Tensor | None = None) -> Any:
        """The replaced attention, output projection included."""

    def whole(self, output: Any, prompt: Any) -> Any:
        """What :meth:`edit` gave as the original gives it."""
        return output

    def projections(self, attn: Any, x: Tensor) -> Projections:
        """The base's `q, k, v` of image tokens `(B, N, C)`."""
        # Not as `attn.fused_projections` says, which diffusers leaves set where it goes back to the three.
        fused = is_fused(self.original)
        q, k, v = attn.to_qkv(x).chunk(3, -1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        changed = self.site.changed
        return Projections(changed("to_q", x, q), changed("to_k", x, k), changed("to_v", x, v))

    def output(self, attn: Any, y: Tensor) -> Tensor:
        """The base's output projection of image tokens `(B, N, C)`."""
        return attn.to_out[1](self.site.changed("to_out", y, attn.to_out[0](y)))


class SelfProcessor(Processor):
    """EDiT in place of an image-only self-attention: `(B, N, C)` -> `(B, N, C)`."""

    @property
    def keeps_masks(self) -> bool:
        # One that diffusers hands to a processor that takes no notice of it must not change anything.
        return self.site.side.form.keeps_masks and _own_name(self.original) in _MASKED

    def edit(self, attn: Any, x: Tensor, prompt: Any, grid: Grid, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, x.shape[1], len(x)).unflatten(0, (len(x), -1))  # (B, h, 1 or N, N)
        norms = (attn.norm_q, attn.norm_k)
        y = self.site.side(x, self.projections(attn, x), grid, attn.heads, *norms, mask=mask)  # (B, N, C)
        return self.output(attn, y)


class JointProcessor(Processor):
    """MM-EDiT in place of a joint attention: image `(B, N, C)`, prompt `(B, P, C)` -> the same two."""

    def edit(
        self, attn: Any, x: Tensor, prompt: Tensor, grid: Grid, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        changed = self.site.changed
        q_p = changed("add_q_proj", prompt, attn.add_q_proj(prompt))  # (B, P, C)
        k_p = changed("add_k_proj", prompt, attn.add_k_proj(prompt))  # (B, P, C)
        v_p = changed("add_v_proj", prompt, attn.add_v_proj(prompt))  # (B, P, C)
        y_image, y_prompt = self.site.side(
            x,
            self.projections(attn, x),
            Projections(_normed(q_p, attn, attn.norm_added_q), _normed(k_p, attn, attn.norm_added_k), v_p),
            grid,
            attn.heads,
            attn.norm_q,
            attn.norm_k,
            prompt_rows=not attn.context_pre_only,
        )  # (B, N, C), (B, P, C) or None
        prompt_out = None if y_prompt is None else changed("to_add_out", y_prompt, attn.to_add_out(y_prompt))
        return self.output(attn, y_image), prompt_out

    def whole(self, output: Any, prompt: Any) -> Any:
        # The last block's caller drops the prompt rows, but caches in between want a tensor, as of diffusers' own.
        return output if output[1] is not None else (output[0], prompt)


class _StandIn(type):
    """The class of processor classes that, called without arguments as diffusers does, make the original."""

    def __call__(cls, *args: Any) -> Any:
        return super().__call__(*args) if args else cls.__bases__[1]()


@functools.cache
def _stand_in(processor: Any, original: Any) -> Any:
    made = _StandIn(f"EDiT{original.__name__}", (processor, original), {})
    # Where diffusers looks up by the class what to put in place of an attention that is left out.
    registry = getattr(sys.modules.get("diffusers.hooks._helpers"), "AttentionProcessorRegistry", None)
    if registry is not None:
        with contextlib.suppress(ValueError):  # it does not know the original either
            registry.register(made, registry.get(original))
    return made


def make_processor(kind: type[Processor], key: str, site: Site, original: Any, host: Host) -> Processor:
    """A processor that stands in for another.

    If that is one of diffusers' own it is of its class, too: diffusers finds what it is to scale or to unload, such as
    IP-Adapters, by the class, and replaces others by what the class gives when called.
    """
    made: Any = _stand_in(*cast(tuple[Any, Any], (kind, type(original)))) if _is_diffusers(original) else kind
    return made(key, site, original, host)


def is_fused(processor: Any) -> bool:
    """Whether it is one of diffusers' that take queries, keys and values from one fused layer."""
    return _own_name(processor).startswith("Fused")


def pass_arguments(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of an attention, since diffusers hands a processor only what its signature names.

    Other processors do not know the call, and diffusers would warn of it. Ours does not name what the original does.
    """
    processor = attention.processor
    if not isinstance(processor, Processor):
        return (args, {name: value for name, value in kwargs.items() if name != CALL}) if CALL in kwargs else None
    theirs = {name: kwargs[name] for name in kwargs.keys() & processor.named - _KNOWN}
    if not theirs:
        return None
    return args, {**{name: value for name, value in kwargs.items() if name not in theirs}, THEIRS: theirs}


def _is_diffusers(processor: Any) -> bool:
    return type(processor).__module__.partition(".")[0] == "diffusers"


def _own_name(processor: Any) -> str:
    """The class's name of one of diffusers' processors; nothing of others."""
    return type(processor).__name__ if _is_diffusers(processor) else ""


def _overridden() -> str | None:
    """Why a call stays dense whose softmax attention somebody replaces, as diffusers' layer skip does of scores."""
    if torch.compiler.is_compiling():
        return None
    modes = [type(mode) for mode in torch.overrides._get_current_function_mode_stack()]
    names = [mode.__name__ for mode in modes if mode.__module__.partition(".")[0] == "diffusers"]
    return f"{' and '.join(names)}, which replaces softmax attention in this call" if names else None


def _normed(tokens: Tensor, attn: Any, norm: nn.Module | None) -> Tensor:
    return tokens if norm is None else norm(tokens.unflatten(-1, (attn.heads, -1))).flatten(2)
