"""Which part of an output or an input a site modulates, and how its rows meet the conditions."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import torchfilm as tf
from catalogue import randomise
from torchfilm.fusion import Film
from torchfilm.sites import Repeat


class Pair(NamedTuple):
    hidden: torch.Tensor
    rest: torch.Tensor


@dataclass
class Record:
    hidden: torch.Tensor
    rest: torch.Tensor


class Mapped(OrderedDict):
    """A mapping of a class of its own."""


OUTPUTS = {
    "tensor": (lambda h, r: h, None),
    "tuple": (lambda h, r: (h, r), None),
    "second of a tuple": (lambda h, r: (r, h), 1),
    "last of a list": (lambda h, r: [r, h], -1),
    "named tuple": (Pair, None),
    "field of a named tuple": (lambda h, r: Pair(r, h), "rest"),
    "dataclass": (Record, None),
    "field of a dataclass": (lambda h, r: Record(r, h), "rest"),
    "mapping": (lambda h, r: {"hidden": h, "rest": r}, None),
    "field of a mapping": (lambda h, r: {"rest": r, "hidden": h}, "hidden"),
    "mapping of a class": (lambda h, r: Mapped(rest=r, hidden=h), "hidden"),
}


class Many(nn.Module):
    """Return several things in some container."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, hidden, rest):
        return self.pack(hidden, rest)


def parts(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, tuple | list) else list(vars(output).values())


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_part_of_an_output_is_modulated_and_the_container_stays(name: str):
    pack, field = OUTPUTS[name]
    model = nn.Sequential(OrderedDict(block=Many(pack)))
    model = Many2(model.block)
    hidden, rest, m = torch.randn(2, 3), torch.randn(2, 5), tf.Modulation(torch.rand(2, 3), torch.rand(2, 3))
    tf.condition(model, "block", tf.Vector(7), dim=-1, features=3, field=field)
    output = model(hidden, rest, modulation={"block": m})
    expected = pack(m.gamma * hidden + m.beta, rest)
    assert type(output) is type(expected)
    for one, other in zip(parts(output), parts(expected), strict=True):
        torch.testing.assert_close(one, other)


