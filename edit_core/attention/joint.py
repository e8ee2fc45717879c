"""MM-EDiT's hybrid (arXiv 2503.16726), SANA's all-linear rows, and the choices between them: one class per name.

What is the same in both, the features and the image's queries, keys and values, is :mod:`.forms`'.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Image, Projections, Rows, Sides, Softmax, of_part
from .linear import merge_heads, read, split_heads, state, without_autocast
from .slices import joined, slices
from .variant import Variant, named

__all__ = [
    "JOINTS",
    "NORMALISERS",
    "SOFTMAX_FEATURES",
    "AllLinear",
    "Exact",
    "Features",
    "Hybrid",
    "Joint",
    "LinearCall",
    "Normaliser",
    "Post",
    "Pre",
    "SoftmaxFeatures",
    "TokenRatio",
]


Features = Callable[[Tensor], Tensor]
"""Makes non-negative features of normed queries or keys `(B, n, C)`."""


class LinearCall(NamedTuple):
    """The image's side of one call, as linear attention takes it."""

    features: Features
    queries: Callable[[], Rows]
    """Makes the normed queries; not before the keys have served."""
    keys: Rows
    v: Tensor
    """`(B, M, C)`."""
    heads: int
    eps: float

    def state(self) -> Tensor:
        """What linear attention keeps of keys and values: `(B, h, d, d+1)`."""
        return state(
            (split_heads(self.features(self.keys(part)), self.heads), split_heads(of_part(self.v, part), self.heads))
            for part in slices(self.v)
        )


class SoftmaxFeatures(Variant):
    """Which image features MM-EDiT's softmax branches see."""

    def keys(self, linear: LinearCall, more: Tensor) -> tuple[Tensor, Rows]:
        """The keys for the softmax, `more` `(B, P, C)` behind them: `(B, M+P, C)`; and those for the linear branch."""
        raise NotImplementedError

    def seen(self, tokens: Tensor, features: Features) -> Tensor:
        """Normed queries or keys `(B, n, C)` as the softmax sees them, in their own dtype."""
        raise NotImplementedError


class Pre(SoftmaxFeatures):
    """Those before the kernel."""

    name = "pre"

    def keys(self, linear: LinearCall, more: Tensor) -> tuple[Tensor, Rows]:
        k = joined(linear.keys, linear.v, more)  # (B, M+P, C)
        return k, partial(of_part, k[:, : linear.v.shape[1]])

    def seen(self, tokens: Tensor, features: Features) -> Tensor:
        return tokens


class Post(SoftmaxFeatures):
    """Those after the kernel."""

    name = "post"

    def keys(self, linear: LinearCall, more: Tensor) -> tuple[Tensor, Rows]:
        features, keys, dtype = linear.features, linear.keys, linear.v.dtype
        return joined(lambda part: features(keys(part)).to(dtype), linear.v, more), keys

    def seen(self, tokens: Tensor, features: Features) -> Tensor:
        return features(tokens).to(tokens.dtype)


class Normaliser(Variant):
    """How MM-EDiT's image rows are mixed of their linear and their softmax branch."""

    def mixed(
        self, y: Tensor, z: Tensor, q: Tensor, prompt: Projections, heads: int, softmax: Softmax, share: float
    ) -> Tensor:
        """The rows `(B, n, C)`.

        Args:
            y: the linear branch, `(B, h, n, d)`, may be overwritten.
            z: its denominators, `(B, n, h)`, at least float32.
            q: the softmax branch's queries, `(B, n, C)`.
            prompt: the prompt's projections.
            heads: number of heads `h`.
            softmax: the host's attention function.
            share: of the image among all tokens.
        """
        raise NotImplementedError


class TokenRatio(Normaliser):
    """By the share of the image's tokens."""

    name = "token_ratio"

    def mixed(
        self, y: Tensor, z: Tensor, q: Tensor, prompt: Projections, heads: int, softmax: Softmax, share: float
    ) -> Tensor:
        return merge_heads(y).lerp_(softmax(q, prompt.k, prompt.v, heads), 1 - share)  # (B, n, C)


class Exact(Normaliser):
    """By the share of both branches' own normalisers.

    Fused attention keeps its normaliser to itself, so the `(B, h, n, P)` logits are written out here, at least in
    float32.
    """

    name = "exact"

    def mixed(
        self, y: Tensor, z: Tensor, q: Tensor, prompt: Projections, heads: int, softmax: Softmax, share: float
    ) -> Tensor:
        q, k, v = (split_heads(t, heads).to(z.dtype) for t in (q, prompt.k, prompt.v))
        with without_autocast(q.device):
            logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, h, n, P)
            log_z_soft = logits.logsumexp(-1)  # (B, h, n)
            y_soft = (logits - log_z_soft.unsqueeze(-1)).exp() @ v  # (B, h, n, d)
            own = torch.sigmoid(z.log().transpose(1, 2) - log_z_soft).unsqueeze(-1)  # (B, h, n, 1)
            return merge_heads(torch.lerp(y_soft, y.to(z.dtype), own).to(y.dtype))  # (B, n, C)


