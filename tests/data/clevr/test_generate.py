"""Generated folders: same settings, same bytes, whatever happens on the way; nothing of others is harmed."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchfilm.data.clevr import shards
from torchfilm.data.clevr.camera import View
from torchfilm.data.clevr.executor import execute
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.data.clevr.generate import dataset_config, generate_dataset
from torchfilm.data.clevr.render import render

SIZES = {"width": 24, "height": 16, "questions_per_scene": 3}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 5)
    monkeypatch.setattr(shards, "CHUNK", 2)


def generate(out: Path, split: str = "train", num_scenes: int = 7, seed: int = 3, **more):
    return generate_dataset(out, split, num_scenes, seed, workers=more.pop("workers", 1), **{**SIZES, **more})


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a user sees, by its path."""
    files = (path for path in out.rglob("*") if path.is_file() and ".shards" not in path.parts)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 5)
        patch.setattr(shards, "CHUNK", 2)
        result = generate(out)
    assert (result.out, result.split, result.num_scenes, result.num_questions) == (out, "train", 7, 21)
    return out


def test_the_folder_has_the_released_layout_and_the_reader_reads_it(whole):
    names = [f"CLEVR_train_{index:06d}.png" for index in range(7)]
    assert set(contents(whole)) == {
        *(f"images/train/{name}" for name in names),
        *(f"masks/train/{name}" for name in names),
        *(f"{what}/CLEVR_train_{what}.json" for what in ("scenes", "questions", "views")),
        "torchfilm_train.json",
    }
    folder = ClevrFolder(whole)
    found = list(folder.scenes("train"))
    assert [(s["split"], s["image_index"], s["image_filename"]) for s in found] == [
        ("train", index, name) for index, name in enumerate(names)
    ]
    assert folder.image("train", 4).shape == (16, 24, 3)
    info = json.loads((whole / "scenes/CLEVR_train_scenes.json").read_text())["info"]
    assert set(info) == {"split", "version", "date", "license"}


def test_questions_count_through_the_file_and_have_their_answers(whole):
    found = list(ClevrFolder(whole).scenes("train"))
    questions = json.loads((whole / "questions/CLEVR_train_questions.json").read_text())["questions"]
    assert [q["question_index"] for q in questions] == list(range(21))
    assert [q["image_index"] for q in questions] == [index for index in range(7) for _ in range(3)]
    assert all(execute(q["program"], found[q["image_index"]]) == q["answer"] for q in questions)


def test_views_render_the_same_image_and_mask_again(whole):
    views = json.loads((whole / "views/CLEVR_train_views.json").read_text())["views"]
    found = list(ClevrFolder(whole).scenes("train"))
    for scene, record in zip(found, views, strict=True):
        again = render(scene, View.from_dict(record), 24, 16)
        for kind, pixels in (("images", again.image), ("masks", again.mask)):
            stored = np.asarray(Image.open(whole / kind / "train" / record["image_filename"]))
            np.testing.assert_array_equal(stored, pixels)


def test_two_processes_write_the_same_bytes_as_one(whole, tmp_path):
    generate(tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(whole)


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_killed_run_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch, after):
    rendered = []

    def dying(*arguments):
        if len(rendered) == after:
            raise KeyboardInterrupt
        rendered.append(arguments[0]["image_index"])
        return render(*arguments)

    monkeypatch.setattr(shards, "render", dying)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "x")
    monkeypatch.setattr(shards, "render", lambda *a: rendered.append(a[0]["image_index"]) or render(*a))
    generate(tmp_path / "x")
    assert contents(tmp_path / "x") == contents(whole)
    assert rendered == list(range(7))  # nothing is rendered twice


def test_a_run_killed_while_merging_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch):
    replaced, limit = Path.replace, [7 * 2 + 1 + 2 + 1]  # images and masks, settings, shards, the scenes

    def dying(self, target):
        if not limit[0]:
            raise KeyboardInterrupt
        limit[0] -= 1
        return replaced(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path / "x")
    assert (tmp_path / "x/scenes/CLEVR_train_scenes.json").exists()
    assert not (tmp_path / "x/views/CLEVR_train_views.json").exists()
    generate(tmp_path / "x")
    assert contents(tmp_path / "x") == contents(whole)


