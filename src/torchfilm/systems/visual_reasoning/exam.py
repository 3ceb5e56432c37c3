"""Put a network through questions about scenes, in one go or in three steps.

The steps are `modulate` (read the questions), `look` (see the scenes, each once) and `conclude` (answer).
An experiment that changes gamma or beta does so before the last step, and repeats only that one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchfilm import Modulation, Modulations
from torchfilm.data.clevr.encoding import EncodedQuestions
from torchfilm.data.clevr.vocabulary import SPECIALS, Vocabulary

BATCH = 512
Progress = Callable[[int, int], None]
"""Hears how much is done, and of how much."""


def silent(done: int, total: int) -> None:
    """Say nothing of the progress."""


@runtime_checkable
class Pictures(Protocol):
    """What the network sees, by row: uint8 [N, H, W, 3] images, or float [N, C, H, W] features or maps."""

    def __getitem__(self, rows: np.ndarray, /) -> Any: ...
    def __len__(self) -> int: ...


@runtime_checkable
class Reasoner(Protocol):
    """The part of VisualReasoner that is used here."""

    def features(self, images: Tensor) -> Tensor:
        """The stem's maps of the pictures."""
        ...

    def encode(self, questions: Tensor, lengths: Tensor) -> Tensor:
        """One vector per question."""
        ...

    def modulations(self, z: Tensor) -> dict[str, Modulation]:
        """Gamma and beta of each block."""
        ...

    def reason(
        self, features: Tensor, modulations: Mapping[str, Modulation], scene_index: Tensor | None = None
    ) -> Any:
        """The answers' logits, and the maps before the pool as `pooled_from`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of any module."""
        ...

    def eval(self) -> Any:
        """As of any module."""
        ...


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions, the pictures that they are about (row = image_index), and the vocabulary."""

    pictures: Pictures
    questions: EncodedQuestions
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        last = int(self.questions.image_index.max(initial=-1))
        if last >= len(self.pictures):
            raise ValueError(
                f"Exam: expected pictures for image_index 0 to {last}, got {len(self.pictures)} pictures. "
                "Are questions and pictures of the same split?"
            )

    def __len__(self) -> int:
        return len(self.questions)

    def sample(self, number: int, seed: int) -> "Exam":
        """At most `number` questions drawn without replacement, in the order of the file."""
        if number >= len(self):
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self), number, replace=False))
        return replace(self, questions=self.questions.select(rows))


class Looked(NamedTuple):
    """The stem's maps of the scenes that an exam asks about, and for each question the row of its scene."""

    features: Float[Tensor, "scenes channels height width"]
    scene_index: Int[Tensor, " questions"]


def network_input(pictures: Pictures, rows: np.ndarray, device: torch.device) -> Float[Tensor, "rows c h w"]:
    """The pictures `rows` as the network takes them: images in 0..1, channels first; features as they are."""
    found = pictures[rows]
    taken = found if isinstance(found, Tensor) else torch.from_numpy(np.ascontiguousarray(found))
    taken = taken.to(device)
    if taken.dtype == torch.uint8:
        return taken.permute(0, 3, 1, 2).float() / 255
    return taken.float()


def predict(model: nn.Module, exam: Exam, progress: Progress = silent) -> np.ndarray:
    """The answers, numbers int16 [N], of any network `model(images, questions, lengths, scene_index)`.

    Each scene is looked at once per batch of about 512 questions, sorted by scene. The special tokens are
    no answers. progress: hears how many questions are answered.
    """
    model.eval()
    device, done = _device(model), 0
    found = np.empty(len(exam), np.int16)
    with torch.inference_mode():
        for rows in _by_scene(exam.questions.image_index):
            scenes, index = np.unique(exam.questions.image_index[rows], return_inverse=True)
            tokens, lengths = _words(exam.questions, rows, device)
            images = network_input(exam.pictures, scenes, device)
            logits = model(images, tokens, lengths, torch.from_numpy(index).to(device))
            found[rows] = _best(logits)
            done += len(rows)
            progress(done, len(exam))
    return found


def accuracy(model: nn.Module, exam: Exam) -> float:
    """The share of an exam's questions that are answered rightly."""
    return float((predict(model, exam) == exam.questions.answers).mean())


def modulate(model: Reasoner, questions: EncodedQuestions) -> Modulations:
    """Gamma and beta [N, C] of each block for each question, in float32 on the CPU.

    Questions are read sorted by length, so that little padding is read.
    """
    model.eval()
    device = _device(model)
    order = np.argsort(questions.lengths, kind="stable")
    parts: list[dict[str, Modulation]] = []
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            tokens, lengths = _words(questions, order[start : start + BATCH], device)
            found = model.modulations(model.encode(tokens, lengths))
            parts.append({site: m.to("cpu", torch.float32) for site, m in found.items()})
    back = torch.from_numpy(np.argsort(order))
    sites = parts[0] if parts else {}
    return Modulations({site: _joined([part[site] for part in parts])[back] for site in sites})


def look(model: Reasoner, exam: Exam) -> Looked:
    """The stem's maps of every scene of the exam, each computed once, kept on the CPU."""
    model.eval()
    device = _device(model)
    scenes, index = np.unique(exam.questions.image_index, return_inverse=True)
    with torch.inference_mode():
        seen = [
            model.features(network_input(exam.pictures, scenes[start : start + 64], device)).cpu()
            for start in range(0, len(scenes), 64)
        ]
    return Looked(torch.cat(seen), torch.from_numpy(index))


def conclude(
    model: Reasoner, looked: Looked, modulations: Mapping[str, Modulation], progress: Progress = silent
) -> np.ndarray:
    """The answers, numbers int16 [N], from what was seen and the given gamma and beta [N, C].

    progress: hears how many questions are answered.
    """
    found, done = np.empty(len(looked.scene_index), np.int16), 0
    for rows, reasoned in reasoned_batches(model, looked, modulations):
        found[rows] = _best(reasoned.logits)
        done += len(rows)
        progress(done, len(found))
    return found


def reasoned_batches(
    model: Reasoner, looked: Looked, modulations: Mapping[str, Modulation]
) -> Iterator[tuple[np.ndarray, Any]]:
    """What the network makes of the questions, batch by batch: their rows, and logits and last maps."""
    model.eval()
    device = _device(model)
    for rows in _by_scene(looked.scene_index.numpy()):
        taken = torch.from_numpy(rows)
        scenes, index = torch.unique(looked.scene_index[taken], return_inverse=True)
        with torch.inference_mode():
            chosen = {site: m[taken].to(device) for site, m in modulations.items()}
            yield rows, model.reason(looked.features[scenes].to(device), chosen, index.to(device))


def _by_scene(scene_index: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in batches, sorted by scene."""
    order = np.argsort(scene_index, kind="stable")
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _words(questions: EncodedQuestions, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = questions.lengths[rows].astype(np.int64)
    tokens = questions.tokens[rows, : max(1, lengths.max(initial=1))].astype(np.int64)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)


def _best(logits: Float[Tensor, "batch answers"]) -> np.ndarray:
    special = len(SPECIALS)
    return (logits[:, special:].argmax(1) + special).to(torch.int16).cpu().numpy()


def _joined(parts: list[Modulation]) -> Modulation:
    return Modulation(torch.cat([m.gamma for m in parts]), torch.cat([m.beta for m in parts]))


def _device(model: Any) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device
