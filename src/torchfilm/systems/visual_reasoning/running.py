"""From a data folder and a recipe to a trained bundle, measured on questions that were held out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchfilm.data.clevr.encoding import EncodedQuestions
from torchfilm.data.clevr.features import FeatureFile
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.data.clevr.json_stream import Progress
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning import build, describe, loss
from torchfilm.systems.visual_reasoning.baselines import BaselineConfig
from torchfilm.systems.visual_reasoning.bundle import Bundle, Sight, picture_size
from torchfilm.systems.visual_reasoning.data import Curriculum, QuestionBatches, reasoning_steps
from torchfilm.systems.visual_reasoning.evaluate import score
from torchfilm.systems.visual_reasoning.exam import Exam, Pictures, predict
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner
from torchfilm.systems.visual_reasoning.recipe import Feed, Recipe
from torchfilm.systems.visual_reasoning.sights import split_maps
from torchfilm.training import (
    Interrupted,
    TrainConfig,
    TrainResult,
    find_weights,
    first_process,
    load_weights,
    train,
)
from torchfilm.training.folder import digest

HELD_OUT_QUESTIONS = 10_000
"""How many held-out questions a run is measured on."""

WORD_VECTORS = ("encoder.embedding.weight", "encoder.bag.weight")
NEW_WORD_COUNT = 5
"""How often fine-tuning meets a new word before it gets a vector of its own; rarer ones are <UNK>."""


class Rows:
    """Rows as a network takes them, float32 [rows, C, H, W]: of maps, or of uint8 images [N, H, W, 3]."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        """The rows `chosen`."""
        found = self._rows[chosen]
        if found.dtype == np.uint8:
            return np.ascontiguousarray(found.transpose(0, 3, 1, 2), np.float32) / 255
        return np.asarray(found, np.float32)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, eq=False)
class Material:
    """What a run learns from: a data folder, its splits, the words, and for networks over maps a perception.

    `val_split` None measures nothing on the way. `scenes`: only the first so many training scenes are asked
    about; None: all. `progress` hears of a split's pictures being decoded, then seen by the perception:
    how many, of how many. `features`: the folder with given features; None: the data folder.
    """

    folder: ClevrFolder
    vocabulary: Vocabulary
    sight: Sight | None = None
    train_split: str = "train"
    val_split: str | None = "val"
    scenes: int | None = None
    progress: Progress | None = None
    features: Path | None = None

    def pictures(self, config: ReasonerConfig | BaselineConfig, split: str) -> Pictures:
        """What a network of this config sees of a split, by row: given features, maps, or pixels.

        Features are read from SPLIT_features.h5, as the original's extraction names them.
        """
        if config.input == "features":
            path = (self.features or self.folder.root) / f"{split}_features.h5"
            if not path.is_file():
                raise ValueError(
                    f"expected the features of the split {split!r} in {path}, found no such file. "
                    "Name their folder with --features, extract them as the paper does, or train a recipe "
                    "over pixels or maps."
                )
            return FeatureFile(path)
        if config.input == "pixels":
            return Rows(self._images(split, config.input_height, config.input_width))
        if self.sight is None:
            raise ValueError(
                "expected a perception for a network over maps, got none. Train one with "
                "`torchfilm train visual_reasoning --recipe perception` and give its folder as --perception."
            )
        return Rows(split_maps(self.sight, self._images(split, *picture_size(config)), self.progress))

    def _images(self, split: str, height: int, width: int) -> np.ndarray:
        return self.folder.images(split, height, width, progress=self.progress)

    def warm(self, config: ReasonerConfig | BaselineConfig) -> None:
        """Decode both splits' pictures and let the perception look; later they are read from files."""
        for split in (self.train_split, self.val_split):
            if split is not None:
                self.pictures(config, split)

    def exam(self, config: ReasonerConfig | BaselineConfig, split: str) -> Exam:
        """All questions of a split, and what the network sees of its scenes."""
        return Exam(
            self.pictures(config, split), self.folder.encoded(split, self.vocabulary), self.vocabulary
        )

    def learned_from(self) -> dict[str, Any]:
        """The splits learned from and measured on, and digests of their questions, answers and scenes."""
        splits = {"train": self.train_split, "held_out": self.val_split}
        asked = {s: self.folder.encoded(s, self.vocabulary) for s in splits.values() if s is not None}
        return {
            "splits": splits,
            "questions": {s: digest(q.tokens, q.answers, q.image_index) for s, q in asked.items()},
        }

    def training_questions(self) -> EncodedQuestions:
        """The questions that training asks."""
        questions = self.folder.encoded(self.train_split, self.vocabulary)
        return questions if self.scenes is None else questions.select(questions.image_index < self.scenes)

    def batches(
        self, config: ReasonerConfig | BaselineConfig, feed: Feed, questions: EncodedQuestions | None = None
    ) -> QuestionBatches:
        """The training split as a network of this config is fed with it; questions: None asks all."""
        asked = self.training_questions() if questions is None else questions
        return QuestionBatches(
            self.pictures(config, self.train_split),  # type: ignore[arg-type]
            asked,
            questions_per_scene=feed.questions_per_scene,
            curriculum=feed.curriculum,
            difficulty=reasoning_steps(asked, self.vocabulary),
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """A trained bundle, and how its training went: held-out accuracy 0..1, where there were questions."""

    bundle: Bundle
    result: TrainResult

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        measured = dict(self.result.evaluation)
        number = measured.pop("n", 0.0)
        return {
            "recipe": self.bundle.recipe,
            "steps": self.result.steps,
            "seconds": round(self.result.seconds, 1),
            "loss": self.result.train.get("loss"),
            "accuracy": measured.pop("accuracy", None),
            "by_kind": measured,
            "n": int(number),
        }


def budgeted(
    training: TrainConfig,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> TrainConfig:
    """The training with another budget and seed; None leaves them as they are."""
    if minutes is not None and steps is not None:
        raise ValueError(
            f"expected one budget, got minutes={minutes:g} and steps={steps}. Give one of the two."
        )
    changed: dict[str, Any] = {} if seed is None else {"seed": seed}
    if minutes is not None:
        changed |= {"minutes": minutes, "steps": None}
    if steps is not None:
        changed |= {"steps": steps, "minutes": None}
    return replace(training, **changed)


def fitted(
    config: ReasonerConfig | BaselineConfig, vocabulary: Vocabulary
) -> ReasonerConfig | BaselineConfig:
    """The config with as many words and answers as the vocabulary has."""
    return replace(config, vocabulary=len(vocabulary.questions), answers=len(vocabulary.answers))


def train_bundle(
    name: str,
    recipe: Recipe,
    material: Material,
    out: Path,
    *,
    resume: bool = False,
    start: nn.Module | None = None,
    questions: EncodedQuestions | None = None,
) -> Outcome:
    """Train a recipe in the run folder `out` and leave its bundle in `out`/model, also when interrupted.

    start: a network whose weights to begin with (fine-tuning), which knows the first words of the vocabulary,
    so that there is no curriculum; None: fresh weights. questions: what to ask instead of all of the training
    split's. Under torchrun only rank 0 writes.
    """
    feed = recipe.feed if start is None else replace(recipe.feed, curriculum=Curriculum())
    config = fitted(recipe.config, material.vocabulary)
    torch.manual_seed(recipe.training.seed)
    network = build(config)
    if start is not None:
        _begin_with(network, start)
    if recipe.trained == "generator":
        _freeze_what_sees(network)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as its inputs: see model.py
    bundle = Bundle(name, network, material.vocabulary, material.sight)
    try:
        result = train(
            network,
            loss,
            material.batches(config, feed, questions),
            recipe.training,
            out,
            evaluate=_held_out(material, config),
            resume=resume,
            extra_config={
                "recipe": name,
                "network": describe(config),
                "vocabulary": material.vocabulary.digest,
                "perception": None if material.sight is None else material.sight.digest,
                "feed": asdict(feed),
                "scenes": material.scenes,
                "data": material.learned_from(),
                **({} if recipe.trained == "all" else {"trained": recipe.trained}),
            },
        )
    except Interrupted:
        if first_process():
            load_weights(find_weights(out), network)
            bundle.save(out / "model")
        raise
    if first_process():
        bundle.save(out / "model")
    network.eval()
    return Outcome(bundle, result)


def _begin_with(network: nn.Module, start: nn.Module) -> None:
    """Give the network the weights of `start`; words that it did not know keep their fresh vectors."""
    state, fresh = dict(start.state_dict()), network.state_dict()
    for name in WORD_VECTORS:
        if name in state:
            known = state[name]
            state[name] = torch.cat([known, fresh[name][len(known) :].to(known.device)])
    network.load_state_dict(state)


def _freeze_what_sees(network: nn.Module) -> None:
    """Fix stem, blocks and classifier, their BatchNorm included; the training loop keeps their mode."""
    if not isinstance(network, VisualReasoner):
        raise ValueError(
            "expected a FiLM network to train the generator of, got a baseline, which has none. Train it all."
        )
    for part in (network.stem, network.blocks, network.classifier):
        part.eval().requires_grad_(requires_grad=False)


def compilable() -> bool:
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["c++", "g++", "clang++"]))


def _held_out(
    material: Material, config: ReasonerConfig | BaselineConfig
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """Accuracy on the held-out split, over all and by kind; None where there is no such split."""
    if material.val_split is None:
        return None
    exam = material.exam(config, material.val_split).sample(HELD_OUT_QUESTIONS, seed=0)

    def measure(network: nn.Module) -> dict[str, float]:
        report = score(exam, predict(network, exam))
        return {"accuracy": report.accuracy, **report.by_kind, "n": report.n}

    return measure
