"""What was wrapped after `condition`: a site is the module that holds its slot, wherever that is now."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import torchfilm as tf
from catalogue import randomise

pytestmark = [pytest.mark.plain, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")]
Wrap = Callable[[nn.Module], nn.Module]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(3, 5), Block(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x).tanh()))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Adapted(nn.Module):
    """A layer with a low-rank update, as adapters put it in the layer's place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(5, 1, bias=False), nn.Linear(1, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def around_the_site(wrap: Wrap) -> Callable[[nn.Module], None]:
    def change(net) -> None:
        net.block.lin = wrap(net.block.lin)

    return change


def around_the_block(wrap: Wrap) -> Callable[[nn.Module], None]:
    def change(net) -> None:
        net.block = wrap(net.block)

    return change


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


CHANGES = {
    "layers behind the site": around_the_site(lambda site: nn.Sequential(site, nn.ReLU(), nn.Linear(5, 5))),
    "an adapter": around_the_site(Adapted),
    "a residual": around_the_block(Residual),
    "a compiled block": around_the_block(compiled),
    "a checkpointed block": around_the_block(checkpoint_wrapper),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
X, Z = torch.linspace(-2, 3, 7 * 3).reshape(7, 3).sin(), torch.linspace(-1, 1, 11)[None]


def network(change: Callable[[nn.Module], None]) -> nn.Module:
    net = tf.condition(Net().eval(), r"block\.lin", tf.Vector(11))
    change(net)
    return randomise(net)


@changes
@pytest.mark.parametrize("kind", [nn.Linear, nn.RMSNorm], ids=["weights", "constant"])
def test_a_fold_goes_to_the_module_that_listens(kind, change):
    model = Net().eval()
    if kind is nn.RMSNorm:  # beta has no place in its weights
        model.block.lin = nn.RMSNorm(5)
    tf.condition(model, r"block\.lin", tf.Vector(11))
    change(model)
    randomise(model)
    expected = model(X, cond=Z)
    plain, report = tf.fold(model, cond=Z, leftover="constant", inputs=(X,))
    torch.testing.assert_close(plain(X), expected)
    assert (report["block.lin"].target == "constant") is (kind is nn.RMSNorm)
    with tf.folded(model, cond=Z, leftover="constant"):
        torch.testing.assert_close(model(X), expected)
    assert torch.equal(model(X, cond=Z), expected)


@changes
def test_what_is_saved_is_loaded_where_it_was(change, tmp_path: Path):
    model = network(change)
    tf.save(model, tmp_path)
    base = Net().eval()
    change(base)
    base.load_state_dict({key: value for key, value in model.state_dict().items() if "film." not in key})
    assert torch.equal(tf.load(base, tmp_path)(X, cond=Z), model(X, cond=Z))


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
@pytest.mark.parametrize("place", [around_the_block, around_the_site])
def test_wrappers_that_compute_the_same_are_no_part_of_a_name(wrap, place, tmp_path: Path):
    change, z = place(wrap), torch.randn(7, 11)
    wrapped = network(change)
    weights = {
        key.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): value
        for key, value in wrapped.state_dict().items()
        if "film." not in key
    }
    tf.tabulate(wrapped, conds=z)
    tf.save(wrapped, tmp_path / "wrapped")
    plain = Net().eval()
    plain.load_state_dict(weights)
    index = torch.tensor([0, 3, 5, 1, 2, 4, 6])
    expected = wrapped(X, cond=index)
    torch.testing.assert_close(tf.load(plain, tmp_path / "wrapped")(X, cond=index), expected)
    tf.save(plain, tmp_path / "plain")
    again = Net().eval()
    again.load_state_dict(weights)
    change(again)
    torch.testing.assert_close(tf.load(again, tmp_path / "plain")(X, cond=index), expected)


@pytest.mark.parametrize("name", [name for name in CHANGES if "checkpoint" not in name])
def test_the_doctor_finds_the_sites(name):
    found = tf.doctor(network(CHANGES[name]), X, cond=torch.randn(7, 11))
    assert found
    assert found.of("block.lin") == []
    assert found.pulses["block.lin"].calls == 1


def test_a_site_that_is_no_longer_there_is_missed_by_all(tmp_path: Path):
    model = network(around_the_site(lambda site: nn.Linear(5, 5)))
    for do in (lambda: tf.fold(model, cond=Z), lambda: tf.save(model, tmp_path)):
        with pytest.raises(ValueError, match=r"Site 'block.lin': expected the module .* another Linear"):
            do()