class Many2(nn.Module):
    """Hand on what one block returns."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, rest):
        return self.block(hidden, rest)


@pytest.mark.parametrize("field", [None, 0, 1, -2, -1, "hidden", "rest"])
@pytest.mark.parametrize("by_name", [0, 1, 2])
def test_one_of_several_inputs_is_modulated(field: int | str | None, by_name: int):
    class Caller(Many2):
        def forward(self, hidden, rest):
            if by_name == 1:
                return self.block(hidden, rest=rest)
            return self.block(hidden=hidden, rest=rest) if by_name else self.block(hidden, rest)

    model = Caller(Many(lambda h, r: (h, r)))
    hidden, rest, m = torch.randn(2, 3), torch.randn(2, 3), tf.Modulation(torch.rand(2, 3), torch.rand(2, 3))
    tf.condition(model, "block", tf.Vector(7), where="input", dim=-1, features=3, field=field)
    first = field in (None, 0, -2, "hidden")
    got = model(hidden, rest, modulation={"block": m})
    torch.testing.assert_close(got[0], m.gamma * hidden + m.beta if first else hidden)
    torch.testing.assert_close(got[1], rest if first else m.gamma * rest + m.beta)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("pack", "where", "field", "message"),
    [
        (lambda h, r: (h, r), "output", 2, "expected an output 2, got 2 of them"),
        (lambda h, r: (h, r), "output", "rest", "expected an output with the field 'rest', got a tuple"),
        (lambda h, r: h, "output", "rest", "expected an output with the field 'rest', got a Tensor"),
        (Record, "output", "first", "got a Record with hidden, rest"),
        (Record, "output", -3, "expected an output with the field -3, got a Record with hidden, rest"),
        (lambda h, r: (None, h), "output", None, "expected a tensor at its output, got NoneType"),
        (lambda h, r: None, "output", None, "expected an output with the field None, got a NoneType"),
        (lambda h, r: pack_sequence([h]), "output", 1, "got a PackedSequence and 1"),
        (lambda h, r: pack_sequence([h]), "output", 0, r"got a PackedSequence and 0.\nLeave field= out"),
        (lambda h, r: pack_sequence([h]), "output", "data", "expected no field= where sequences are packed"),
        (lambda h, r: h, "input", 2, "expected the input 2, got 2 by position"),
        (lambda h, r: h, "input", -3, "expected the input -3, got 2 by position"),
        (lambda h, r: h, "input", "x", r"expected the input 'x', got 2 by position and \[\] by name"),
    ],
)
def test_parts_that_are_not_there_are_an_error(pack, where: str, field: int | str | None, message: str):
    model = tf.condition(
        Many2(Many(pack)), "block", tf.Vector(7), where=where, dim=-1, features=3, field=field
    )
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 3), torch.randn(2, 3), cond=torch.randn(2, 7))


@pytest.mark.parametrize("per_step", [False, True])
def test_rows_that_share_a_condition_follow_one_another(per_step: bool):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 1)), torch.randn(2 * 5, 2, 7, 4)
    plain = model(x)
    tf.condition(model, "0", tf.Vector(13), repeat=5)
    shape = (2, 5, 3) if per_step else (2, 3)
    m = tf.Modulation(torch.rand(shape), torch.rand(shape))
    rows = [i if per_step else i.repeat_interleave(5, dim=0) for i in (m.gamma, m.beta)]
    gamma, beta = (row.reshape(10, 3, 1, 1) for row in rows)
    torch.testing.assert_close(model(x, modulation={"0": m}), gamma * plain + beta)
    assert torch.equal(model(x, cond=torch.randn(2, 13)), plain)


UNEVEN = [
    (5, 7, 2, r"expected 5 rows for each condition \(repeat=5\), got 7 rows in all and 2 conditions"),
    (5, 15, 2, "got 15 rows in all and 2 conditions"),
    ("any", 7, 2, r"expected equally many rows for each .* \(repeat='any'\), got 7 rows in all and 2 cond"),
    ("any", 3, 0, "got 3 rows in all and 0 conditions"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("repeat", "rows", "conditions", "message"), UNEVEN)
def test_rows_that_do_not_divide_are_an_error(repeat: Repeat, rows: int, conditions: int, message: str):
    model = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Vector(13), repeat=repeat)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(rows, 2), cond=torch.randn(conditions, 13))


@pytest.mark.plain
def test_rows_that_do_not_divide_may_each_say_which_condition_they_have():
    model = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Vector(13), repeat="any")
    randomise(model.film)
    x, z, index = torch.randn(7, 2), torch.randn(2, 13), torch.tensor([0, 0, 1, 1, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"\nSay which .*: modulation=tf.modulations\(model, cond\)\.rows\(i"
    ):
        model(x, cond=z)
    expected = model(x, cond=z[index])
    torch.testing.assert_close(model(x, modulation=tf.modulations(model, z).rows(index)), expected)


FUSED = ["film", "gate", "concat", "low_rank", "cross_attention"]


@pytest.mark.parametrize("fusion", FUSED)
def test_any_number_of_rows_is_that_of_the_call(fusion: str):
    base = nn.Sequential(nn.Conv2d(2, 3, 1))
    model = tf.condition(copy.deepcopy(base), "0", tf.Vector(13), repeat="any", fusion=fusion)
    randomise(model.film)
    for conditions, each in ((2, 5), (2, 7), (3, 1), (1, 4), (2, 0), (0, 0)):
        x, z = torch.randn(conditions * each, 2, 7, 4), torch.randn(conditions, 13)
        fixed = tf.condition(copy.deepcopy(base), "0", tf.Vector(13), repeat=max(each, 1), fusion=fusion)
        fixed.film.load_state_dict(model.film.state_dict())
        torch.testing.assert_close(model(x, cond=z), fixed(x, cond=z) if each else x.new_zeros(0, 3, 7, 4))


@pytest.mark.plain
def test_any_number_of_rows_asks_for_a_value_whose_conditions_can_be_counted():
    class Own(Film):
        def build(self, cond_dim, sites):
            return Two(super().build(cond_dim, sites))

        def apply(self, x, value, dim, site):
            return super().apply(x, value[0], dim, site)

    class Two(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            return {name: (m, m) for name, m in self.inner(z).items()}

    model = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Vector(13), repeat="any", fusion=Own())
    with pytest.raises(ValueError, match="expected a value of a fusion of the library, got tuple"):
        model(torch.randn(6, 2), cond=torch.randn(2, 13))
    fixed = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Vector(13), repeat=3, fusion=Own())
    assert fixed(torch.randn(6, 2), cond=torch.randn(2, 13)).shape == (6, 3)


def test_all_else_goes_on_with_any_number_of_rows(tmp_path):
    base = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Linear(7, 5)).eval()
    model = tf.condition(copy.deepcopy(base), "0|2", tf.Vector(13), repeat="any", features=3, dim=1)
    assert "any number of rows for each condition" in repr(tf.find(base, "0", repeat="any"))
    randomise(model.film)
    x, z = torch.randn(6, 2, 7), torch.randn(2, 13)
    expected = model(x, cond=z)
    assert {one.strength > 0 for one in tf.doctor(model, x, cond=z).pulses.values()} == {True}
    tf.save(model, tmp_path)
    torch.testing.assert_close(tf.load(copy.deepcopy(base), tmp_path)(x, cond=z), expected)
    plain, report = tf.fold(model, cond=z[:1], leftover="constant", inputs=x)
    torch.testing.assert_close(plain(x[:3]), expected[:3])
    assert [site.target for site in report] == ["0.weight, 0.bias", "constant"]
    tf.tabulate(model, conds=z)
    torch.testing.assert_close(model(x, cond=torch.tensor([0, 1])), expected)


def test_a_border_is_kept_with_any_number_of_rows():
    base = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)).eval()
    model = tf.condition(base, "0", tf.Vector(13), repeat="any", where="input")
    randomise(model.film)
    x, z = torch.randn(5, 2, 7, 4), torch.randn(1, 13)
    plain, _ = tf.fold(model, cond=z, leftover="constant")
    torch.testing.assert_close(plain(x), model(x, cond=z))


@pytest.mark.plain
def test_any_number_of_rows_is_no_graph_for_each_number():
    model = tf.condition(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), "[01]", tf.Vector(13), repeat="any")
    randomise(model.film)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for conditions, each in ((2, 5), (3, 7), (5, 4), (7, 11)):
        x, z = torch.randn(conditions * each, 2), torch.randn(conditions, 13)
        torch.testing.assert_close(compiled(x, cond=z), model(x, cond=z))
    assert graphs.frame_count <= 2  # of which one takes its sizes for constants


LENGTHS = {"as they come": [3, 5, 3, 2], "sorted": [5, 3, 3, 2]}


class Recurrent(nn.Module):
    """A recurrence over packed sequences, whose output stays packed."""

    def __init__(self, kind: type, *, batch_first: bool) -> None:
        super().__init__()
        self.rnn = kind(2, 3, num_layers=2, bidirectional=True, batch_first=batch_first)

    def forward(self, x: PackedSequence) -> PackedSequence:
        return self.rnn(x)[0]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("where", ["output", "input"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(("kind", "batch_first"), [(nn.GRU, True), (nn.LSTM, False)])
def test_packed_sequences_are_modulated_each_by_its_own(kind, batch_first, per_step, where, lengths):
    model = tf.condition(Recurrent(kind, batch_first=batch_first), "rnn", tf.Vector(13), where=where)
    randomise(model.film)
    sequences = [torch.randn(length, 2) for length in LENGTHS[lengths]]
    packed = pack_sequence(sequences, enforce_sorted=lengths == "sorted")
    z = torch.randn(4, 5, 13) if per_step else torch.randn(4, 13)
    y = model(packed, cond=z)
    for mine, theirs in zip(y[1:], packed[1:], strict=True):
        assert mine is theirs or torch.equal(mine, theirs)
    for i, (sequence, found) in enumerate(zip(sequences, unpack_sequence(y), strict=True)):
        own = z[i : i + 1, : len(sequence)] if per_step else z[i : i + 1]
        torch.testing.assert_close(found, model(pack_sequence([sequence]), cond=own).data)


@pytest.mark.parametrize("repeat", [1, 2])
def test_steps_are_not_stretched_over_packed_sequences_whose_lengths_are_the_batchs(repeat: int):
    model = Recurrent(nn.GRU, batch_first=True)
    model = randomise(tf.condition(model, "rnn", tf.Vector(13), align="linear", repeat=repeat))
    packed = pack_sequence([torch.randn(5, 2), torch.randn(3, 2)])
    z = torch.randn(2 // repeat, 7, 13) if repeat == 1 else torch.randn(1, 1, 7, 13)
    with pytest.raises(ValueError, match=r"steps for sequences of at most 5, got 7 and align='linear'"):
        model(packed, cond=z)
    plain = copy.deepcopy(model)
    plain.film.fusion.align = None
    for fitting in (z[..., :5, :], z[..., :1, :], z[..., 0, :]):
        torch.testing.assert_close(model(packed, cond=fitting).data, plain(packed, cond=fitting).data)


def test_a_packed_sequence_that_a_module_returns_is_modulated():
    model = tf.condition(Many2(Many(lambda h, r: h)), "block", tf.Vector(13), dim=-1, features=3, repeat=2)
    randomise(model.film)
    packed, z = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)]), torch.randn(1, 13)
    m = tf.modulations(model, z)["block"]
    torch.testing.assert_close(model(packed, None, cond=z).data, m.gamma * packed.data + m.beta)


TIME_FIRST = {
    "recurrence": (nn.GRU(6, 5), lambda layer, x: layer(x)[0], "layer"),
    "attention": (nn.MultiheadAttention(6, 2), lambda layer, x: layer(x, x, x)[0], "layer"),
    "norm of a layer": (nn.TransformerEncoderLayer(6, 2, 5), lambda layer, x: layer(x), r"layer\.norm1"),
    "norm of a stack": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 5), 1, nn.LayerNorm(6), enable_nested_tensor=False
        ),
        lambda layer, x: layer(x),
        r"layer\.norm",
    ),
}


@pytest.mark.parametrize("name", TIME_FIRST)
def test_time_first_layers_are_modulated_per_sample_all_the_same(name: str):
    layer, run, site = TIME_FIRST[name]

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(layer).eval()

        def forward(self, x):
            return run(self.layer, x)

    model, x, z = Root(), torch.randn(4, 4, 6), torch.randn(4, 13)  # as many steps as samples
    tf.condition(model, site, tf.Vector(13))
    randomise(model.film)
    together = model(x, cond=z)
    for i in range(4):
        alone = model(x[:, i : i + 1], cond=z[i : i + 1])
        torch.testing.assert_close(together[:, i : i + 1], alone)


class Mixing(nn.Module):
    """A layer of others that takes time first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + x.mean(dim=0)


