"""What arms hear: instructions in words, what readers make of them, and sensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchfilm.several import Masked
from torchfilm.systems.diffusion_policy.model import PolicyConfig
from torchfilm.systems.diffusion_policy.reasoning import INSTRUCTION, Vocabulary, check_finite
from torchfilm.systems.diffusion_policy.thinking import Reader


@dataclass(frozen=True, eq=False)
class Heard:
    """What one arm hears.

    Attributes:
        text: its instruction; None for nothing.
        scene: in words, for readers that ask for it.
        vectors: [size] by name; what is not there is missing.
        thoughts: what each reader wrote, by the name of its vector.
    """

    text: str | None = None
    scene: str | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    thoughts: Mapping[str, str] = field(default_factory=dict)


class Ears:
    """Make of instructions and sensors what a network hears, and refuse what it cannot hear.

    Args:
        config: of the network.
        readers: what makes vectors of instructions, by the names of the vectors.

    Raises:
        ValueError: for a reader whose vector the network does not hear, or hears in another size.
    """

    def __init__(self, config: PolicyConfig, readers: Mapping[str, Reader]) -> None:
        self._sizes, self.readers = dict(config.vectors), dict(readers)
        self._words = Vocabulary(config.vocabulary) if config.vocabulary else None
        for name, reader in self.readers.items():
            if self._sizes.get(name) != reader.dim:
                raise ValueError(
                    f"policy: expected readers of the vectors {self._sizes} that the network hears, got "
                    f"{name!r} of {reader.dim} numbers. Train with vectors={((name, reader.dim),)}."
                )

    @property
    def reads(self) -> bool:
        """Whether instructions are heard at all."""
        return self._words is not None or bool(self.readers)

    def hear(
        self,
        texts: Sequence[str | None],
        scenes: Sequence[str] | None = None,
        vectors: Mapping[str, Any] | None = None,
    ) -> list[Heard]:
        """Return what arms hear that are told `texts` and feel `vectors`, in [arms, size] each.

        Raises ValueError for a text without words, an unknown word, an instruction that nothing reads, and
        for vectors that are unknown, of another shape, or not finite where they are present.
        """
        _check_texts(texts, scenes)
        told = [row for row, text in enumerate(texts) if text is not None]
        rows: list[dict[str, Tensor]] = [{} for _ in texts]
        wrote: list[dict[str, str]] = [{} for _ in texts]
        said = [text for text in texts if text is not None]
        self._check_words(said)
        for name, reader in self.readers.items() if told else ():
            thoughts = reader(said, None if scenes is None else [scenes[row] for row in told])
            for row, vector, text in zip(told, thoughts.vectors, thoughts.texts, strict=True):
                rows[row][name], wrote[row][name] = vector, text
        for name, value in (vectors or {}).items():
            for row, vector in enumerate(self.feel(name, value, len(texts))):
                rows[row] |= {} if vector is None else {name: vector}
        places = [None] * len(texts) if scenes is None else scenes
        return [Heard(*one) for one in zip(texts, places, rows, wrote, strict=True)]

    def feel(self, name: str, value: Any, count: int) -> list[Tensor | None]:
        """Return the rows of a sensor's value [count, size], None where it is missing.

        value: numbers, `Masked` numbers, or None where it is missing for all. Raises ValueError as `hear`.
        """
        if name not in self._sizes or name in self.readers:
            known = [key for key in self._sizes if key not in self.readers]
            raise ValueError(
                f"policy: expected vectors among {known}, got {name!r}. "
                + ("Its reader makes it." if name in self.readers else "Train with it, or leave it out.")
            )
        value, present = (value.value, value.present) if isinstance(value, Masked) else (value, None)
        if value is None:
            return [None] * count
        value = torch.as_tensor(value)
        if value.shape != (count, self._sizes[name]):
            raise ValueError(
                f"policy: expected {name!r} as {(count, self._sizes[name])}, one row for each arm, got "
                f"{tuple(value.shape)}. For arms that lack it give Masked(value, present), or None for all."
            )
        present = torch.ones(count, dtype=torch.bool) if present is None else torch.as_tensor(present)
        if present.dtype != torch.bool or present.shape not in ((), (count,)):
            raise ValueError(
                f"policy: expected {name!r} present as {count} booleans, one for each arm, got "
                f"{present.dtype} {tuple(present.shape)}."
            )
        here = present.expand(count).tolist()
        check_finite(name, value[here])
        return [row if there else None for row, there in zip(value, here, strict=True)]

    def conditions(self, arms: Sequence[Heard], like: Tensor) -> dict[str, Masked]:
        """Return what these arms hear, by name, on the device and in the precision of `like`."""
        found = {}
        for name, size in self._sizes.items():
            rows = [one.vectors.get(name) for one in arms]
            numbers = [like.new_zeros(size) if row is None else row.to(like) for row in rows]
            present = torch.tensor([row is not None for row in rows], device=like.device)
            found[name] = Masked(torch.stack(numbers), present)
        said = [one.text for one in arms if one.text is not None]
        if self._words is not None and said:
            read = self._words([said[0] if one.text is None else one.text for one in arms])
            present = torch.tensor([one.text is not None for one in arms], device=like.device)
            found[INSTRUCTION] = Masked(tuple(part.to(like.device) for part in read), present)
        return found

    def _check_words(self, texts: Sequence[str]) -> None:
        if self._words is not None:
            self._words(texts)
        elif texts and not self.readers:
            raise ValueError(
                f"policy: expected an instruction that is heard, got {texts[0]!r} for a network without "
                f"words. Give Policy(network, readers=...), train with words, or tell it None."
            )


def _check_texts(texts: Sequence[str | None], scenes: Sequence[str] | None) -> None:
    """Refuse what is no list of instructions, one for each arm."""
    if isinstance(texts, str) or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(
            f"policy: expected a list of instructions, one text or None for each arm, got {texts!r}."
        )
    if len(texts) == 0 or (scenes is not None and (isinstance(scenes, str) or len(scenes) != len(texts))):
        raise ValueError(
            f"policy: expected an instruction, and a scene if any, for each arm, got {len(texts)} "
            f"instructions and the scenes {scenes!r}."
        )
