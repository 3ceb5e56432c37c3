import errno
import json
import os
import shutil
import tokenize
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from released_folder import records, write_folder, write_questions

from torchfilm.data.clevr.encoding import NO_ANSWER, EncodedQuestions, encode_questions
from torchfilm.data.clevr.files import ClevrFolder, read_image
from torchfilm.data.clevr.json_stream import stream_array
from torchfilm.data.clevr.question_types import TYPES, family
from torchfilm.data.clevr.vocabulary import Vocabulary


@pytest.fixture
def folder(tmp_path) -> ClevrFolder:
    return ClevrFolder(write_folder(tmp_path / "CLEVR_v1.0", ("train", "val")))


def test_a_released_folder_is_read_as_it_was_written(folder) -> None:
    assert folder.splits() == ["train", "val"]
    assert list(folder.questions("val")) == records("val")
    assert [len(s["objects"]) for s in folder.scenes("train")] == [0, 1, 2]
    assert folder.scene("val", 2)["image_index"] == 2


def test_cogent_splits_are_splits_like_any_other(tmp_path) -> None:
    names = ("testA", "testB", "trainA", "valA", "valB")
    folder = ClevrFolder(write_folder(tmp_path / "cogent", names, key="relations"))
    assert folder.splits() == list(names)
    assert list(folder.questions("valB"))[3]["split"] == "valB"
    assert next(folder.scenes("testA"))["relationships"] == {"left": []}, (
        "the key that the release's README names"
    )


def test_humans_questions_refer_to_the_images_of_another_folder(folder, tmp_path) -> None:
    humans = tmp_path / "CLEVR-Humans"
    asked = [
        {
            "question": "Is a zebra red?",
            "image_filename": "CLEVR_val_000002.png",
            "answer": "2",
            "split": "val",
        }
    ]
    write_questions(humans / "CLEVR-Humans-val.json", asked)
    read = ClevrFolder(humans, images_from=folder.root)
    assert read.splits() == ["val"]
    assert list(read.questions("val")) == [{**asked[0], "image_index": 2}]
    assert np.array_equal(read.image("val", 2), folder.image("val", 2))
    with pytest.raises(ValueError, match="images_from"):
        ClevrFolder(humans).image_files("val")


def test_encoded_questions_hold_what_the_file_says(folder, tmp_path) -> None:
    v = Vocabulary.build(folder.questions("train"))
    read = folder.encoded("train", v, cache=tmp_path / "cache")
    expected = records("train")
    assert len(read) == len(expected) == 6
    for i, record in enumerate(expected):
        assert v.decode(read.tokens[i]) + "?" == record["question"]
        assert read.lengths[i] == np.count_nonzero(read.tokens[i])
        assert v.answer_words[read.answers[i]] == record["answer"]
        assert read.image_index[i] == record["image_index"]
        assert read.families[i] == record["question_family_index"]
        assert TYPES[read.types[i]] == record["program"][-1]["function"]
        assert read.program_lengths[i] == len(record["program"])
    prefix = [v.program_words[t] for t in read.programs[2]]
    count = "count filter_shape[cube] scene count filter_color[cyan] scene"
    assert prefix == ["less_than", *count.split()], "prefix order: the last node, then its inputs"


def test_the_cache_gives_the_same_arrays_and_notices_a_changed_source(folder) -> None:
    v = Vocabulary.build(folder.questions("train"))
    first = folder.encoded("train", v)
    (kept,) = (folder.root / ".cache").iterdir()
    again = folder.encoded("train", v)
    assert all(np.array_equal(getattr(first, k), getattr(again, k)) for k in vars(first))
    path = folder.root / "questions" / "CLEVR_train_questions.json"
    write_questions(path, records("train")[:4])
    os.utime(path, ns=(1, 1))
    assert len(folder.encoded("train", v)) == 4
    (newer,) = (folder.root / ".cache").iterdir()
    assert newer != kept, "the cache of the older source is gone, and no part file is left"
    assert len(folder.encoded("train", v.expand([{"question": "zebra"}]))) == 4
    assert len(list((folder.root / ".cache").iterdir())) == 2, "each vocabulary has its own"


