"""Guidance where rows have numbers, masks have steps, and conditions are lost, together or by chance."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import torchfilm as tf
from catalogue import randomise


class Graph(nn.Module):
    """Nodes that take the sum of what points at them, twice."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.pooled = pooled

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            y = layer(x)
            x = y.index_add(0, edges[1], y[edges[0]]).relu()
        return x.sum(dim=0, keepdim=True) if self.pooled else x


EDGES = torch.tensor([[0, 1, 2, 4, 6, 5, 3], [1, 2, 0, 3, 5, 4, 6]])


def graph(**options: bool) -> nn.Module:
    model = tf.condition(Graph(**options), "first", tf.Maybe(tf.Vector(13)))
    return randomise(model).eval()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_graph_is_guided_in_modulation_space_and_refused_where_its_nodes_would_be_repeated(dtype):
    model, x, z, edges = graph(), torch.randn(7, 2), torch.randn(7, 13), EDGES.to(dtype)
    for inputs, keywords in (((x, edges), {}), ((x,), {"edges": edges})):
        with pytest.raises(ValueError, match=r"numbers \(2, 7\) below 7, .* edges[\s\S]*space='modulation'"):
            tf.guide(model, *inputs, cond=z, scale=2.0, **keywords)
        tf.guide(model, *inputs, cond=z, scale=2.0, space="modulation", **keywords)
    assert torch.equal(tf.guide(model, x, edges, cond=z, scale=1.0), model(x, edges, cond=z))


def test_two_rows_of_numbers_that_name_no_rows_are_handed_on():
    class Sized(Graph):
        def forward(self, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            return self.first(x) * sizes.sum()

    model = randomise(tf.condition(Sized(), "first", tf.Maybe(tf.Vector(13)))).eval()
    x, z = torch.randn(7, 2), torch.randn(7, 13)
    for sizes in (torch.tensor([[7, 5], [3, 2]]), torch.zeros(2, 0, dtype=torch.int64), torch.rand(2, 5)):
        with_it, without = model(x, sizes, cond=z), model(x, sizes, cond=tf.Masked(None))
        torch.testing.assert_close(
            tf.guide(model, x, sizes, cond=z, scale=2.0), without + 2 * (with_it - without)
        )
    small = torch.tensor([[1, 5], [3, 2]])
    assert tf.guide(lambda x, cond: model(x, small, cond=cond), x, cond=z, scale=2.0).shape == (7, 3)


def test_an_output_of_a_graph_points_to_modulation_space():
    model, x, z = graph(pooled=True), torch.randn(7, 2), torch.randn(7, 13)
    with pytest.raises(ValueError, match=r"rows for each of 2 copies[\s\S]*space='modulation'"):
        tf.guide(lambda x, cond: model(x, EDGES, cond=cond), x, cond=z, scale=2.0)


def test_conditions_that_serve_several_rows_point_to_modulation_space():
    model = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Maybe(tf.Vector(13)), repeat="any").eval()
    randomise(model.film)
    x, z = torch.randn(6, 2), torch.randn(3, 13)
    with pytest.raises(ValueError, match=r"of 6 rows[\s\S]*space='modulation'"):
        tf.guide(model, x, cond=z, scale=2.0)
    with_it, without = model(x, cond=z), model(x, cond=tf.Masked(None))
    guided = tf.guide(model, x, cond=z, scale=2.0, space="modulation")
    torch.testing.assert_close(guided, without + 2 * (with_it - without))


