import numpy as np
import pytest
import torch

from torchfilm.data.clevr.encoding import NO_ANSWER, EncodedQuestions
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning.data import Curriculum, QuestionBatches, reasoning_steps
from torchfilm.training import Draw

SCENES, PER_SCENE = 7, 5


def encoded(seed: int = 0) -> EncodedQuestions:
    """Five questions about each of seven scenes, in random order; token 1 of each is its own number."""
    rng = np.random.default_rng(seed)
    n = SCENES * PER_SCENE
    lengths = rng.integers(3, 11, n).astype(np.int16)
    tokens = np.zeros((n, 11), np.int16)
    for row, length in enumerate(lengths):
        tokens[row, :length] = 4
    tokens[:, 1] = np.arange(n)
    return EncodedQuestions(
        tokens=tokens,
        lengths=lengths,
        answers=(np.arange(n) % 3).astype(np.int16),
        image_index=rng.permutation(np.repeat(np.arange(SCENES), PER_SCENE)).astype(np.int32),
        families=np.full(n, -1, np.int16),
        types=np.full(n, -1, np.int8),
        programs=np.zeros((n, 1), np.int16),
        program_lengths=np.zeros(n, np.int16),
    )


def pictures() -> torch.Tensor:
    """A picture of each scene whose every value is the number of the scene."""
    return torch.arange(SCENES, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 3, 5).contiguous()


def draw(step: int = 0, *, batch_size: int = 6, rank: int = 0, of: int = 1) -> Draw:
    return Draw(step, 3, 0.0, batch_size, rank, of)


def test_a_question_keeps_its_scene_length_and_answer():
    questions = encoded()
    batches = QuestionBatches(pictures(), questions, questions_per_scene=3)
    for step in range(20):
        batch = batches(draw(step))
        for row in range(6):
            number = int(batch.questions[row, 1])
            scene = int(batch.images[batch.scene_index[row], 0, 0, 0])
            assert scene == questions.image_index[number]
            assert int(batch.lengths[row]) == questions.lengths[number]
            assert int(batch.answers[row]) == questions.answers[number]


def test_every_scene_comes_once_per_epoch():
    batches = QuestionBatches(pictures(), encoded(), questions_per_scene=3)
    seen = [int(image[0, 0, 0]) for step in range(SCENES) for image in batches(draw(step)).images]
    assert sorted(seen[:SCENES]) == sorted(seen[SCENES:]) == list(range(SCENES))


def test_a_batch_is_a_function_of_the_draw():
    first = QuestionBatches(pictures(), encoded(), questions_per_scene=3)
    second = QuestionBatches(pictures(), encoded(), questions_per_scene=3)
    for step in range(5):
        second(draw(step))
    assert torch.equal(first(draw(9)).questions, second(draw(9)).questions)
    assert not torch.equal(first(draw(9)).questions, first(draw(10)).questions)


def test_the_shares_of_two_processes_are_the_whole_batch():
    batches = QuestionBatches(pictures(), encoded(), questions_per_scene=3)
    whole = batches(draw(4))
    parts = [batches(draw(4, rank=rank, of=2)) for rank in range(2)]
    assert torch.equal(torch.cat([part.answers for part in parts]), whole.answers)
    assert torch.equal(torch.cat([part.lengths for part in parts]), whole.lengths)


def test_the_curriculum_starts_with_the_easiest_of_all_questions():
    questions = encoded()
    difficulty = np.arange(len(questions)) % 7
    curriculum = Curriculum(start=2 / 7, hold=6 * 60, until=6 * 90)
    batches = QuestionBatches(
        pictures(), questions, questions_per_scene=1, curriculum=curriculum, difficulty=difficulty
    )
    asked = [int(n) for step in range(60) for n in batches(draw(step)).questions[:, 1]]
    for scene in range(SCENES):
        mine = [n for n in asked if questions.image_index[n] == scene]
        easy = [n for n in range(len(questions)) if questions.image_index[n] == scene and difficulty[n] < 2]
        if easy:
            assert set(mine) == set(easy)
        else:
            assert {difficulty[n] for n in mine} == {difficulty[questions.image_index == scene].min()}
    growing = Curriculum(start=0.4, hold=100, until=500)
    assert [growing.share(n) for n in (0, 100, 300, 500, 900)] == pytest.approx([0.4, 0.4, 0.7, 1.0, 1.0])


def test_questions_without_a_known_answer_are_never_asked():
    questions = encoded()
    questions.answers[:20] = NO_ANSWER
    batches = QuestionBatches(pictures(), questions, questions_per_scene=1)
    asked = {int(n) for step in range(60) for n in batches(draw(step)).questions[:, 1]}
    assert asked == set(range(20, SCENES * PER_SCENE))


def test_reasoning_steps_are_the_nodes_that_do_not_filter():
    vocabulary = Vocabulary.build(
        [
            {
                "question": "What color is the cube?",
                "answer": "red",
                "program": [
                    {"function": "scene", "inputs": [], "value_inputs": []},
                    {"function": "filter_shape", "inputs": [0], "value_inputs": ["cube"]},
                    {"function": "unique", "inputs": [1], "value_inputs": []},
                    {"function": "query_color", "inputs": [2], "value_inputs": []},
                ],
            }
        ]
    )
    questions = encoded()
    program = [vocabulary.programs[word] for word in ("query_color", "unique", "filter_shape[cube]", "scene")]
    programs = np.zeros((len(questions), 4), np.int16)
    programs[0] = program
    with_program = EncodedQuestions(
        **{
            **vars(questions),
            "programs": programs,
            "program_lengths": np.where(np.arange(len(questions)) == 0, 4, 0).astype(np.int16),
        }
    )
    steps = reasoning_steps(with_program, vocabulary)
    assert steps[0] == 3
    assert np.array_equal(steps[1:], questions.lengths[1:])


def test_a_batch_size_that_scenes_do_not_fill_is_refused():
    batches = QuestionBatches(pictures(), encoded(), questions_per_scene=4)
    with pytest.raises(ValueError, match=r"multiple of questions_per_scene=4, got 6"):
        batches(draw())


def test_questions_about_missing_pictures_are_refused():
    with pytest.raises(ValueError, match=r"expected questions about images 0 to 4, got 35 .* up to 6"):
        QuestionBatches(pictures()[:5], encoded())
