"""LeRobot's format: what is written can be read, by us and by the layout's rules, whole or not at all."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from torchfilm.data import lerobot
from torchfilm.data.lerobot import LeRobotFolder, Recording, write_lerobot

NAMES = {"observation.state": ("a", "b", "c"), "action": ("x", "y")}
LENGTHS = (5, 2, 7)


def recordings() -> list[Recording]:
    rng = np.random.default_rng(0)
    return [
        Recording(
            {key: rng.normal(size=(length, len(names))).astype(np.float32) for key, names in NAMES.items()},
            f"task {number % 2}",
            {"note": number},
        )
        for number, length in enumerate(LENGTHS)
    ]


def files_of(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def made(tmp_path):
    return write_lerobot(tmp_path / "made", recordings(), 20, NAMES, "arm")


def test_what_was_written_is_read(made):
    folder = LeRobotFolder(made)
    assert len(folder) == 3
    assert folder.fps == 20
    assert folder.tasks == ["task 0", "task 1"]
    for key in NAMES:
        assert np.array_equal(folder.column(key), np.concatenate([r.columns[key] for r in recordings()]))
    assert np.array_equal(folder.column("episode_index"), np.repeat([0, 1, 2], LENGTHS))
    assert np.array_equal(folder.column("task_index"), np.repeat([0, 1, 0], LENGTHS))
    assert np.array_equal(folder.column("index"), np.arange(14))
    assert folder.column("timestamp")[-1] == pytest.approx(6 / 20)
    bounds = [(e["dataset_from_index"], e["dataset_to_index"], e["length"]) for e in folder.episodes]
    assert bounds == [(0, 5, 5), (5, 7, 2), (7, 14, 7)]
    assert [e["note"] for e in folder.episodes] == [0, 1, 2]
    assert [e["tasks"] for e in folder.episodes] == [["task 0"], ["task 1"], ["task 0"]]


def test_the_layout_is_lerobots(made):
    assert set(files_of(made)) == {
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
    }
    info = json.loads((made / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 14, 2)
    assert info["splits"] == {"train": "0:3"}
    assert info["features"]["action"] == {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
    assert info["features"]["index"] == {"dtype": "int64", "shape": [1], "names": None}
    path = info["data_path"].format(chunk_index=0, file_index=0)
    assert pq.read_table(made / path).column_names == list(info["features"])


def test_sentences_are_the_index_of_a_pandas_frame(made):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(made / "meta/tasks.parquet")
    assert frame.index.name == "task"
    assert frame.loc["task 1"].task_index == 1
    assert frame.iloc[0].name == "task 0"


def test_statistics_are_numpys(made):
    stats = json.loads((made / "meta/stats.json").read_text())
    action = np.concatenate([r.columns["action"] for r in recordings()]).astype(np.float64)
    for name, value in (("min", action.min(0)), ("mean", action.mean(0)), ("std", action.std(0))):
        assert np.allclose(stats["action"][name], value)
    assert np.allclose(stats["action"]["q90"], np.quantile(action, 0.9, axis=0))
    assert stats["action"]["count"] == [14]
    row = pq.read_table(made / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert np.allclose(row["stats/action/max"], recordings()[1].columns["action"].max(0))


def test_the_same_recordings_give_the_same_bytes(made, tmp_path):
    again = write_lerobot(tmp_path / "again", recordings(), 20, NAMES, "arm")
    assert files_of(made) == files_of(again)


def test_many_frames_go_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "_FILE_BYTES", 250)
    monkeypatch.setattr(lerobot, "_FILES_PER_CHUNK", 2)
    made = write_lerobot(tmp_path / "many", recordings(), 20, NAMES)
    assert sorted(name for name in files_of(made) if name.startswith("data")) == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-001/file-000.parquet",
    ]
    assert sorted(name for name in files_of(made) if "episodes" in name) == [
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-001.parquet",
        "meta/episodes/chunk-001/file-000.parquet",
    ]
    folder = LeRobotFolder(made)
    for kind in ("data", "meta/episodes"):
        places = [(e[f"{kind}/chunk_index"], e[f"{kind}/file_index"]) for e in folder.episodes]
        assert places == [(0, 0), (0, 1), (1, 0)]
    stats = json.loads((made / "meta/stats.json").read_text())
    assert stats["index"]["max"] == [13]
    assert np.array_equal(
        folder.column("action"), np.concatenate([r.columns["action"] for r in recordings()])
    )


def test_frames_that_are_written_are_kept_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "_FILE_BYTES", 100)
    kept, alive = [], []

    def shown():
        for number in range(6):
            columns = {key: np.full((3, len(names)), number, np.float32) for key, names in NAMES.items()}
            kept.append(weakref.ref(columns["action"]))
            yield Recording(columns, "stay")
            del columns
            alive.append(sum(one() is not None for one in kept))

    write_lerobot(tmp_path / "out", shown(), 20, NAMES)
    assert max(alive) <= 2  # the one that waits for its file, and the one that has just come


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path):
    def broken():
        yield from recordings()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lerobot(tmp_path / "out", broken(), 20, NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_what_another_wrote_in_the_meantime(tmp_path):
    def broken():
        yield from recordings()
        write_lerobot(tmp_path / "out", recordings(), 20, NAMES)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lerobot(tmp_path / "out", broken(), 20, NAMES)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["data", "meta"]


@pytest.mark.parametrize("out", ["link", "empty", "."])
def test_an_empty_folder_is_written_into_wherever_it_leads(made, out, tmp_path, monkeypatch):
    for name in ("large", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("large")
    monkeypatch.chdir(tmp_path / ("empty" if out == "." else "."))
    inode = Path(out).stat().st_ino
    assert files_of(write_lerobot(out, recordings(), 20, NAMES, "arm")) == files_of(made)
    assert Path(out).stat().st_ino == inode, "the folder may be a disk of its own, which nothing replaces"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in Path(out).iterdir()) == ["data", "meta"]


def test_a_writer_that_fails_leaves_an_empty_folder_empty(tmp_path):
    bad = Recording({**recordings()[0].columns, "action": np.full((5, 2), np.nan)}, "stay")
    with pytest.raises(ValueError, match="got nan in frame 0"):
        write_lerobot(tmp_path, [*recordings(), bad], 20, NAMES)
    assert list(tmp_path.iterdir()) == []


def test_recordings_that_do_not_fit_are_named(tmp_path):
    good = recordings()[0].columns
    for columns, pattern in (
        ({**good, "action": good["action"][:3]}, r"episode 0: expected action to be \[frames, 2\]"),
        ({"action": good["action"]}, "episode 0: expected the columns"),
        ({**good, "action": good["action"] * np.nan}, "got nan in frame 0, action 'x'"),
    ):
        with pytest.raises(ValueError, match=pattern):
            write_lerobot(tmp_path / "out", [Recording(columns, "stay")], 20, NAMES)
    with pytest.raises(ValueError, match="recordings: expected at least one episode, got none"):
        write_lerobot(tmp_path / "out", [], 20, NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(made):
    before = files_of(made)
    with pytest.raises(
        ValueError, match=r"expected a new or an empty folder, got .*made\. Nothing was changed"
    ):
        write_lerobot(made, recordings(), 20, NAMES)
    assert files_of(made) == before


def test_damage_is_named(made):
    folder = LeRobotFolder(made)
    with pytest.raises(ValueError, match=r"expected one of observation.state, action, .* got 'colour'"):
        folder.column("colour")
    path = made / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="expected a parquet file, got a damaged or none"):
        folder.column("action")
    path.unlink()
    with pytest.raises(ValueError, match="expected files below data/, got none"):
        folder.column("action")
    info = made / "meta/info.json"
    info.write_text(info.read_text().replace('"total_episodes": 3', '"total_episodes": 4'))
    with pytest.raises(ValueError, match=r"expected 4 episodes, got 3. The copy is not whole"):
        LeRobotFolder(made)
    info.write_text(info.read_text().replace("v3.0", "v2.1"))
    with pytest.raises(ValueError, match=r"expected LeRobot's format v3\.0, got v2\.1\. Convert it"):
        LeRobotFolder(made)
    info.write_text("[")
    with pytest.raises(ValueError, match="expected a JSON object"):
        LeRobotFolder(made)
    info.unlink()
    with pytest.raises(ValueError, match=r"expected a dataset in LeRobot's format, got .* without meta/info"):
        LeRobotFolder(made)


def change_info(root, change) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def change_rows(root, place, change) -> None:
    table = pq.read_table(root / place)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), root / place)


EPISODES, TASKS = "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"


@pytest.mark.parametrize("name", ["features", "total_episodes", "total_frames", "fps"])
def test_an_entry_that_the_dataset_lacks_is_named(made, name):
    change_info(made, lambda info: info.pop(name))
    with pytest.raises(ValueError, match=rf"made: expected all entries of LeRobot's format .*'{name}'"):
        LeRobotFolder(made).column("action")


def test_an_entry_of_another_kind_is_named(made):
    change_info(made, lambda info: info.update(total_frames=None))
    with pytest.raises(ValueError, match=r"made: expected all entries of LeRobot's format .* got TypeError"):
        LeRobotFolder(made).column("action")


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (EPISODES, lambda rows: [row.pop("episode_index") for row in rows], "got KeyError.'episode_index'"),
        (
            EPISODES,
            lambda rows: rows[2].update(episode_index=1),
            r"numbered 0 to 2, got \[0, 1, 1\]",
        ),
        (TASKS, lambda rows: [row.pop("task_index") for row in rows], "expected all entries .*task_index"),
        (TASKS, lambda rows: rows[1].update(task_index=5), r"expected all entries .* got KeyError\(1\)"),
    ],
)
def test_episodes_and_sentences_have_their_numbers(made, place, change, message):
    change_rows(made, place, change)
    with pytest.raises(ValueError, match=message):
        LeRobotFolder(made)


@pytest.mark.parametrize("feature", [{"dtype": "banana", "shape": [2]}, {"dtype": "float32"}])
def test_a_feature_of_no_known_kind_is_refused(made, feature):
    change_info(made, lambda info: info["features"].update(action=feature))
    with pytest.raises(ValueError, match="made: expected all entries of LeRobot's format"):
        LeRobotFolder(made).column("action")