@pytest.mark.parametrize("samples", [4, 2])  # as many as steps, or not
def test_time_first_layers_of_others_are_said_to_be_so(samples: int):
    x, z = torch.randn(4, samples, 6), torch.randn(samples, 13)
    model = tf.condition(nn.Sequential(Mixing()), r"0\.norm", tf.Vector(13), batch=1)
    randomise(model.film)
    alone = [model(x[:, i : i + 1], cond=z[i : i + 1]) for i in range(samples)]
    torch.testing.assert_close(model(x, cond=z), torch.cat(alone, dim=1))
    again = tf.condition(nn.Sequential(Mixing()), tf.Sites(model.film.sites.values()), tf.Vector(13))
    assert [site.batch for site in again.film.sites.values()] == [1]


def test_a_batch_behind_time_is_recognised_in_the_error():
    model = tf.condition(nn.Sequential(Mixing()), r"0\.norm", tf.Vector(13))
    with pytest.raises(ValueError, match=r"batch is on axis 1 \(2\), condition with batch=1"):
        model(torch.randn(4, 2, 6), cond=torch.randn(2, 13))
    with pytest.raises(ValueError, match=r"expected where .* batch 0 or 1, got 'output', 1 and 2"):
        tf.find(nn.Sequential(Mixing()), r"0\.norm", batch=2)