def test_a_full_disk_is_one_clear_error_and_keeps_what_is_there(whole, tmp_path, monkeypatch):
    replaced, limit = Path.replace, [9]

    def full(self, target):
        if not limit[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        limit[0] -= 1
        return replaced(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match=r"no space left for .*x; what is finished stays"):
            generate(tmp_path / "x")
    kept = contents(tmp_path / "x")
    assert len(kept) == 9
    assert kept.items() - contents(whole).items() == {("torchfilm_train.json", kept["torchfilm_train.json"])}
    generate(tmp_path / "x")
    assert contents(tmp_path / "x") == contents(whole)


def test_a_finished_split_is_left_as_it_is(whole, monkeypatch):
    before, calls = contents(whole), []
    monkeypatch.setattr(shards, "render", None)
    result = generate_dataset(
        whole, "train", 7, 3, workers=1, progress=lambda *now: calls.append(now), **SIZES
    )
    assert result.num_questions == 21
    assert contents(whole) == before
    assert calls == [(7, 7)]


@pytest.mark.parametrize(
    "name",
    ["images/train/CLEVR_train_000003.png", "masks/train/CLEVR_train_000005.png"]
    + [f"{what}/CLEVR_train_{what}.json" for what in ("scenes", "views", "questions")],
)
@pytest.mark.parametrize("content", [None, b""])
def test_what_a_finished_split_has_lost_is_made_again(whole, name, content):
    before = contents(whole)
    (whole / name).unlink()
    if content is not None:
        (whole / name).write_bytes(content)
    generate(whole)
    assert contents(whole) == before


def test_pictures_are_not_written_again_for_lost_masks(whole):
    image = whole / "images" / "train" / "CLEVR_train_000003.png"
    before = image.stat().st_mtime_ns
    shutil.rmtree(whole / "masks")
    generate(whole)
    assert image.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"split 'train' made with seed=3, not 4"),
        ({"num_scenes": 8}, r"num_scenes=7, not 8"),
        ({"width": 48}, r"width=24, not 48"),
        ({"recipe": "full"}, r"max_objects=6, not 10"),
        ({"condition": "A"}, r"condition=None, not 'A'"),
        ({"questions_per_scene": 4}, r"questions_per_scene=3, not 4"),
    ],
)
def test_other_settings_are_refused_by_name_and_touch_nothing(whole, change, message):
    before = contents(whole)
    with pytest.raises(ValueError, match=message):
        generate(whole, **change)
    assert contents(whole) == before


def test_a_folder_of_others_is_refused_and_untouched(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"expected an empty or new folder.*'images' in it"):
        generate(tmp_path)
    assert contents(tmp_path) == {"images/mine.png": b"precious"}
    with pytest.raises(ValueError, match=r"got the file .*mine.png"):
        generate(tmp_path / "images" / "mine.png")
    (tmp_path / "torchfilm_train.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected the settings of a generated split"):
        generate(tmp_path)


def test_splits_share_a_folder_and_no_scenes(whole, tmp_path):
    for split, seed in (("train", 3), ("val", 3)):
        generate(tmp_path, split, 3, seed, questions_per_scene=0)
    generate(tmp_path / "other", "train", 3, 4, questions_per_scene=0)
    folders = [(tmp_path, "train"), (tmp_path, "val"), (tmp_path / "other", "train")]
    objects = [json.dumps(s["objects"]) for root, split in folders for s in ClevrFolder(root).scenes(split)]
    assert len(set(objects)) == 9
    assert not (tmp_path / "questions").exists()


def test_a_longer_split_begins_with_the_scenes_of_a_shorter_one(whole, tmp_path):
    generate(tmp_path / "x", num_scenes=2)
    short = list(ClevrFolder(tmp_path / "x").scenes("train"))
    assert short == list(ClevrFolder(whole).scenes("train"))[:2]


def test_progress_counts_scenes_up_to_all(tmp_path):
    calls = []
    generate(tmp_path / "x", questions_per_scene=0, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 7), (2, 7), (4, 7), (5, 7), (7, 7), (7, 7)]


def test_recipes_are_the_documented_sizes_and_cogent_splits_know_their_condition():
    laptop, full = dataset_config("train", 9, 0), dataset_config("valB", 9, 0, "full")
    assert (laptop.width, laptop.height, laptop.scenes.max_objects, laptop.questions_per_scene) == (
        96,
        64,
        6,
        40,
    )
    assert (full.width, full.height, full.scenes.max_objects, full.questions_per_scene) == (480, 320, 10, 10)
    assert (laptop.scenes.condition, full.scenes.condition) == (None, "B")


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (("train", 5, 0, "paper"), {}, r"recipe: expected one of laptop, full, got 'paper'"),
        (("../train", 5, 0), {}, r"split: expected letters and digits"),
        (("train", 0, 0), {}, r"num_scenes: expected at least 1, got 0"),
        (("train", 5, -1), {}, r"seed: expected at least 0, got -1"),
        (("train", 5, 0), {"width": 8}, r"width: expected at least 16, got 8"),
        (("valB", 5, 0), {"condition": "A"}, r"expected 'B' for CoGenT's split 'valB', got 'A'"),
    ],
)
def test_senseless_settings_are_named(arguments, more, message):
    with pytest.raises(ValueError, match=message):
        dataset_config(*arguments, **more)


def test_no_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"workers: expected at least 1, got 0"):
        generate(tmp_path, workers=0)
