"""Ask one picture one question: the answer, how sure, where the network looked, and the γ and β it used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torchfilm import Modulation
from torchfilm.data.clevr.vocabulary import END, SPECIALS, START, Vocabulary, tokenize
from torchfilm.systems.visual_reasoning import load
from torchfilm.systems.visual_reasoning.bundle import find_bundle, load_sight
from torchfilm.systems.visual_reasoning.model import VisualReasoner
from torchfilm.systems.visual_reasoning.perception import STRIDE, Perception
from torchfilm.systems.visual_reasoning.pictures import Picture, frame

MAX_QUESTION_CHARACTERS = 500
MAX_EDIT = 1000.0

Edits = Mapping[str, Mapping[Any, Mapping[Any, float]]]


class UnknownWordError(ValueError):
    """A word that the network has never met (`word`), and the three most similar it knows (`nearest`)."""

    def __init__(self, word: str, nearest: Sequence[str]):
        self.word, self.nearest = word, tuple(nearest)
        super().__init__(f"unknown word {word!r}; the nearest known words are {', '.join(self.nearest)}")


@dataclass(frozen=True)
class Seen:
    """What the network made of one picture: its maps [1, C, H, W], reusable for any number of questions."""

    features: Tensor


@dataclass(frozen=True)
class Answer:
    """An answer and its grounds.

    `probabilities`: the best answers, best first, as (answer, probability in 0..1). `modulations`: per block
    the gamma and beta that were applied, edits included, one number per channel. `looked`: H x W counts, row
    0 on top: how many channels have their maximum over the picture in each cell; a channel that is nowhere
    positive is not counted. `tokens`: the question as understood.
    """

    answer: str
    probability: float
    runner_up: str
    probabilities: tuple[tuple[str, float], ...]
    modulations: dict[str, dict[str, list[float]]]
    looked: list[list[int]]
    tokens: tuple[str, ...]


class Answerer:
    """A trained network with its vocabulary, ready for single questions; for one thread at a time.

    perception: what stands
    between pixels [1, 3, H, W] in 0..1 and `model.features`, for a network over maps; None for one over
    pixels.
    """

    def __init__(
        self,
        model: VisualReasoner,
        vocabulary: Vocabulary,
        perception: Perception | None = None,
    ):
        config = model.config
        if (config.input, perception is None) not in (("pixels", True), ("maps", False)):
            given = "without" if perception is None else "with"
            raise ValueError(
                f"Answerer: expected a network over pixels, or one over maps with its perception; got one "
                f"over {config.input} {given} a perception. One over given features cannot look at pictures."
            )
        self.model = model.eval()
        self.perception = None if perception is None else perception.eval()
        self.vocabulary = vocabulary
        stride = 1 if perception is None else STRIDE
        self.width, self.height = stride * config.input_width, stride * config.input_height
        self._casings: dict[str, list[str]] = {}
        for word in vocabulary.questions:
            if word and word not in SPECIALS:
                self._casings.setdefault(word.lower(), []).append(word)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Answerer:
        """The answerer of a checkpoint folder; None: the checkpoint shipped with the package."""
        return cls(*_load(path))

    def see(self, image: Picture) -> Seen:
        """Run the part of the network that does not depend on the question, once per picture."""
        pixels = torch.from_numpy(frame(image, self.width, self.height)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            return Seen(self.model.features(self.perception.maps(pixels) if self.perception else pixels))

    def words(self, question: str) -> tuple[str, ...]:
        """The question as the network's words: cut as CLEVR's, with the casing that the vocabulary knows.

        Raises ValueError if the question is empty or too long, UnknownWordError (a ValueError) for such a
        word.
        """
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise ValueError(
                f"the question has {len(question):,} characters: "
                f"expected at most {MAX_QUESTION_CHARACTERS}; shorten it"
            )
        raw = [word for word in tokenize(" ".join(question.split())) if word]
        if not any(word not in ";," for word in raw):
            raise ValueError('the question is empty: ask, for example, "What color is the large sphere?"')
        return tuple(self._known(word, first=i == 0) for i, word in enumerate(raw))

    def _known(self, word: str, *, first: bool) -> str:
        """The known casing of a word: capitalised if it is the first, else lower, else as it is known."""
        known = self._casings.get(word.lower(), [])
        wanted = (word.capitalize(), word.lower(), word) if first else (word.lower(), word)
        for casing in (*wanted, *known):
            if casing in known:
                return casing
        raise UnknownWordError(word, self.vocabulary.nearest(word))

    def answer(
        self, image: Picture | Seen, question: str, edits: Edits | None = None, top: int = 5
    ) -> Answer:
        """Answer one question about one picture, optionally with γ or β of single channels set.

        edits: {site: {"gamma": {channel: value}, "beta": {channel: value}}}; gamma is the final factor, 1
        leaves the channel alone. top: how many answers to list. ValueError for a bad picture, question or
        edit.
        """
        tokens = self.words(question)
        ids = [START, *(self.vocabulary.questions[token] for token in tokens), END]
        seen = image if isinstance(image, Seen) else self.see(image)
        with torch.inference_mode():
            z = self.model.encode(torch.tensor([ids]), torch.tensor([len(ids)]))
            modulations = edited(self.model.modulations(z), edits or {})
            reasoned = self.model.reason(seen.features, modulations)
        ranked = self._ranked(reasoned.logits[0])
        return Answer(
            answer=ranked[0][0],
            probability=ranked[0][1],
            runner_up=ranked[1][0] if len(ranked) > 1 else "",
            probabilities=tuple(ranked[:top]),
            modulations={site: _lists(modulation) for site, modulation in modulations.items()},
            looked=looked(reasoned.pooled_from[0]),
            tokens=tokens,
        )

    def _ranked(self, logits: Float[Tensor, " answers"]) -> list[tuple[str, float]]:
        """Every real answer with its probability, best first; the special tokens are no answers."""
        words = self.vocabulary.answer_words[len(SPECIALS) :]
        probabilities = logits[len(SPECIALS) :].double().softmax(0).tolist()
        return sorted(zip(words, probabilities, strict=True), key=lambda pair: -pair[1])


def ask(image: Picture, question: str, path: str | Path | None = None, top: int = 5) -> Answer:
    """Answer one question about one picture with the checkpoint in `path`; None: the shipped one.

    Loads the checkpoint for this one question; keep an `Answerer` for more. Errors as `Answerer.answer`.

    Example:
        >>> ask("scene.png", "how many red cubes are left of the sphere?").answer  # doctest: +SKIP
        '2'
    """
    return Answerer.load(path).answer(image, question, top=top)


def looked(maps: Float[Tensor, "channels height width"]) -> list[list[int]]:
    """Count, for each cell, the channels whose global max-pool picked it (Perez et al. 2018, Fig. 4).

    A channel that is nowhere positive picked nothing and is not counted. Ties go to the first cell as read.
    """
    channels, height, width = maps.shape
    best, cell = maps.reshape(channels, -1).max(dim=1)
    counts = torch.bincount(cell[best > 0], minlength=height * width)
    return counts.reshape(height, width).tolist()


def edited(modulations: Mapping[str, Modulation], edits: Edits) -> dict[str, Modulation]:
    """The modulations with single channels of gamma or beta replaced; the given ones are left as they are.

    Raises ValueError for a site, part or channel that there is not, and for a value that is huge or not
    finite.
    """
    for site in edits:
        if site not in modulations:
            raise ValueError(f"edits: no site {site!r}; expected one of {', '.join(modulations)}")
    return {site: _edited(site, modulation, edits.get(site, {})) for site, modulation in modulations.items()}


def _edited(site: str, modulation: Modulation, parts: Mapping[Any, Mapping[Any, float]]) -> Modulation:
    changed: dict[str, Tensor] = {}
    for part, values in parts.items():
        if part not in ("gamma", "beta"):
            raise ValueError(f"edits of {site}: no part {part!r}; expected 'gamma' or 'beta'")
        tensor = (modulation.gamma if part == "gamma" else modulation.beta).clone()
        for channel, value in values.items():
            tensor[:, _channel(channel, tensor.shape[1], f"edits of {site}.{part}")] = _value(
                value, f"{site}.{part}[{channel}]"
            )
        changed[part] = tensor
    return modulation.replace(**changed) if changed else modulation


def _channel(channel: int | str, channels: int, where: str) -> int:
    try:
        index = int(channel)
    except ValueError:
        index = -1
    if not 0 <= index < channels:
        raise ValueError(f"{where}: no channel {channel!r}; expected 0 to {channels - 1}")
    return index


def _value(value: float, where: str) -> float:
    if not math.isfinite(value) or abs(value) > MAX_EDIT:
        raise ValueError(
            f"edit of {where}: expected a number between {-MAX_EDIT:g} and {MAX_EDIT:g}, got {value}"
        )
    return float(value)


def _lists(modulation: Modulation) -> dict[str, list[float]]:
    return {"gamma": modulation.gamma[0].tolist(), "beta": modulation.beta[0].tolist()}


def _load(path: str | Path | None) -> tuple[VisualReasoner, Vocabulary, Perception | None]:
    """Read a bundle or a run's folder; None: the shipped one. Raises ValueError for a baseline."""
    folder = find_bundle(None if path is None else Path(path))
    model = load(folder)
    if not isinstance(model, VisualReasoner):
        raise ValueError(
            f"{folder} holds a baseline, which has no gamma and beta: give a FiLM network's folder"
        )
    perception = load_sight(folder).network if model.config.input == "maps" else None
    return model, Vocabulary.load(folder / "vocab.json"), perception