def test_rows_that_share_a_condition_are_those_of_the_batch_also_where_time_comes_first():
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 5)).eval()
    tf.condition(model, r"0\.norm2", tf.Vector(13), repeat=3)
    randomise(model.film)
    x, z = torch.randn(6, 2 * 3, 6), torch.randn(2, 13)
    alone = [model(x[:, 3 * i : 3 * i + 3], cond=z[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(model(x, cond=z), torch.cat(alone, dim=1))


STATES = {
    "output of a GRU": (nn.GRU(3, 5, num_layers=2, batch_first=True), {"field": 1}),
    "input of a GRU": (nn.GRU(3, 5, num_layers=2, batch_first=True), {"where": "input", "field": "hx"}),
    "output of an RNN, time first": (nn.RNN(3, 5, num_layers=2), {"field": -1}),
}


@pytest.mark.parametrize("name", STATES)
def test_the_states_of_a_recurrence_have_their_batch_behind_the_layers(name: str):
    layer, options = STATES[name]

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(layer)

        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            return self.layer(x if layer.batch_first else x.transpose(0, 1), state)[1]

    model = tf.condition(Root(), "layer", tf.Vector(13), dim=-1, features=5, **options)
    randomise(model.film)
    x, state, z = torch.randn(2, 7, 3), torch.randn(2, 2, 5), torch.randn(2, 13)  # as many layers as samples
    alone = [model(x[i : i + 1], state[:, i : i + 1].contiguous(), cond=z[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(model(x, state, cond=z), torch.cat(alone, dim=1))


class Messages(nn.Module):
    """Nodes that hear their neighbours, along edges from edges[0] to edges[1]."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.edge = nn.Linear(2, 3), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = self.node(x)
        messages = self.edge(torch.cat([h[edges[0]], h[edges[1]]], dim=1))
        return x.new_zeros(len(x), 5).index_add(0, edges[1], messages)


def test_nodes_and_edges_of_a_batch_of_graphs_hear_what_each_graph_hears_alone():
    model = randomise(tf.condition(Messages(), "node|edge", tf.Vector(13)))
    x, z, graph = torch.randn(7, 2), torch.randn(2, 13), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    edges = torch.tensor([[0, 1, 3, 4, 6], [1, 2, 4, 3, 5]])
    m, rows = tf.modulations(model, z), {"node": graph, "edge": graph[edges[1]]}
    y = model(x, edges, modulation={name: m[name][rows[name]] for name in m})
    torch.testing.assert_close(y[:3], model(x[:3], edges[:, :2], cond=z[:1]))
    torch.testing.assert_close(y[3:], model(x[3:], edges[:, 2:] - 3, cond=z[1:]))
