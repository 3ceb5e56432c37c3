import h5py
import numpy as np
import pytest
from released_folder import records

from torchfilm.data.clevr.encoding import NO_ANSWER, encode_questions
from torchfilm.data.clevr.features import FeatureFile, read_question_file, write_features
from torchfilm.data.clevr.vocabulary import Vocabulary


def test_features_come_in_the_order_asked_with_repeats(tmp_path) -> None:
    stored = np.random.default_rng(0).normal(size=(7, 5, 2, 3)).astype(np.float32)
    write_features(tmp_path / "features.h5", stored)
    with FeatureFile(tmp_path / "features.h5") as features:
        assert features.shape == (7, 5, 2, 3)
        rows = np.array([4, 0, 4, 6])
        assert np.array_equal(features[rows], stored[rows])
        assert features[np.array([], int)].shape == (0, 5, 2, 3)
        with pytest.raises(ValueError, match="another split"):
            features[np.array([7])]


def test_the_originals_question_file_equals_our_own_encoding(tmp_path) -> None:
    v = Vocabulary.build(records("train"))
    ours = encode_questions(records("train"), v)
    programs = np.zeros((6, 11), np.int32)
    for i, length in enumerate(ours.program_lengths):
        programs[i, : length + 2] = [1, *ours.programs[i, :length], 2]
    with h5py.File(tmp_path / "questions.h5", "w") as file:
        file["questions"] = np.pad(ours.tokens.astype(np.int32), ((0, 0), (0, 3)))
        file["image_idxs"], file["orig_idxs"] = ours.image_index, np.arange(6)
        file["programs"], file["question_families"] = programs, ours.families
        file["answers"], file["types"] = ours.answers.astype(np.int32), np.array([9, 9, 9, 9, 9, 9])
    read = read_question_file(tmp_path / "questions.h5", v)
    for name in ("lengths", "answers", "image_index", "families", "types", "programs", "program_lengths"):
        assert np.array_equal(getattr(read, name), getattr(ours, name)), name
    assert np.array_equal(read.tokens[:, : ours.tokens.shape[1]], ours.tokens)
    small = Vocabulary({k: i for i, k in enumerate(list(v.questions)[:5])}, v.programs, v.answers)
    with pytest.raises(ValueError, match="written with this file"):
        read_question_file(tmp_path / "questions.h5", small)


def test_a_question_file_of_a_test_split_has_no_answers(tmp_path) -> None:
    with h5py.File(tmp_path / "test.h5", "w") as file:
        file["questions"], file["image_idxs"] = np.array([[1, 4, 2]]), np.array([3])
    read = read_question_file(tmp_path / "test.h5", Vocabulary.build(records("train")))
    assert read.answers.tolist() == [NO_ANSWER]
    assert read.program_lengths.tolist() == [0]
    assert read.types.tolist() == [-1]


def test_other_files_are_refused(tmp_path) -> None:
    (tmp_path / "no.h5").write_text("text")
    with pytest.raises(ValueError, match="expected an HDF5 file"):
        FeatureFile(tmp_path / "no.h5")
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["features"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\), got features \(2, 3\)"):
        FeatureFile(tmp_path / "flat.h5")
    with pytest.raises(ValueError, match="expected the datasets questions"):
        read_question_file(tmp_path / "flat.h5", Vocabulary.build([]))
