"""A tiny untrained network that knows all of CLEVR's words, and the scenes that the page shows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from torchfilm.app.scenes import FreshScene, RenderedScenes
from torchfilm.data.clevr.questions import QuestionConfig, QuestionGenerator
from torchfilm.data.clevr.scenes import SceneConfig, sample_scene
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning.answering import Answerer
from torchfilm.systems.visual_reasoning.model import VisualReasoner
from torchfilm.systems.visual_reasoning.perception import Perception, PerceptionConfig
from torchfilm.systems.visual_reasoning.recipe import TINY


class RememberedScenes(RenderedScenes):
    """Renders each scene once for all tests."""

    made: ClassVar[dict[int, FreshScene]] = {}

    def make(self, seed: int) -> FreshScene:
        if seed not in self.made:
            self.made[seed] = super().make(seed)
        return self.made[seed]


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng, SceneConfig(max_objects=6))[0] for _ in range(40)]
    vocabulary = Vocabulary.build(QuestionGenerator(QuestionConfig(30)).generate(scenes, rng))
    assert len(vocabulary.questions) == 92, "too few scenes for all words of CLEVR"
    return vocabulary


@pytest.fixture(scope="session")
def answerer(vocabulary: Vocabulary) -> Answerer:
    torch.manual_seed(1)
    config = replace(TINY, vocabulary=len(vocabulary.questions), answers=len(vocabulary.answers))
    model = VisualReasoner(config)
    with torch.no_grad():
        model.classifier.answer.weight.mul_(30)  # untrained, but not undecided
    return Answerer(model, vocabulary, Perception(PerceptionConfig((4, 6, 8), num_blocks=1)))


@pytest.fixture(scope="session")
def scenes() -> RenderedScenes:
    return RememberedScenes()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from browsing import launch

    browser = launch(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()
