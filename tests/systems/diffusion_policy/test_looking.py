"""What a policy looks at, and whether that is what was meant."""

from dataclasses import replace

import pytest
import torch

from torchfilm.data.table.tasks import Task
from torchfilm.data.table.wording import vocabulary
from torchfilm.systems.diffusion_policy import RECIPES, build
from torchfilm.systems.diffusion_policy.evaluate import draw_scenes, in_all_manners, looks_right
from torchfilm.systems.diffusion_policy.looking import SPOTS, Looks, looks_of
from torchfilm.systems.diffusion_policy.policy import Policy

pytest.importorskip("mujoco")


def network(**changes):
    torch.manual_seed(0)
    return build(replace(RECIPES["tiny"].config, vocabulary=vocabulary(), **changes)).eval()


def test_looks_are_tasks_and_nothing_goes_to_the_obstacle():
    things = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    spots = torch.tensor([[0.9, 0.1, 0, 0, 0, 0], [0.1, 0.5, 0.1, 0.3, 0, 0], [0, 0, 0.6, 0.2, 0.1, 0.1]])
    expected = [Task(2), Task(0, "push", place="left"), Task(1, "push", place="goal")]
    assert Looks(things, spots).tasks() == expected


@pytest.mark.parametrize("place", [None, "goal", "far"])
def test_looks_are_right_where_thing_and_place_are_those_meant(place):
    policy = network()
    encoder = policy.encoder
    with torch.no_grad():
        encoder.score.weight.zero_()  # the first of equal shares: thing 0
        encoder.spot_score.weight.fill_(1.0)
        encoder.spot.weight.fill_(-1.0)[SPOTS.index(place)] = 20.0
    told = in_all_manners(draw_scenes(40, seed=3), seed=3)
    looks = looks_of(Policy(policy), [one.scene for one in told], [one.told[0].text for one in told])
    torch.testing.assert_close(looks.things, torch.full((160, 3), 1 / 3))
    assert (looks.spots.argmax(1) == SPOTS.index(place)).all()
    right = [(one.tasks[0].which, one.tasks[0].place) == (0, place) for one in told]
    assert any(right)
    assert looks_right(Policy(policy), told) == right


def test_a_policy_that_looks_at_everything_is_not_judged():
    told = in_all_manners(draw_scenes(1, seed=3), seed=3)
    assert looks_right(Policy(network(encoder="flat", relative=False)), told) is None
    deaf = build(RECIPES["tiny"].config)
    with pytest.raises(ValueError, match="got one that hears none"):
        looks_of(Policy(deaf), [told[0].scene], ["reach"])
