"""A small exam of random questions of all 13 types, and a tiny network with random weights everywhere."""

import numpy as np
import torch

from torchfilm.data.clevr.encoding import encode_questions
from torchfilm.data.clevr.question_types import TYPES
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning.exam import Exam
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner

ANSWERS = ("yes", "no", "0", "1", "2", "3", "cube", "red")
WORDS = ["red", "cyan", "cube", "sphere", "left", "of", "the", "thing", "are", "there", "how", "many"]


def small_records(number: int = 60, scenes: int = 7) -> list[dict]:
    rng = np.random.default_rng(5)
    records = []
    for i in range(number):
        kind = TYPES[i % len(TYPES)]
        program = [{"function": "scene", "inputs": [], "value_inputs": []}]
        for before in range(int(rng.integers(3))):
            program.append({"function": "filter_color", "inputs": [before], "value_inputs": ["red"]})
        answers = ANSWERS[2:6] if kind == "count" else ANSWERS
        records.append(
            {
                "question": " ".join(rng.choice(WORDS, int(rng.integers(3, 9)))),
                "answer": str(rng.choice(answers)),
                "image_index": int(rng.integers(scenes)),
                "question_family_index": int(rng.integers(90)),
                "program": [*program, {"function": kind, "inputs": [len(program) - 1], "value_inputs": []}],
            }
        )
    return records


def small_vocabulary() -> Vocabulary:
    return Vocabulary.build([*small_records(), {"question": " ".join(WORDS), "answer": "3"}])


def small_exam(number: int = 60, scenes: int = 7) -> Exam:
    pictures = np.random.default_rng(2).normal(size=(scenes, 6, 4, 5)).astype(np.float32)
    vocabulary = small_vocabulary()
    return Exam(pictures, encode_questions(small_records(number, scenes), vocabulary), vocabulary)


def small_network(seed: int = 0, blocks: int = 2) -> VisualReasoner:
    vocabulary = small_vocabulary()
    torch.manual_seed(seed)
    config = ReasonerConfig(
        vocabulary=len(vocabulary.questions),
        word_dim=3,
        encoder_width=11,
        input_channels=6,
        input_height=4,
        input_width=5,
        blocks=blocks,
        channels=8,
        projection=9,
        hidden=10,
        answers=len(vocabulary.answers),
    )
    network = VisualReasoner(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        network.eval()
        questions = small_exam().questions
        tokens, lengths = (
            torch.from_numpy(a.astype(np.int64)) for a in (questions.tokens, questions.lengths)
        )
        pictures = torch.from_numpy(np.asarray(small_exam().pictures))
        logits = network(pictures, tokens, lengths, torch.from_numpy(questions.image_index.astype(np.int64)))
        network.classifier.answer.bias -= logits.mean(0)
    return network
