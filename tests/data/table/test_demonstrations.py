"""Demonstrations: the same seed, the same bytes; what is read is what was shown."""

import shutil

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from torchfilm.app import cli
from torchfilm.data.lerobot import LeRobotFolder, Recording, write_lerobot
from torchfilm.data.table import demonstrations
from torchfilm.data.table.demonstrations import generate_demonstrations, read_demonstrations
from torchfilm.data.table.trials import STATE_NAMES, Trials


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return generate_demonstrations(tmp_path_factory.mktemp("table") / "made", 12, seed=5)


def bytes_of(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(made, tmp_path):
    again = generate_demonstrations(tmp_path / "again", 12, seed=5)
    other = generate_demonstrations(tmp_path / "other", 12, seed=6)
    assert bytes_of(made.out) == bytes_of(again.out)
    assert bytes_of(made.out) != bytes_of(other.out)


def test_more_episodes_begin_with_the_fewer(made, tmp_path):
    more = read_demonstrations(generate_demonstrations(tmp_path / "more", 14, seed=5).out)
    few = read_demonstrations(made.out)
    assert more.episodes[:12] == few.episodes
    assert np.array_equal(more.action[: made.num_frames], few.action)


def test_playing_the_actions_again_gives_the_same_states_and_outcomes(made):
    shown = read_demonstrations(made.out)
    assert (len(shown.episodes), len(shown.action), shown.fps) == (12, made.num_frames, 20)
    for i, episode in enumerate(shown.episodes):
        trials = Trials([episode.scene], [episode.tasks])
        for frame in range(shown.starts[i], shown.starts[i + 1]):
            assert np.allclose(trials.state[0, 0], shown.state[frame], atol=2e-5)
            assert np.allclose(trials.environment[0, 0], shown.environment[frame], atol=2e-5)
            trials.step(shown.action[None, None, frame].astype(np.float64))
        assert trials.outcomes(0)[0].success
        assert trials.outcomes(0)[0].energy == pytest.approx(shown.outcomes[i].energy, rel=1e-3)


def test_some_instructions_alone(tmp_path):
    made = generate_demonstrations(tmp_path / "some", 5, seed=0, what="reach", by=("colour",), num_things=2)
    shown = read_demonstrations(made.out)
    assert {(e.tasks[0].what, e.told[0].by) for e in shown.episodes} == {("reach", "colour")}


def test_any_reader_of_the_format_finds_the_sentences(made):
    folder, shown = LeRobotFolder(made.out), read_demonstrations(made.out)
    tasks = folder.column("task_index")
    for start, episode in zip(shown.starts, shown.episodes, strict=False):
        assert folder.tasks[tasks[start]] == episode.told[0].text
    assert folder.features["observation.state"]["names"] == list(STATE_NAMES)


def test_noise_disturbs_the_arm_and_the_answers_stay_the_experts(tmp_path):
    noisy = read_demonstrations(generate_demonstrations(tmp_path / "noisy", 8, seed=1, noise=0.01).out)
    calm = read_demonstrations(generate_demonstrations(tmp_path / "calm", 8, seed=1).out)
    assert all(outcome.success for outcome in noisy.outcomes)
    assert np.array_equal(noisy.action[0], calm.action[0])
    assert not np.array_equal(noisy.state[1], calm.state[1])


def test_mistakes_are_named_and_change_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstrations, "_ATTEMPTS", 1)
    for options, pattern in (
        ({"num_episodes": 0, "seed": 0}, "num_episodes: expected at least 1, got 0"),
        ({"num_episodes": 1, "seed": -1}, "seed: expected at least 0, got -1"),
        ({"num_episodes": 1, "seed": 0, "noise": float("nan")}, "noise: expected at least 0, got nan"),
        ({"num_episodes": 1, "seed": 0, "noise": float("inf")}, "noise: expected a finite number .* inf"),
    ):
        with pytest.raises(ValueError, match=pattern):
            generate_demonstrations(tmp_path / "new", **options)
    with pytest.raises(ValueError, match=r"noise: expected one that experts can cope with, got 2\.0 m"):
        generate_demonstrations(tmp_path / "new", 3, seed=0, noise=2.0)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="expected a new or an empty folder"):
        generate_demonstrations(made.out, 1, seed=0)
    alien = write_lerobot(
        tmp_path / "alien", [Recording({"action": np.ones((2, 1))}, "x")], 9, {"action": "a"}
    )
    with pytest.raises(ValueError, match="expected demonstrations made by `torchfilm data table`"):
        read_demonstrations(alien)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("torchfilm/told", None, "expected all entries .* got TypeError"),
        ("torchfilm/scene", "{", "expected all entries .* got JSONDecodeError"),
        ("torchfilm/outcome", '{"a": 1}', "expected all entries .* got TypeError"),
        ("dataset_from_index", 0, "expected frames in the order of index and episode_index"),
    ],
)
def test_a_damaged_row_of_an_episode_is_named(made, tmp_path, name, value, message):
    shutil.copytree(made.out, tmp_path / "new")
    path = tmp_path / "new/meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[3][name] = value
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=f"new: {message}"):
        read_demonstrations(tmp_path / "new")


def test_frames_in_another_order_are_refused(made, tmp_path):
    shutil.copytree(made.out, tmp_path / "new")
    path = tmp_path / "new/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    with pytest.raises(ValueError, match="new: expected frames in the order of index and episode_index"):
        read_demonstrations(tmp_path / "new")


def test_the_command_makes_them(tmp_path, capsys):
    out = tmp_path / "by-command"
    assert cli.main(["data", "table", str(out), "--episodes", "3", "--seed", "2"]) == 0
    assert "3 demonstrations" in capsys.readouterr().out
    assert len(read_demonstrations(out).episodes) == 3
    assert cli.main(["data", "table", str(out), "--scenes", "3"]) == 2
    assert "--scenes says nothing to the world 'table'" in capsys.readouterr().err
