"""The reasoning vector: what is heard as words, thought by a language model, or felt by a sensor."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from torchfilm.blocks.text import WordEncoder, real_words
from torchfilm.conditions import Tokens, Vector
from torchfilm.data.table.wording import words
from torchfilm.several import Maybe, Several

INSTRUCTION = "instruction"
"""Name of the condition that is made from words."""

Read = tuple[Int[Tensor, "batch time"], Int[Tensor, " batch"]]


class Vocabulary:
    """Words as numbers: 0 is padding, word i of the list is i + 1.

    Args:
        known: the words, each once; punctuation marks are words.

    Example:
        >>> tokens, lengths = Vocabulary(("push", "the", "ball"))(["push the ball", "push"])
        >>> tokens.tolist(), lengths.tolist()
        ([[1, 2, 3], [1, 0, 0]], [3, 1])
    """

    def __init__(self, known: Sequence[str]) -> None:
        self.known = tuple(known)
        self._numbers = {word: number + 1 for number, word in enumerate(self.known)}

    def __call__(self, texts: Sequence[str]) -> Read:
        """Return the words' numbers, padded at the end, and how many there are in each text.

        Raises ValueError for a text without words, and for a word that is not known, with the nearest ones.
        """
        rows = [self._row(text) for text in texts]
        tokens = torch.zeros(len(rows), max(map(len, rows), default=1), dtype=torch.int64)
        for row, numbers in enumerate(rows):
            tokens[row, : len(numbers)] = torch.tensor(numbers)
        return tokens, torch.tensor([len(row) for row in rows])

    def _row(self, text: str) -> list[int]:
        found = words(text)
        if not found:
            raise ValueError(
                f"instruction: expected words, got {text!r}. For no instruction at all give None."
            )
        for word in found:
            if word not in self._numbers:
                near = difflib.get_close_matches(word, self.known, n=3, cutoff=0.0)
                raise ValueError(
                    f"instruction {text!r}: unknown word {word!r}; the nearest known words are "
                    f"{', '.join(near)}"
                )
        return [self._numbers[word] for word in found]


class Words(nn.Module):
    """Words of one's own vocabulary, encoded by a small network that is trained with the policy.

    z = LayerNorm(GRU state at the last word + bag of words); nothing is downloaded.

    Args:
        count: words in the vocabulary.
        dim: size of z.
        word_dim: size of a word's vector in front of the recurrence.
    """

    def __init__(self, count: int, dim: int, word_dim: int = 32) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = WordEncoder(count + 1, word_dim, dim, bag_of_words=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, read: Read | Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Return z for what a `Vocabulary` read; z itself, made before, is returned as it is."""
        if isinstance(read, Tensor):
            return read
        tokens, lengths = read
        return self.norm(self.encoder(tokens.to(self.norm.weight.device), lengths))


class WordStates(Tokens):
    """The same, one vector for each word and none for the whole: tokens and mask, for cross-attention."""

    def __init__(self, count: int, dim: int, word_dim: int = 32) -> None:
        super().__init__(dim, pooling=None)
        self.encoder = WordEncoder(count + 1, word_dim, dim, bag_of_words=True)
        self.norm = nn.LayerNorm(dim)

    def forward(  # type: ignore[override]
        self, read: Read | tuple[Float[Tensor, "batch time dim"], Int[Tensor, " batch"]]
    ) -> tuple[Float[Tensor, "batch time dim"], Bool[Tensor, "batch time"]]:
        """Return the vectors of what a `Vocabulary` read; vectors made before are returned as they are."""
        tokens, lengths = read
        if not tokens.is_floating_point():
            tokens = self.norm(self.encoder.states(tokens.to(self.norm.weight.device), lengths))
        return tokens, real_words(tokens, lengths)


class WordByWord(nn.Module):
    """The reasoning of a policy that looks at every word of its instruction, and hears nothing else."""

    def __init__(self, count: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.parts = nn.ModuleDict({INSTRUCTION: Maybe(WordStates(count, dim), dropout)})

    def forward(self, conditions: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask; one learned token where there is no instruction."""
        return self.parts[INSTRUCTION](conditions.get(INSTRUCTION))


class Projected(nn.Module):
    """A vector that another network made (an encoder, a language model, a sensor), brought to z's size.

    z = LayerNorm(W v + b).
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.vector = Vector(size)
        self.project = nn.Linear(size, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, vector: Float[Tensor, "batch size"]) -> Float[Tensor, "batch dim"]:
        """Return z; ValueError where the last axis has another size."""
        return self.norm(self.project(self.vector(vector)))


def build_reasoning(
    vocabulary: Sequence[str],
    vectors: Mapping[str, int],
    dim: int,
    dropout: float,
    *,
    word_by_word: bool = False,
) -> Several | WordByWord:
    """Return the condition of a policy: "instruction" in words, and vectors by name, each of which may lack.

    Args:
        vocabulary: the words; () where no instruction is read word by word.
        vectors: size of each further vector by name: {"thought": 64, "force": 3}.
        dim: what each contributes to the reasoning vector.
        dropout: share of the training samples that lack a condition, each drawn apart.
        word_by_word: one vector for each word, as cross-attention reads them.

    Raises:
        ValueError: for vectors beside words that are read one by one.
    """
    if word_by_word:
        if vectors or not vocabulary:
            raise ValueError(
                f"policy: expected an instruction alone for a fusion that reads word by word, got "
                f"{len(vocabulary)} words and the vectors {list(vectors)}. Choose another fusion for vectors."
            )
        return WordByWord(len(vocabulary), dim, dropout)
    parts: dict[str, nn.Module] = {}
    if vocabulary:
        parts[INSTRUCTION] = Maybe(Words(len(vocabulary), dim), dropout)
    for name, size in vectors.items():
        parts[name] = Maybe(Projected(size, dim), dropout)
    return Several(parts)


def check_finite(name: str, value: Any) -> None:
    """Raise ValueError where a tensor holds a NaN or an infinity."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
        raise ValueError(
            f"{name}: expected finite numbers, got {int((~value.isfinite()).sum())} that are not, of "
            f"{value.numel()}. Look at the sensor: a policy that acts on NaN moves anywhere."
        )
