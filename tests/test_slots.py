"""What a site does with its value: parts of outputs and inputs, rows, axes, torch's fast paths, threads."""

import abc
import copy
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import torchfilm as tf
from catalogue import randomise
from networks import conditioned, inputs
from torchfilm.injection import marker

T = TypeVar("T")


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
@pytest.mark.parametrize("by_name", [False, True])
def test_one_of_several_inputs_is_modulated(field: int | str | None, by_name: bool):
    class Caller(Many2):
        def forward(self, hidden, rest):
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
        (lambda h, r: pack_sequence([h]), "output", None, "got a PackedSequence"),
        (lambda h, r: (pack_sequence([h]), r), "output", None, "expected a tensor .* got PackedSequence"),
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


@pytest.mark.plain
def test_rows_that_do_not_divide_are_an_error():
    model = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Vector(13), repeat=5)
    with pytest.raises(ValueError, match=r"expected 5 rows for each condition \(repeat\), got 7"):
        model(torch.randn(7, 2), cond=torch.randn(2, 13))


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


SITES = (r"0\.norm1", r"0\.linear1", r"0\.linear2", r"0\.self_attn", "0")


@pytest.mark.parametrize("site", SITES)
def test_torchs_fast_path_does_not_pass_over_a_site(site: str):
    x, z = torch.randn(2, 7, 6), torch.randn(2, 13)
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 5, batch_first=True)).eval()
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    tf.condition(model, site, tf.Vector(13))
    randomise(model.film)
    expected = model(x.requires_grad_(), cond=z).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x, cond=z), expected)
    tf.remove(model)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    with torch.no_grad():
        assert not torch.allclose(model(x), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("site", [r"layers\.0\.norm1", r"layers\.1"])
def test_padding_does_not_turn_a_conditioned_encoder_to_nested_tensors(site: str):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 5, batch_first=True), 2).eval()
    mask = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    x, z = torch.randn(2, 7, 6), torch.randn(2, 13)
    with torch.no_grad():
        nested = model(x, src_key_padding_mask=mask)
    tf.condition(model, site, tf.Vector(13))
    with torch.no_grad():
        kept = model(x, src_key_padding_mask=mask, cond=z)
    torch.testing.assert_close(kept[~mask], nested[~mask])
    randomise(model.film)
    expected = model(x, src_key_padding_mask=mask, cond=z).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask, cond=z), expected)
    assert not torch.allclose(expected[~mask], nested[~mask])
    tf.remove(model)
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), nested)


def test_two_threads_hear_their_own_conditions():
    model, (x, _) = conditioned(), inputs()
    conditions = [torch.randn(2, 13) for _ in range(2)]
    with torch.no_grad():
        expected = [model(x, cond=z) for z in conditions]
    wrong: list[int] = []
    start = threading.Barrier(2)

    def run(i: int) -> None:
        start.wait()
        with torch.no_grad():
            for call in range(100):
                if call % 2:
                    y = model(x, cond=conditions[i])
                else:
                    with tf.using(model, cond=conditions[i]):
                        y = model(x)
                wrong.extend([call] * (not torch.equal(y, expected[i])))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.plain
def test_a_condition_of_one_thread_is_none_of_another():
    model, (x, z) = conditioned(), inputs()
    caught: list[str] = []

    def run() -> None:
        try:
            model(x)
        except ValueError as error:
            caught.append(str(error))

    with tf.using(model, cond=z):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(caught) == 1
    assert "expected an active condition" in caught[0]


def test_vmap_gives_each_sample_its_condition():
    model, (x, z) = conditioned(), inputs(5)
    each = torch.vmap(lambda one, c: model(one[None], cond=c[None])[0])(x, z)
    torch.testing.assert_close(each, model(x, cond=z))
    unbatched = torch.vmap(lambda one, c: model(one[None], cond=c)[0])(x, z)
    torch.testing.assert_close(unbatched, each)


def test_functional_call_and_per_sample_gradients():
    model, (x, z) = conditioned(), inputs(3)
    state = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, one, c):
        kwargs = {"cond": c[None]}
        return torch.func.functional_call(model, parameters, (one[None],), kwargs).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(state, x, z)
    model.zero_grad()
    model(x[1:2], cond=z[1:2]).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(each[name][1], p.grad, rtol=1e-4, atol=1e-4)


def test_an_averaged_model_follows():
    model, (x, z) = conditioned(), inputs()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    expected = model(x, cond=z)
    randomise(model.film)
    assert torch.equal(average(x, cond=z), expected)
    with tf.using(average, cond=z):
        assert torch.equal(average(x), expected)
    average.update_parameters(model)
    assert not torch.allclose(average(x, cond=z), expected)