MASKS = [(5, 7), (1, 7), (5, 1), (1, 1)]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("named", [False, True])
def test_a_mask_over_time_is_guided(named: bool, shape: tuple[int, int]):
    steps, batch = 7, 5
    spec = (
        tf.Several({"f": tf.Maybe(tf.Vector(13)), "t": tf.Scalars(1, 4)})
        if named
        else tf.Maybe(tf.Vector(13))
    )
    model = randomise(tf.condition(nn.Sequential(nn.Conv1d(2, 3, 1)), "0", spec)).eval()
    x, z = torch.randn(batch, 2, steps), torch.randn(batch, steps, 13)
    masked = tf.Masked(z, torch.rand(batch, steps) < 0.5)
    if shape != (batch, steps):
        masked = tf.Masked(z[: shape[0], : shape[1]], torch.ones(shape, dtype=torch.bool))
    t = torch.rand(batch, 1)
    given = {"f": masked, "t": t} if named else masked
    none = {"t": t} if named else tf.Masked(None)
    with_it, without = model(x, cond=given), model(x, cond=none)
    guided = tf.guide(model, x, cond=given, scale={"f": 2.0} if named else 2.0)
    torch.testing.assert_close(guided, without + 2 * (with_it - without))


def joint() -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    parts = {"time": tf.Scalars(1, 4), "text": tf.Vector(7), "goal": tf.Vector(2)}
    spec = tf.Several(parts, joint_dropout=0.1, joint=["text", "goal"])
    model = randomise(tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", spec)).eval()
    cond = {"time": torch.rand(5, 1), "text": torch.randn(5, 7), "goal": torch.randn(5, 2)}
    return model, cond, torch.randn(5, 2)


def test_what_was_lost_together_is_guided_together_by_one_scale():
    model, cond, x = joint()
    seen = []
    model.film.cond.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    guided = tf.guide(model, x, cond=cond, scale={"text": 3.0, "goal": 3.0})
    assert seen == [10]  # both and none: never one without the other
    with_both, without = model(x, cond=cond), model(x, cond={"time": cond["time"]})
    torch.testing.assert_close(guided, without + 3 * (with_both - without))


def test_what_was_never_lost_is_not_dropped_and_the_refusal_is_true_of_conditions_inside_of_conditions():
    model, cond, x = joint()
    with pytest.raises(ValueError, match=r"got \['time'\], whose null training never met"):
        tf.guide(model, x, cond=cond, scale={"time": 2.0})
    inner = {"text": tf.Maybe(tf.Vector(7)), "goal": tf.Maybe(tf.Vector(2))}
    cond = {"time": cond["time"], "rest": {"text": cond["text"], "goal": cond["goal"]}}
    for rest in (tf.Several(copy.deepcopy(inner)), tf.Maybe(tf.Several(copy.deepcopy(inner)), dropout=0.1)):
        spec = tf.Several({"time": tf.Scalars(1, 4), "rest": rest})
        model = randomise(tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", spec)).eval()
        if isinstance(rest, tf.Maybe):
            with_it, without = model(x, cond=cond), model(x, cond={"time": cond["time"]})
            guided = tf.guide(model, x, cond=cond, scale={"rest": 2.0})
            torch.testing.assert_close(guided, without + 2 * (with_it - without))
        else:
            with pytest.raises(ValueError, match=r"null training never met[\s\S]*around a Several inside"):
                tf.guide(model, x, cond=cond, scale={"rest": 2.0})


def test_a_condition_that_is_absent_is_guided_as_none_and_asked_for_by_name():
    model, cond, x = joint()
    del cond["goal"]
    with pytest.raises(ValueError, match=r"got \['goal'\][\s\S]*None where no sample has it"):
        tf.guide(model, x, cond=cond, scale={"goal": 2.0})
    assert torch.equal(
        tf.guide(model, x, cond={**cond, "goal": None}, scale={"goal": 1.0}), model(x, cond=cond)
    )


class Recurrent(nn.Module):
    """A recurrence over packed sequences, whose output stays packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3)

    def forward(self, x: PackedSequence) -> PackedSequence:
        return self.rnn(x)[0]


def test_packed_sequences_are_guided_in_modulation_space_alone():
    model = randomise(tf.condition(Recurrent(), "rnn", tf.Maybe(tf.Vector(13)))).eval()
    x, z = pack_sequence([torch.randn(5, 2), torch.randn(3, 2)]), torch.randn(2, 13)
    with pytest.raises(ValueError, match=r"got a PackedSequence.\nUse space='modulation'"):
        tf.guide(model, x, cond=z, scale=3.0)
    assert torch.equal(tf.guide(model, x, cond=z, scale=1.0).data, model(x, cond=z).data)
    null, given = (model(x, cond=one).data for one in (tf.Masked(None), z))
    guided = tf.guide(model, x, cond=z, scale=3.0, space="modulation").data
    torch.testing.assert_close(guided, null + 3 * (given - null))


class Level(nn.Module):
    """An encoder of one number for all samples, or of one for each."""

    dim = 4

    def forward(self, level: float | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(level, dtype=torch.float32)[..., None] * torch.tensor([1.0, 2, 3, 5])


@pytest.mark.parametrize("space", ["output", "modulation"])
@pytest.mark.parametrize("level", [3, 3.0, torch.tensor(3.0)])
@pytest.mark.parametrize("named", [False, True])
def test_one_number_that_may_be_missing_is_that_of_all_samples(space, level, named: bool):
    encoder = tf.Maybe(Level(), dropout=0.1)
    spec = tf.Several({"level": encoder, "force": tf.Vector(7)}) if named else encoder
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 2)), "0", spec)).eval()
    x, force = torch.randn(5, 3), torch.randn(5, 7)

    def guided(level):
        cond, scale = ({"level": level, "force": force}, {"level": 2.0}) if named else (level, 2.0)
        return tf.guide(model, x, cond=cond, scale=scale, space=space)

    torch.testing.assert_close(guided(level), guided(torch.full((5,), 3.0)))


class Policy(nn.Module):
    """A network that holds a conditioned one and an encoder of its own, both of which drop conditions."""

    def __init__(self) -> None:
        super().__init__()
        maybe = tf.Maybe(tf.Vector(13), dropout=0.5)
        self.eyes = randomise(tf.condition(nn.Sequential(nn.Linear(2, 13)), "0", maybe))
        self.goal = tf.Maybe(tf.Vector(13), dropout=0.5)

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.eyes(x, cond=cond) + self.goal(cond)


def test_no_part_of_a_network_in_training_drops_conditions():
    policy, x, z = Policy(), torch.randn(11, 2), torch.randn(11, 13)
    for scale in (1.0, 3.0):
        expected = tf.guide(policy.eval(), x, cond=z, scale=scale)
        assert torch.equal(tf.guide(policy.train(), x, cond=z, scale=scale), expected)
    assert all(part.training for part in policy.modules())


@pytest.mark.parametrize("space", ["output", "modulation"])
def test_a_scale_of_zero_is_the_output_without_a_condition_to_the_bit(space):
    model, x, z = graph(), torch.randn(7, 2), torch.randn(7, 13)
    missing = model(x, EDGES, cond=tf.Masked(z, False))
    assert torch.equal(tf.guide(model, x, EDGES, cond=z, scale=0.0, space=space), missing)
    torch.testing.assert_close(model(x, EDGES, cond=tf.Masked(None)), missing)


@pytest.mark.parametrize("space", ["output", "modulation"])
def test_modulations_are_refused_with_how_to_weigh_them(space):
    model, x, z = graph(), torch.randn(7, 2), torch.randn(7, 13)
    m, null = tf.modulations(model, z), tf.modulations(model, tf.Masked(None))
    with pytest.raises(ValueError, match="guide: expected a condition alone, got modulations too"):
        tf.guide(model, x, EDGES, cond=z, modulation=m, scale=2.0, space=space)
    y = tf.guide(model, x, EDGES, cond=z, scale=2.0, space="modulation")
    torch.testing.assert_close(model(x, EDGES, modulation=null + 2.0 * (m - null)), y)
