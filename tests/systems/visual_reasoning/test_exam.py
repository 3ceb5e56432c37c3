import numpy as np
import pytest
import torch
from small_exam import small_exam, small_network

from torchfilm.systems.visual_reasoning.exam import (
    Exam,
    conclude,
    look,
    modulate,
    network_input,
    predict,
    reasoned_batches,
)


def one_by_one(network, exam) -> np.ndarray:
    """Each question alone with its picture, without padding."""
    answers = []
    for i in range(len(exam)):
        length = int(exam.questions.lengths[i])
        tokens = torch.from_numpy(exam.questions.tokens[i : i + 1, :length].astype(np.int64))
        picture = torch.from_numpy(exam.pictures[exam.questions.image_index[i]][None])
        logits = network(picture, tokens, torch.tensor([length]))
        answers.append(4 + int(logits[0, 4:].argmax()))
    return np.array(answers)


def test_answers_do_not_depend_on_batching(monkeypatch) -> None:
    exam, network = small_exam(), small_network()
    expected = one_by_one(network, exam)
    assert len(set(expected.tolist())) > 2, "a network that always says the same tests nothing"
    for batch in (512, 7):
        monkeypatch.setattr("torchfilm.systems.visual_reasoning.exam.BATCH", batch)
        assert np.array_equal(predict(network, exam), expected)
        assert np.array_equal(
            conclude(network, look(network, exam), modulate(network, exam.questions)), expected
        )


def test_progress_counts_the_questions_that_are_answered(monkeypatch) -> None:
    exam, network = small_exam(20), small_network()
    monkeypatch.setattr("torchfilm.systems.visual_reasoning.exam.BATCH", 9)
    for answer in (
        lambda hear: predict(network, exam, hear),
        lambda hear: conclude(network, look(network, exam), modulate(network, exam.questions), hear),
    ):
        heard: list[tuple[int, int]] = []
        answer(lambda done, total, heard=heard: heard.append((done, total)))
        assert heard == [(9, 20), (18, 20), (20, 20)]


def test_modulations_belong_to_their_questions() -> None:
    exam, network = small_exam(), small_network()
    modulations = modulate(network, exam.questions)
    assert list(modulations) == ["block1", "block2"]
    for i in (0, 13, 59):
        length = int(exam.questions.lengths[i])
        tokens = torch.from_numpy(exam.questions.tokens[i : i + 1, :length].astype(np.int64))
        alone = network.modulations(network.encode(tokens, torch.tensor([length])))
        for site, m in modulations.items():
            torch.testing.assert_close(m.gamma[i], alone[site].gamma[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(m.beta[i], alone[site].beta[0], rtol=1e-5, atol=1e-5)


def test_every_question_is_in_one_batch_with_its_maps() -> None:
    exam, network = small_exam(), small_network()
    rows = []
    for part, reasoned in reasoned_batches(network, look(network, exam), modulate(network, exam.questions)):
        assert len(reasoned.pooled_from) == len(part)
        rows.extend(part.tolist())
    assert sorted(rows) == list(range(len(exam)))


def test_images_are_scaled_and_features_are_not() -> None:
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    taken = network_input(images, np.array([1]), torch.device("cpu"))
    assert taken.shape == (1, 3, 3, 4)
    assert taken[0, 2, 1, 3].item() == pytest.approx(images[1, 1, 3, 2] / 255)
    features = np.full((2, 5, 3, 4), 7, np.float16)
    assert network_input(features, np.array([0]), torch.device("cpu")).eq(7).all()


def test_a_sample_keeps_order_and_is_the_same_for_the_same_seed() -> None:
    exam = small_exam()
    some, again = exam.sample(20, seed=3), exam.sample(20, seed=3)
    assert len(some) == 20
    assert np.array_equal(some.questions.tokens, again.questions.tokens)
    assert len(exam.sample(99, seed=3)) == 60


def test_questions_about_pictures_that_are_not_there_are_refused() -> None:
    exam = small_exam()
    with pytest.raises(ValueError, match=r"image_index 0 to 6, got 3 pictures"):
        Exam(exam.pictures[:3], exam.questions, exam.vocabulary)