def test_the_hook_that_keeps_off_the_fast_path_does_nothing():
    assert marker(nn.Linear(1, 1), ()) is None


def test_a_sequential_listens_and_keeps_its_layers():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), torch.randn(7, 3)
    expected = model(x)
    tf.condition(model, "[02]", tf.Vector(13))
    assert torch.equal(model(x, cond=torch.randn(7, 13)), expected)
    assert len(model) == 3
    assert model[-1].out_features == 2
    assert type(model[1:]) is nn.Sequential
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Linear"]
    model.append(nn.Linear(2, 7))
    assert model[-1].out_features == model[3].out_features == 7
    with pytest.raises(IndexError):
        model[4]


def test_a_list_of_layers_that_walks_over_itself():
    class Stack(nn.ModuleList):
        def forward(self, x):
            for layer in self:
                x = layer(x)
            return x

    model, x = Stack([nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)]).eval(), torch.randn(7, 3)
    expected = model(x)
    tf.condition(model, "[02]", tf.Vector(13))
    assert torch.equal(model(x, cond=torch.randn(7, 13)), expected)
    assert len(model) == len(list(model)) == len(model[:2]) + 1 == 3
    assert type(model[1:]) is Stack


def test_layers_of_a_container_keep_their_names_while_they_listen():
    model = tf.condition(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), "[02]", tf.Vector(13))
    for change in (lambda: model.__delitem__(1), lambda: model.pop(1), lambda: model.insert(1, nn.ReLU())):
        with pytest.raises(ValueError, match=r"to keep their names, got others(.|\n)*then condition it"):
            change()
    assert len(model) == 3
    del tf.remove(model)[1]


def test_classes_of_any_layout_and_metaclass_listen():
    class Slotted(nn.Module, Generic[T]):
        __slots__ = ("own",)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Listing(type):
        def __new__(cls, name, bases, namespace):
            made = super().__new__(cls, name, bases, namespace)
            made.fields = [*getattr(bases[0], "fields", []), *namespace.get("__annotations__", {})]
            return made

    class Listed(nn.Module, metaclass=Listing):
        width: int

        def __init_subclass__(cls) -> None:
            cls.seen = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(self.fields)

    x = torch.randn(2, 5)
    for kind, expected in ((Slotted, x), (Listed, x)):
        model = tf.condition(nn.Sequential(kind()), "0", tf.Vector(13), features=5, dim=-1)
        assert torch.equal(model(x, cond=torch.randn(2, 13)), expected)


def test_a_class_that_registers_its_subclasses_registers_none_of_ours():
    registered = {}

    class Policy(nn.Module, abc.ABC):
        def __init_subclass__(cls, **options: object) -> None:
            assert cls.__name__ not in registered
            registered[cls.__name__] = cls

    class Small(Policy):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = tf.condition(Small(), "layer", tf.Vector(13))
    assert registered == {"Small": Small}
    assert isinstance(model, Small)
    assert model(torch.randn(2, 3), cond=torch.randn(2, 13)).shape == (2, 5)
    assert type(tf.remove(copy.deepcopy(model))) is Small


def test_a_condition_per_row_of_a_dict_of_modules():
    class Named(nn.ModuleDict):
        def forward(self, x):
            for layer in self.values():
                x = layer(x)
            return x

    model, x = Named({"a": nn.Linear(3, 5), "b": nn.ReLU()}), torch.randn(7, 3)
    expected = model(x)
    tf.condition(model, "a", tf.Vector(13))
    assert torch.equal(model(x, cond=torch.randn(7, 13)), expected)
    assert list(model.keys()) == list(model) == [name for name, _ in model.items()] == ["a", "b"]
    assert len(model) == 2


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.Linear(3, 3)], ids=["norm", "linear"])
@pytest.mark.parametrize("steps", [2, 5])
def test_a_gate_without_steps_counts_for_every_step_of_its_sample(layer: nn.Module, graph: bool, steps: int):
    network = nn.Sequential(copy.deepcopy(layer))
    model, x = tf.condition(network, "0", tf.Vector(7)), torch.randn(2, steps, 3)
    m = tf.Modulation(torch.randn(2, steps, 3), torch.randn(2, steps, 3), torch.randn(2, 3))
    with torch.set_grad_enabled(graph):
        found = model(x, modulation={"0": m})
    torch.testing.assert_close(found, m.gate[:, None] * (m.gamma * layer(x) + m.beta))