class Joint(Variant):
    """Between which tokens a joint attention is linear."""

    def rows(
        self, linear: LinearCall, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Rows, Tensor | None]:
        """Image rows by slices of the tokens, and prompt rows `(B, P, C)` if they are wanted."""
        raise NotImplementedError

    def by_kernels(
        self, sides: Sides, rectified: Features, image: Image, made: Projections, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The rows as kernels, local branch and all, of normed image queries, keys and values; `(B, N or P, C)`."""
        raise NotImplementedError

    @property
    def has_kernels(self) -> bool:
        """Whether there is :meth:`by_kernels` for the config."""
        return True


class Hybrid(Joint):
    """MM-EDiT's: linear between image tokens, and softmax wherever the prompt takes part.

    `Y_I = η · LinAttn(Q_I, K_I, V_I) + (1-η) · SDPA(Q_I, K_P, V_P)` and `Y_P = SDPA(Q_P, [K_I; K_P], [V_I; V_P])`.
    """

    name = "hybrid"
    reads = frozenset({"normaliser", "softmax_features"})

    def rows(
        self, linear: LinearCall, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Rows, Tensor | None]:
        soft = SOFTMAX_FEATURES[self.config.softmax_features](self.config)
        mixed = NORMALISERS[self.config.normaliser](self.config).mixed
        heads, softmax, features, eps, dtype = image.heads, image.softmax, linear.features, linear.eps, linear.v.dtype
        y_prompt = None
        if prompt_rows:  # nothing else needs all the image's keys at once
            k, keys = soft.keys(linear, prompt.k)  # (B, M+P, C)
            y_prompt = softmax(prompt.q, k, torch.cat([linear.v, prompt.v], 1), heads)  # (B, P, C)
            linear = linear._replace(keys=keys)
        of_keys = linear.state()  # (B, h, d, d+1)
        find, share = linear.queries(), _share(image, prompt)

        def rows(part: slice) -> Tensor:
            q = find(part)  # (B, n, C)
            featured = features(q)
            y, z = read(split_heads(featured, heads), of_keys, eps, dtype)
            return mixed(y, z, soft.seen(q, lambda _: featured), prompt, heads, softmax, share)  # (B, n, C)

        return rows, y_prompt

    @property
    def has_kernels(self) -> bool:
        return self.config.normaliser == TokenRatio.name

    def by_kernels(
        self, sides: Sides, rectified: Features, image: Image, made: Projections, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        from .fused import hybrid_rows

        seen = partial(SOFTMAX_FEATURES[self.config.softmax_features](self.config).seen, features=rectified)
        return hybrid_rows(sides, self.config, image, made, prompt, seen, _share(image, prompt), prompt_rows)


class AllLinear(Joint):
    """SANA's for two kinds of tokens: `LinAttn([Q_I; Q_P], [K_I; K_P], [V_I; V_P])`."""

    name = "linear"

    def rows(
        self, linear: LinearCall, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Rows, Tensor | None]:
        heads, features, eps, dtype = image.heads, linear.features, linear.eps, linear.v.dtype
        k_p = split_heads(features(prompt.k), heads)  # (B, h, P, d)
        of_keys = linear.state() + state([(k_p, split_heads(prompt.v, heads))])  # (B, h, d, d+1)
        find = linear.queries()

        def rows_of(q: Tensor) -> Tensor:
            q = split_heads(features(q), heads)  # (B, h, n or P, d)
            return merge_heads(read(q, of_keys, eps, dtype)[0])  # (B, n or P, C)

        return lambda part: rows_of(find(part)), rows_of(prompt.q) if prompt_rows else None

    def by_kernels(
        self, sides: Sides, rectified: Features, image: Image, made: Projections, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        from .fused import linear_rows

        return linear_rows(sides, self.config, image, made, prompt, prompt_rows)


def _share(image: Image, prompt: Projections) -> float:
    """`η = N_I / (N_I + N_P)`."""
    return image.x.shape[1] / (image.x.shape[1] + prompt.k.shape[1])


NORMALISERS = named(TokenRatio, Exact)
SOFTMAX_FEATURES = named(Pre, Post)
JOINTS = named(Hybrid, AllLinear)
"""By the config's names."""
