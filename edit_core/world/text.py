"""The world's tokenizer and text embedding: whole words, fixed vectors, no weights on disk (ours).

The teachers have no text encoder to train, and PixArt's caption tokens do not attend to each other. So the fixed
embedding does what T5's contextual one does for the real model: a word's vector says what the word is, where it stands,
and what else its clause says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .scenes import COLOURS, COLUMNS, GROUNDS, NUMBERS, ROWS, SHAPES, SIZES, TEXTURES

__all__ = ["POOLED", "TOKENS", "VOCABULARY", "WIDTH", "WorldText"]

WIDTH = 192
"""Channels of `prompt_embeds`: word, clause and place in the sentence, 64 each."""
POOLED = 64
"""Channels of `pooled`: the sum of the caption's words."""
TOKENS = 48
"""Every caption is padded to this length."""

_PART = 64
_SPECIAL = ("<pad>", "<s>", "<unk>", ",")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")  # of clauses; captions use only the third by name
_FILLING = ("a", "the", "at", "in", "on", "over", "of", "to", "and", "as", "each", "with")
_CONTENT = (
    *SHAPES, *COLOURS, *GROUNDS, *TEXTURES, *SIZES, "big", "little", *COLUMNS, *ROWS, *NUMBERS, "third", "dots",
    "ground", "shape", "colour", "half", "mirrors", "mirrored", "frame", "framed", "like", "many", "equally", "side",
)  # fmt: skip
VOCABULARY = (*_SPECIAL, *_FILLING, *_CONTENT)


class WorldText:
    """Captions to embeddings; the same bits on every machine, since all values are small dyadic fractions."""

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(VOCABULARY)}
        rng = np.random.Generator(np.random.PCG64(20))
        signs = rng.integers(0, 2, _PART) * 2 - 1
        rows = _hadamard(_PART) * signs  # (64, 64), orthogonal rows of +1 and -1
        content = {word: rows[i + 1] for i, word in enumerate(_CONTENT)}
        if len(_CONTENT) + 1 + len(_ORDINALS) > _PART:
            raise ValueError("more words than orthogonal vectors")
        # Words without meaning of their own share what is left: a sign pattern each, not orthogonal.
        filling = {word: rng.integers(0, 2, _PART) * 2 - 1 for word in (*_SPECIAL, *_FILLING)}
        self._words = {**filling, **content}
        free = rows[len(_CONTENT) + 1 :]
        # The clause that "the third shape" means carries the vector of the word "third".
        self._ordinals = [content["third"] if name == "third" else free[i] for i, name in enumerate(_ORDINALS)]
        self._places = _sinusoids(TOKENS, _PART)
        self._content = frozenset(_CONTENT)

    def tokens(self, caption: str) -> list[int]:
        """Word numbers, `<s>` first, without padding; unknown words are `<unk>`, what is beyond TOKENS is cut off."""
        words = caption.lower().replace(",", " , ").split()
        return [self.ids["<s>"], *(self.ids.get(word, self.ids["<unk>"]) for word in words)][:TOKENS]

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (B, TOKENS, WIDTH), `prompt_mask` (B, TOKENS) bool, `pooled` (B, POOLED); float32.

        Padding is zero. The empty prompt is `<s>` alone.
        """
        embeds = np.zeros((len(prompts), TOKENS, WIDTH), np.float32)
        mask = np.zeros((len(prompts), TOKENS), bool)
        pooled = np.zeros((len(prompts), POOLED), np.float32)
        for i, prompt in enumerate(prompts):
            words = [VOCABULARY[token] for token in self.tokens(prompt)]
            n = len(words)
            mask[i, :n] = True
            own = np.stack([self._words[word] for word in words])  # (n, 64)
            clause = np.cumsum([word == "," for word in words])  # (n,)
            means = np.array([word in self._content for word in words])
            said = np.zeros((int(clause[-1]) + 1, _PART), np.float32)
            np.add.at(said, clause[means], own[means])
            for k in range(min(len(said), len(_ORDINALS)) if n > 1 else 0):
                said[k] += self._ordinals[k]
            embeds[i, :n] = np.concatenate([own, said[clause] / 2, self._places[:n]], axis=1)
            pooled[i] = own[means].sum(0) / 4
        return {
            "prompt_embeds": torch.from_numpy(embeds),
            "prompt_mask": torch.from_numpy(mask),
            "pooled": torch.from_numpy(pooled),
        }


def _hadamard(size: int) -> npt.NDArray[np.int64]:
    matrix = np.ones((1, 1), np.int64)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _sinusoids(length: int, width: int) -> npt.NDArray[np.float32]:
    """(length, width), rounded to 1/64: libraries of sines differ in their last bits."""
    table = np.zeros((length, width), np.float32)
    for i in range(length):
        for k in range(width // 2):
            angle = i / 100 ** (2 * k / width)
            table[i, 2 * k] = round(math.sin(angle) * 64) / 64
            table[i, 2 * k + 1] = round(math.cos(angle) * 64) / 64
    return table
