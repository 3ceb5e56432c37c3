"""What demonstrations teach about ways: round what thing and finger went."""

import numpy as np
import pytest

from torchfilm.data.table.demonstrations import generate_demonstrations, read_demonstrations
from torchfilm.systems.diffusion_policy.plans import Plans, turn_of

for package in ("mujoco", "pyarrow"):
    pytest.importorskip(package)

POST, BALL = ((0.0, 0.0), 0.05), ((0.3, 0.1), 0.03)


@pytest.mark.parametrize(
    ("path", "at", "expected"),
    [
        ([(-0.3, 0.0), (0.5, 0.0)], (-0.3, 0.0), 0),
        ([(-0.3, 0.0), (0.0, 0.08), (0.5, 0.0)], (-0.3, 0.0), 1 + 0),  # walked east, north is left
        ([(-0.3, 0.0), (0.0, -0.08), (0.5, 0.0)], (-0.2, -0.03), 1 + 0 + 3),
        ([(-0.3, 0.0), (0.0, -0.08), (0.3, 0.15), (0.5, 0.0)], (0.1, 0.0), 1 + 2),
        ([(-0.3, 0.0), (0.0, -0.08), (0.5, 0.0)], (0.1, -0.06), 0),  # round the corner already
    ],
)
def test_a_path_turns_at_the_circle_that_its_next_corner_lies_on(path, at, expected):
    assert turn_of(path, at, {0: POST, 2: BALL}, 3) == expected


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    out = tmp_path_factory.mktemp("plans") / "demonstrations"
    generate_demonstrations(out, 40, seed=5)
    return read_demonstrations(out)


def test_things_and_fingers_go_round_others_and_round_the_obstacle_if_told(demonstrations):
    plans, starts, met = Plans(demonstrations), demonstrations.starts, set()
    for number, episode in enumerate(demonstrations.episodes):
        task, count = episode.tasks[0], len(episode.scene.things)
        frames = np.arange(starts[number], starts[number + 1])
        found = plans(np.full(len(frames), number), frames)
        assert found.shape == (len(frames), 2)
        assert found.min() >= -1
        assert found.max() <= 2 * (count + 1)
        circles = np.where(found > 0, (found - 1) % (count + 1), -1)
        assert task.avoids or not (circles == count).any()
        assert not (circles[:, 0] == task.which).any()
        if task.what == "reach":
            assert (found[:, 0] == -1).all()
            assert not (circles[:, 1] == task.which).any()
        else:
            assert found[0, 0] >= 0
            assert ((found[:, 0] == -1) == (found[:, 1] == -1)).all()
        met |= {
            (task.what, "obstacle" if c == count else "own" if c == task.which else "other")
            for c in np.unique(circles[circles >= 0]).tolist()
        }
    assert {("reach", "obstacle"), ("push", "own"), ("push", "other"), ("push", "obstacle")} <= met
