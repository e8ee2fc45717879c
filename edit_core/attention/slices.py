"""Which part of the tokens is worked on at a time: few enough, on a CPU, that what lies between stays in the cache.

What a whole layer holds between its operators is tens of megabytes each, which a CPU writes to memory and reads back,
and which the C library takes from the system anew for every one of them. Everything behind the convolutions is
a matter of single tokens, so it can be done for some of them after the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["by_bands", "joined", "slices", "written"]

SLICE = 512
"""Tokens at a time, of all pictures together; half and twice as many measured a little slower at both real widths."""


def at_once(device: torch.device) -> bool:
    """Whether tokens are better taken all at once: every device but a CPU has a price for each launch, autograd keeps
    what lies between anyway, and a compiled graph is to be one for any number of them."""
    return device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()


def slices(tokens: Tensor) -> list[slice]:
    """The parts of `N` for tokens `(B, N, C)`, in order; `[slice(None)]` for all at once."""
    batch, count = tokens.shape[:2]
    if at_once(tokens.device) or batch * count <= SLICE:
        return [slice(None)]
    length = max(SLICE // batch, 1)
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def written(rows: Callable[[slice], Tensor], onto: Tensor | None, like: Tensor) -> Tensor:
    """What `rows` gives for all tokens, `(B, N, C)`, slice by slice.

    Args:
        rows: `(B, n, C)` of a slice of `n` tokens, its own memory.
        onto: `(B, N, C)` to add the rows to, which is overwritten, or None.
        like: `(B, N, C)` in the dtype of the rows, on their device.
    """
    parts = slices(like)
    if len(parts) == 1:
        return rows(parts[0]) if onto is None else onto.add_(rows(parts[0]))
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device) if onto is None else onto
    for part in parts:
        if onto is None:
            out[:, part] = rows(part)
        else:
            out[:, part].add_(rows(part))
    return out


def joined(rows: Callable[[slice], Tensor], like: Tensor, more: Tensor) -> Tensor:
    """What `rows` gives for all tokens of `like`, `(B, N, C)`, with more tokens `(B, P, C)` behind: `(B, N+P, C)`."""
    parts, count = slices(like), like.shape[1]
    if len(parts) == 1:
        return torch.cat([rows(parts[0]), more], 1)
    out = like.new_empty(len(like), count + more.shape[1], like.shape[2])
    for part in parts:
        out[:, part] = rows(part)
    out[:, count:] = more
    return out


def by_bands(conv: nn.Module, image: Tensor, stride: int) -> Tensor:
    """A depthwise 3x3 convolution with padding 1 of an image `(B, C, H, W)`, some rows at a time if it must be copied.

    A third of a fused qkv is dense in no layout, and a convolution makes a dense copy of what it is given.

    Args:
        conv: the convolution.
        image: channels-last, or every so many channels of such an image.
        stride: the convolution's.
    """
    height, width = image.shape[2:]
    band = max(SLICE // (len(image) * width * stride), 1)  # rows of the result
    count = -(-height // stride)
    if at_once(image.device) or band >= count or image.is_contiguous(memory_format=torch.channels_last):
        return conv(image)
    shape = (*image.shape[:2], count, -(-width // stride))
    out = torch.empty(shape, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)
    for start in range(0, count, band):
        stop = min(start + band, count)
        above = 1 if start else 0  # a row of the result too many, which sees the padding instead of what is above it
        part = image[:, :, stride * (start - above) : stride * (stop - 1) + 2]
        out[:, :, start:stop] = conv(part)[:, :, above : above + stop - start]
    return out
