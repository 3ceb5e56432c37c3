"""How a site listens: torch's fast paths, threads, classes of any kind."""

import abc
import copy
import gc
import pickle
import sys
import threading
import types
import weakref
from typing import Generic, TypeVar

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from networks import conditioned, inputs
from torchfilm.injection import marker

T = TypeVar("T")


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


class Scaled(nn.Module):
    """A layer that says itself what its copies know, as those of einops."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __getstate__(self) -> dict:
        return {"scale": self.scale}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "average"])
def test_a_copy_listens_also_where_its_class_keeps_a_state_of_its_own(way: str):
    model = randomise(tf.condition(nn.Sequential(Scaled(2.0)), "0", tf.Vector(13), dim=-1, features=5))
    x, z = torch.randn(2, 5), torch.randn(2, 13)
    expected = model(x, cond=z)
    ways = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda one: pickle.loads(pickle.dumps(one)),
        "average": torch.optim.swa_utils.AveragedModel,
    }
    copied = ways[way](model)
    assert torch.equal(copied(x, cond=z), expected)


@pytest.mark.plain
def test_a_class_that_its_module_defines_anew_is_let_go(monkeypatch):
    cell, seen = types.ModuleType("cell"), []
    monkeypatch.setitem(sys.modules, "cell", cell)
    for _ in range(5):
        exec("from torch import nn\nclass Net(nn.Sequential): ...", vars(cell))
        seen.append(weakref.ref(cell.Net))
        tf.condition(cell.Net(nn.Linear(2, 3)), "0", tf.Vector(5))
    for _ in range(3):
        gc.collect()
    assert [one() is cell.Net for one in seen] == [False] * 4 + [True]
    assert [one() for one in seen[:4]] == [None] * 4


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


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_networks_that_come_one_after_the_other_share_what_was_compiled():
    compiled = []

    def backend(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    for _ in range(3):
        model = nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)))
        model[0].compile(backend=backend, fullgraph=True)
        tf.condition(model, r"0\.1", tf.Vector(7))(torch.randn(2, 3), cond=torch.randn(2, 7))
        tf.remove(model)
        del model
        gc.collect()
    assert len(compiled) == 1