def test_a_broken_cache_is_named(folder) -> None:
    v = Vocabulary.build(folder.questions("train"))
    folder.encoded("train", v)
    (kept,) = (folder.root / ".cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    with pytest.raises(ValueError, match="Delete the file"):
        folder.encoded("train", v)


@pytest.mark.parametrize(
    "error", [tokenize.TokenError("EOF"), zlib.error("-3"), NotImplementedError("method 99"), OSError("seek")]
)
def test_whatever_numpy_makes_of_a_broken_cache_is_told(tmp_path, error, monkeypatch) -> None:
    (tmp_path / "a.npz").touch()
    monkeypatch.setattr(np, "load", lambda _: raised(error))
    with pytest.raises(
        ValueError, match=r"a\.npz: expected a cache of encoded questions, got .*Delete the file"
    ):
        EncodedQuestions.load(tmp_path / "a.npz")


def raised(error: Exception) -> None:
    raise error


def test_the_public_generators_keys_and_answers_are_read_as_released(tmp_path) -> None:
    record = records("val")[0]
    record["program"] = [
        {"type": n["function"], "inputs": n["inputs"], "side_inputs": n["value_inputs"], "_output": 3}
        for n in record["program"]
    ]
    record |= {"answer": 2, "template_filename": "zero_hop.json", "question_family_index": 0}
    unknown = record | {"question_family_index": -1}
    write_questions(tmp_path / "questions" / "CLEVR_test_questions.json", [unknown])
    assert next(iter(ClevrFolder(tmp_path).questions("test")))["question_family_index"] == -1
    write_questions(tmp_path / "questions" / "CLEVR_val_questions.json", [record])
    (read,) = ClevrFolder(tmp_path).questions("val")
    assert read["program"] == records("val")[0]["program"]
    assert read["answer"] == "2"
    assert family(read) == 84
    assert family({}) == -1
    assert family({"template_filename": "three_hop.json", "question_family_index": 2}) == 27


def test_a_test_split_without_answers_and_programs_is_read(tmp_path) -> None:
    v = Vocabulary.build(records("train"))
    bare = [{k: r[k] for k in ("question", "image_index", "split")} for r in records("test")]
    read = encode_questions(bare, v)
    assert not read.answered.any()
    assert set(read.answers.tolist()) == {NO_ANSWER}
    assert set(read.types.tolist()) == {-1}
    assert read.programs.shape == (6, 1)
    assert set(read.program_lengths.tolist()) == {0}


def test_an_answer_that_training_never_saw_is_wrong_and_no_crash() -> None:
    v = Vocabulary.build(records("train"))
    read = encode_questions([{**records("val")[0], "answer": "purple"}], v)
    assert read.answers.tolist() == [NO_ANSWER]
    assert not read.answered.any()


def test_images_have_the_asked_size_and_are_decoded_once(folder) -> None:
    images = folder.images("train", 20, 30)
    assert images.shape == (3, 20, 30, 3)
    assert images.dtype == np.uint8
    path = folder.root / "images" / "train" / "CLEVR_train_000001.png"
    by_hand = Image.open(path).convert("RGB").resize((30, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(images[1], np.asarray(by_hand))
    (kept,) = (folder.root / ".cache").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert np.array_equal(folder.images("train", 20, 30), images)
    assert kept.stat().st_mtime_ns == stamp
    assert folder.image("train", 0).shape == (320, 480, 3)


def test_progress_of_reading_ends_with_the_last_byte_and_the_last_picture(folder) -> None:
    size = (folder.root / "questions" / "CLEVR_train_questions.json").stat().st_size
    heard: list[tuple[int, int]] = []
    words = folder.vocabulary("train", progress=lambda *done: heard.append(done))
    folder.encoded("train", words, progress=lambda *done: heard.append(done))
    assert set(heard) == {(size, size)}
    heard.clear()
    folder.images("train", 20, 30, progress=lambda *done: heard.append(done))
    assert heard == [(3, 3)]


def test_selecting_keeps_rows_together() -> None:
    read = encode_questions(records("train"), Vocabulary.build(records("train")))
    some = read.select(np.array([4, 1]))
    assert some.families.tolist() == [89, 89]
    assert some.image_index.tolist() == [2, 0]
    with pytest.raises(ValueError, match="one row per question"):
        EncodedQuestions(**{**vars(read), "answers": read.answers[:3]})


def test_streaming_needs_memory_for_one_window_only(tmp_path) -> None:
    path = tmp_path / "big.json"
    item = {"question": "x" * 900, "number": 0}
    path.write_text(json.dumps({"info": {"n": 12}, "questions": [item | {"number": i} for i in range(9000)]}))
    tracemalloc.start()
    assert [q["number"] for q in stream_array(path, "questions")] == list(range(9000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size * 0.25


@pytest.mark.parametrize("cut", [1, 2, 30, 700])
def test_a_truncated_file_says_after_how_many_items(tmp_path, cut) -> None:
    path = tmp_path / "questions" / "CLEVR_val_questions.json"
    write_questions(path, records("val"))
    path.write_text(path.read_text()[: -cut - 1])
    with pytest.raises(
        ValueError, match=r"CLEVR_val_questions\.json: expected .* after [3456] complete items"
    ):
        list(ClevrFolder(tmp_path).questions("val"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected '{'"),
        ("[1]", "expected '{'"),
        ('{"scenes": []}', "expected the key 'questions', got the keys"),
        ('{"questions": {}}', "expected an array"),
        ('{"info": 12', "expected '}'"),
        ('{"questions": [{"question": "a?"}]}', "question 0 needs"),
        ('{"questions": [{"question": "a?", "image_filename": "a.jpg"}]}', "question 0 needs"),
        ('{"questions": [3]}', "question 0 needs"),
        ('{"questions": [{"question": "a?", "image_index": null}]}', "question 0 needs"),
        ('{"questions": [{"question": "a?", "image_index": -1}]}', "expected image_index from 0 to"),
        ('{"questions": [{"question": "a?", "image_index": 1.7}]}', "expected image_index from 0 to .* 1.7"),
        ('{"questions": [{"question": "a?", "image_index": "x"}]}', "expected image_index from 0 to"),
        (f'{{"questions": [{{"question": "a?", "image_index": {10**12}}}]}}', "got 1000000000000"),
        (
            '{"questions": [{"question": "a?", "image_index": 0, "question_family_index": 40000}]}',
            r"_questions\.json: question 0 .*expected question_family_index from -1 to 32767, got 40000",
        ),
        (
            f'{{"questions": [{{"question": "{"a " * 20000}", "image_index": 0}}]}}',
            "question of fewer than 32768 characters",
        ),
        ('{"questions": [' + "[" * 100_000, "nested less deeply"),
        ('{"questions": [\udcff', "expected text in UTF-8"),
        (f'{{"questions": [{"9" * 6000}', r"_questions\.json: expected numbers of fewer digits"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "CLEVR_val_questions.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        list(ClevrFolder(tmp_path).questions("val"))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"type": "exist", "value_inputs": 5}, "questions and programs as CLEVR's, got TypeError"),
        ({}, "a program node needs 'function' or 'type'"),
    ],
)
def test_a_program_of_another_kind_is_named_with_its_file(tmp_path, node, said) -> None:
    path = tmp_path / "questions" / "CLEVR_val_questions.json"
    write_questions(path, [{"question": "a?", "image_index": 0, "program": [node]}])
    for read in (lambda: ClevrFolder(tmp_path).vocabulary("val"), lambda: encoded(tmp_path)):
        with pytest.raises(
            ValueError, match=rf"CLEVR_val_questions\.json: .*{said}|CLEVR_val_questions\.json: {said}"
        ):
            read()


def encoded(root) -> EncodedQuestions:
    return ClevrFolder(root).encoded("val", Vocabulary.build([]))


def test_an_empty_list_of_questions_is_no_error(tmp_path) -> None:
    write_questions(tmp_path / "questions" / "CLEVR_val_questions.json", [])
    assert len(ClevrFolder(tmp_path).encoded("val", Vocabulary.build([]))) == 0


def test_a_missing_folder_split_or_image_is_named_with_what_is_there(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="not there"):
        ClevrFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'test', got none. Splits there: train, val"):
        next(folder.questions("test"))
    with pytest.raises(ValueError, match="Splits there: train, val"):
        folder.images("test", 20, 30)
    with pytest.raises(ValueError, match="000007"):
        folder.image("train", 7)
    with pytest.raises(ValueError, match="image_index 7"):
        folder.scene("train", 7)
    (folder.root / "images" / "val" / "CLEVR_val_000001.png").unlink()
    with pytest.raises(ValueError, match="the first missing is number 1"):
        folder.images("val", 20, 30)


def test_a_broken_image_is_named_and_leaves_no_cache(folder) -> None:
    path = folder.root / "images" / "val" / "CLEVR_val_000001.png"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"CLEVR_val_000001\.png: expected an image"):
        folder.images("val", 20, 30)
    assert list((folder.root / ".cache").iterdir()) == []
    with pytest.raises(ValueError, match="expected an image"):
        read_image(folder.root / "questions" / "CLEVR_val_questions.json")


def test_a_picture_that_is_too_large_or_cut_is_named(tmp_path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (20, 20)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    for damaged in (content, content[:8] + b"\0\0\0\x05IHDR" + content[16:21] + b"\0" * 9):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.png: expected an image, got .*Copy or generate it again"):
            read_image(path)


def test_a_grey_picture_of_16_bits_is_that_of_8(tmp_path) -> None:
    ramp = np.linspace(0, 65535, 60)[None].repeat(40, 0).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "8.png")
    assert np.array_equal(read_image(tmp_path / "16.png"), read_image(tmp_path / "8.png"))


def test_a_damaged_cache_says_that_it_can_be_deleted(folder) -> None:
    def read() -> None:
        folder.encoded("val", folder.vocabulary("val"))
        folder.images("val", 20, 30)

    read()
    for path in sorted((folder.root / ".cache").iterdir()):
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"other bytes"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{path.name}: expected a cache .* Delete the file"):
                read()
        path.unlink()
        read()


def test_pictures_on_a_full_disk_are_one_clear_error_and_leave_no_draft(folder, monkeypatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"no space left for .*images-val-.*npy\. Free some space"):
        folder.images("val", 20, 30)
    assert list((folder.root / ".cache").iterdir()) == []


def test_a_picture_that_was_exchanged_is_decoded_again(folder) -> None:
    before = np.array(folder.images("val", 20, 30))
    files = folder.image_files("val")
    shutil.copy(files[0], files[1])
    os.utime(files[1], ns=(0, 0))
    after = folder.images("val", 20, 30)
    assert np.array_equal(after[1], before[0])
    assert not np.array_equal(before[1], before[0])


def test_a_cache_that_cannot_be_written_says_how_to_name_another(folder, tmp_path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match="Name another folder with cache="):
        folder.images("val", 20, 30, cache=tmp_path / "taken")


def test_a_program_that_runs_in_a_circle_is_refused() -> None:
    record = records("train")[0]
    record["program"] = [{"function": "count", "inputs": [0], "value_inputs": []}]
    with pytest.raises(ValueError, match="circle"):
        encode_questions([record], Vocabulary.build([]))
    record["program"] = [{"inputs": []}]
    with pytest.raises(ValueError, match="'function' or 'type'"):
        encode_questions([record], Vocabulary.build([]))