class Saved(nn.Module):
    """As PEFT wraps what is to be saved with an adapter: the copy is called, and answers for the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    def forward(self, *args: Any) -> Any:
        return self.modules_to_save["default"](*args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.modules_to_save["default"], name)


def test_a_copy_that_is_kept_elsewhere_and_not_called_may_stay():
    model = network(lambda net: None)
    expected = model(X, cond=Z)
    model.average = copy.deepcopy(model.block)
    model.block = nn.Sequential(model.block)
    assert torch.equal(model(X, cond=Z), expected)


def test_a_copy_of_a_site_that_is_called_in_its_place_is_refused():
    model = network(lambda net: None)
    model.block.lin = Saved(model.block.lin)
    expected = (
        r"Site 'block.lin': expected one module, got a copy of it at 'block.lin.modules_to_save.default'"
        r"(.|\n)*PEFT: modules_to_save(.|\n)*remove\(model\), let them copy"
    )
    for do in (lambda: model(X, cond=Z), model.train):
        with pytest.raises(ValueError, match=expected):
            do()
    tf.remove(model)
    net = Net().eval()
    net.block.lin = Saved(net.block.lin)
    tf.condition(net, r"block\.lin\.modules_to_save\.default", tf.Vector(11), init="default")
    assert not torch.equal(net(X, cond=Z), net(X, cond=-Z))


def test_networks_inside_of_each_other_with_sites_of_one_name_are_no_copies():
    inner = tf.condition(nn.Sequential(nn.Linear(3, 3)), "0", tf.Vector(11))
    outer = tf.condition(nn.Sequential(nn.Linear(3, 3), inner, nn.Linear(3, 3)), "0", tf.Vector(11))
    outer[2] = nn.Identity()
    outer[0] = nn.Sequential(outer[0])
    with tf.using(inner, cond=Z):
        assert outer(X, cond=Z).shape == X.shape


def test_a_network_whose_site_copies_itself_is_saved_and_loaded_instead(tmp_path: Path):
    net = Net().eval()
    net.block = torch.fx.symbolic_trace(net.block)
    tf.condition(net, "block", tf.Vector(11), dim=-1, features=5, init="default")
    copied = copy.deepcopy(net)
    with pytest.raises(
        ValueError,
        match=r"Site 'block': .* another GraphModule in its place.\nCopies that its class makes(.|\n)*save\(",
    ):
        copied(X, cond=Z)
    tf.save(net, tmp_path)
    again = tf.load(tf.remove(copied), tmp_path)
    assert torch.equal(again(X, cond=Z), net(X, cond=Z))


def test_encoder_and_generator_may_be_wrapped_but_not_the_whole_conditioning():
    model = network(lambda net: None)
    expected = model(X, cond=Z)
    model.film.cond, model.film.generator = Saved(model.film.cond), Saved(model.film.generator)
    assert torch.equal(model(X, cond=Z), expected)
    model.film = Saved(model.film)
    for do in (lambda: model(X, cond=Z), model.train):
        with pytest.raises(ValueError, match=r"film: .* inside of a Saved(.|\n)*\['film.cond', 'film.gener"):
            do()


def test_where_others_froze_the_conditioning_the_base_may_train_too():
    found = tf.doctor(network(lambda net: None).requires_grad_(False), X, cond=torch.randn(7, 11))
    (remedy,) = [finding.remedy for finding in found.findings if finding.kind == "frozen"]
    assert "conditioning(model).requires_grad_(True)" in remedy


class Holding(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(self.children())(*args, **kwargs)


def test_who_holds_a_conditioned_network_is_told_where_it_is():
    model = network(lambda net: None)
    assert tf.conditioning(Holding(_forward_module=model, _original_module=model)) is model.film
    held = Holding(base_model=Holding(model=model))
    expected = (
        r"Holding: expected a conditioned network, got one that holds one.\nGive its 'base_model.model'"
    )
    for do in (
        lambda: tf.conditioning(held),
        lambda: tf.fold(held, cond=Z),
        lambda: tf.doctor(held, X, cond=Z),
    ):
        with pytest.raises(ValueError, match=expected):
            do()
    with pytest.raises(ValueError, match=expected), tf.using(held, cond=Z):
        pass
    both = Holding(eyes=model, hand=network(lambda net: None))
    with pytest.raises(ValueError, match=r"one that holds 2.\nGive each by itself: 'eyes', 'hand'"):
        tf.conditioning(both)


def test_a_part_of_a_conditioned_network_is_told_to_give_the_whole():
    net = Net().eval()
    whole = tf.condition(Holding(base=net), r".*lin", tf.Vector(11))
    with pytest.raises(
        ValueError, match=r"got a part of one.\nGive the whole, which condition\(\) was given"
    ):
        tf.remove(net)
    with pytest.raises(
        ValueError, match=r"conditioned already.\n.* or remove\(model\) first, where model is what"
    ):
        tf.condition(net, r".*lin", tf.Vector(11))
    tf.remove(whole)
    assert tf.condition(net, r".*lin", tf.Vector(11))(X, cond=Z).shape == (7, 2)
    plain, _ = tf.fold(
        tf.condition(Net().eval(), r"block", tf.Vector(11), dim=-1, features=5),
        cond=Z[:1],
        leftover="constant",
    )
    with pytest.raises(ValueError, match="got a plain one"):  # a constant that a fold kept is whole
        tf.remove(plain)


@pytest.mark.parametrize("combine", ["sum", "concat", "compose"])
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda part: torch.compile(part, backend="eager")])
def test_a_condition_that_is_wrapped_later_is_heard_as_before(wrap, combine):
    both = tf.Several({"a": tf.Vector(3), "b": tf.Vector(3)}, combine)
    generator = tf.build_generator(both.dim, {"here": 5}, init="default")
    given = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    before, costs = generator(both(given))["here"].gamma, generator.own_parameters()
    both.parts["b"] = wrap(both.parts["b"])
    if combine == "compose":
        generator.parts[1] = wrap(generator.parts[1])
    assert torch.equal(generator(both(given))["here"].gamma, before)
    assert generator.own_parameters() == costs
