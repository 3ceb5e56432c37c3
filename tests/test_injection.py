"""Conditioning a network in place: the identity at the start, conditions, contexts, exact removal."""

import abc
import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net, conditioned, inputs
from torchfilm.injection import conditioning


def by_hand(model: nn.Module, x: torch.Tensor, values: dict) -> torch.Tensor:
    """Run the network of `Net` with its modulations written out."""
    x = model.stem(x)
    for i, block in enumerate(model.blocks):
        m = values[f"blocks.{i}.bn"]
        bn = nn.functional.batch_norm(
            nn.functional.conv2d(x, block.conv.weight, block.conv.bias, padding=1),
            block.bn.running_mean,
            block.bn.running_var,
            block.bn.weight,
            block.bn.bias,
        )
        x = torch.relu(x + m.gamma[:, :, None, None] * bn + m.beta[:, :, None, None])
    return model.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_a_conditioned_network_starts_as_it_was_to_the_bit(training: bool):
    model, (x, z) = Net().train(training), inputs()
    expected = copy.deepcopy(model)(x)
    same = tf.condition(model, SITES, tf.Vector(13))
    assert same is model
    assert torch.equal(model(x, cond=z), expected)


def test_the_condition_scales_and_shifts_each_site():
    model, (x, z) = conditioned(), inputs()
    torch.testing.assert_close(model(x, cond=z), by_hand(model, x, conditioning(model).modulations(z)))


def test_the_keys_and_values_of_the_base_stay():
    model = Net()
    before = model.state_dict()
    tf.condition(model, SITES, tf.Vector(13))
    after = model.state_dict()
    assert list(before) == [key for key in after if not key.startswith("film.")]
    assert all(after[key] is before[key] or torch.equal(after[key], before[key]) for key in before)
    assert {key for key in after if key.startswith("film.")}
    Net().load_state_dict({key: value for key, value in after.items() if not key.startswith("film.")})


def test_sites_and_root_are_instances_of_their_classes_still():
    model = conditioned()
    assert isinstance(model, Net)
    assert isinstance(model.blocks[0].bn, nn.BatchNorm2d)
    assert type(model.blocks[0].bn).__name__ == "BatchNorm2d"
    assert type(model.blocks[0].bn) is type(model.blocks[1].bn)
    assert list(inspect.signature(model.forward).parameters) == ["x", "cond", "modulation"]


@pytest.mark.plain
def test_no_condition_is_an_error_and_never_the_identity():
    model, (x, z) = conditioned(), inputs()
    with pytest.raises(ValueError, match=r"Conditioned network: expected an active condition, got none"):
        model(x)
    with pytest.raises(ValueError, match=r"Site 'blocks.0.bn': expected an active condition, got none"):
        model.features(x)
    with pytest.raises(ValueError, match=r"expected a condition or a modulation, got both"):
        model(x, cond=z, modulation=conditioning(model).modulations(z))


def test_ready_modulations_do_what_their_condition_does():
    model, (x, z) = conditioned(), inputs()
    values = conditioning(model).modulations(z)
    assert torch.equal(model(x, modulation=values), model(x, cond=z))


@pytest.mark.plain
def test_modulations_for_other_sites_are_refused():
    model, (x, z) = conditioned(), inputs()
    values = conditioning(model).modulations(z)
    values["elsewhere"] = values.pop("blocks.1.bn")
    with pytest.raises(ValueError, match=r"got none for \['blocks.1.bn'\] and some for \['elsewhere'\]"):
        model(x, modulation=values)


@pytest.mark.parametrize("grad", [True, False])
def test_using_makes_a_condition_active_for_calls_that_others_make(grad: bool):
    model, (x, z) = conditioned(), inputs()
    expected = model(x, cond=z)
    with torch.set_grad_enabled(grad), tf.using(model, cond=z):
        torch.testing.assert_close(model(x), expected)
        assert model.features(x).shape == (2, 3, 9, 5)
        assert torch.equal(model(x, cond=z + 1), model(x, cond=z + 1))
    with pytest.raises(ValueError, match="expected an active condition"):
        model.features(x)


def test_contexts_nest_and_the_inner_one_wins():
    model, (x, z) = conditioned(), inputs()
    other = model(x, cond=-z)
    with tf.using(model, cond=z):
        inner = model(x)
        with tf.using(model, modulation=conditioning(model).modulations(-z)):
            assert torch.equal(model(x), other)
            with tf.unconditioned(model):
                plain = model(x)
        assert torch.equal(model(x), inner)
        assert torch.equal(model(x, cond=-z), other)
    assert not torch.allclose(plain, inner)


def test_gradients_reach_the_generator_at_each_call_in_using():
    model, (x, z) = conditioned(), inputs()
    with tf.using(model, cond=z):
        for _ in range(2):
            model.zero_grad()
            model(x).sum().backward()
            assert all(p.grad.abs().sum() > 0 for p in model.film.parameters())


def test_using_entered_without_gradients_does_not_lose_them():
    model, (x, z) = conditioned(), inputs()
    with torch.no_grad(), tf.using(model, cond=z), torch.enable_grad():
        model(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.film.parameters())


def test_using_runs_the_generator_once_unless_gradients_or_changes_need_it_again():
    model, (x, z), runs = conditioned(), inputs(), []
    conditioning(model).generator.register_forward_hook(lambda *args: runs.append(1))
    with torch.no_grad(), tf.using(model, cond=z):
        before = [model(x) for _ in range(3)][-1]
        assert len(runs) == 1
        randomise(model.film)
        assert not torch.allclose(model(x), before)
    runs.clear()
    with tf.using(model, cond=z):
        assert torch.equal(model(x), model(x, cond=z))
    assert len(runs) == 3


def test_unconditioned_is_the_original_network():
    base, (x, z) = Net().eval(), inputs()
    model = tf.condition(copy.deepcopy(base), SITES, tf.Vector(13))
    randomise(model.film)
    with tf.unconditioned(model):
        assert torch.equal(model(x), base(x))
        assert torch.equal(model(x, cond=z), base(x))
    assert not torch.allclose(model(x, cond=z), base(x))


def test_transforms_act_between_generator_and_sites_in_order():
    model, (x, z) = conditioned(), inputs()
    film, seen = conditioning(model), []

    def double(values):
        return {name: m.replace(gamma=2 * m.gamma) for name, m in values.items()}

    def look(values):
        seen.append({name: m.gamma for name, m in values.items()})
        return values

    with film.transformed(double), film.transformed(look):
        y = model(x, cond=z)
        with tf.unconditioned(model):
            model(x)
    assert len(seen) == 1
    assert torch.equal(seen[0]["blocks.0.bn"], 2 * film.modulations(z)["blocks.0.bn"].gamma)
    torch.testing.assert_close(y, by_hand(model, x, double(film.modulations(z))))
    assert film.transforms == []


def test_removal_is_exact():
    model, (x, z) = Net().eval(), inputs()
    before, expected = {name: dict(vars(m)) for name, m in model.named_modules()}, model(x)
    kinds = {name: type(m) for name, m in model.named_modules()}
    tf.condition(model, SITES, tf.Vector(13))
    randomise(model.film)
    model(x, cond=z)
    assert tf.remove(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before
    assert torch.equal(model(x), expected)
    tf.condition(model, SITES, tf.Vector(13))


@pytest.mark.plain
def test_an_exception_leaves_nothing_behind():
    model, (x, z) = conditioned(), inputs()
    film = conditioning(model)
    with pytest.raises(RuntimeError), tf.using(model, cond=z):
        model(torch.randn(2, 5, 11, 7))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 11, 7), cond=z)
    assert film.local.values is None
    assert [(slot.value, slot.ready) for slot in film.slots.values()] == [(None, None)] * 2
    with pytest.raises(ValueError, match="expected an active condition"):
        model(x)
    tf.remove(model)
    model(x)


@pytest.mark.plain
@pytest.mark.parametrize("failing", ["register_forward_pre_hook", "add_module"])
def test_a_change_that_fails_is_undone(failing: str, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 7, batch_first=True))
    kinds = [type(m) for m in model.modules()]

    def fail(*args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(nn.Module, failing, fail)
    with pytest.raises(RuntimeError, match="out of order"):
        tf.condition(model, "0.norm1", tf.Vector(13))
    assert [type(m) for m in model.modules()] == kinds
    assert "film" not in dict(model.named_children())


@pytest.mark.plain
def test_a_model_is_conditioned_once():
    model = conditioned()
    with pytest.raises(ValueError, match=r"got a Net that is conditioned already"):
        tf.condition(model, "head", tf.Vector(13))
    outer = nn.Sequential(model)
    with pytest.raises(ValueError, match=r"Site '0.blocks.0.bn': expected a plain module, got a BatchNorm2d"):
        tf.condition(outer, r"0\.blocks\.0\.bn", tf.Vector(13))
    with pytest.raises(ValueError, match=r"expected each module once, got 'head'"):
        tf.condition(Net(), tf.find(Net(), "head") + tf.find(Net(), "head", where="input"), tf.Vector(13))


@pytest.mark.plain
def test_a_plain_model_has_no_conditioning():
    with pytest.raises(ValueError, match=r"Net: expected a conditioned network, got a plain one"):
        conditioning(Net())
    with pytest.raises(ValueError, match=r"expected a conditioned network"):
        tf.remove(Net())


@pytest.mark.plain
def test_wrapped_and_patched_models_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"inside of AveragedModel.\nCondition it, then wrap it"):
        tf.condition(torch.optim.swa_utils.AveragedModel(Net()), "module.head", tf.Vector(13))
    with pytest.raises(ValueError, match=r"got a compiled one"):
        tf.condition(torch.compile(Net(), backend="eager"), ".*head", tf.Vector(13))
    model = Net()
    model.film = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"expected a network without an attribute 'film'"):
        tf.condition(model, "head", tf.Vector(13))
    model = Net()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r"whose forward is compiled or was replaced"):
        tf.condition(model, "head", tf.Vector(13))


@pytest.mark.plain
def test_patches_that_came_later_are_taken_off_first():
    model, (x, z) = conditioned(), inputs()
    inner = model.blocks[0].bn.forward
    model.blocks[0].bn.forward = lambda x: inner(x)
    expected = model(x, cond=z)
    with pytest.raises(ValueError, match=r"remove: .* own forward at 'blocks.0.bn', but another was put on"):
        tf.remove(model)
    with pytest.raises(ValueError, match=r"fold: .* own forward at(.|\n)*keep_fp32_wrapper=False"):
        tf.fold(model, cond=z[:1])
    assert torch.equal(model(x, cond=z), expected)
    del model.blocks[0].bn.forward
    tf.remove(model)


def test_a_forward_that_was_put_back_on_the_instance_is_no_patch():
    model, (x, z) = Net().eval(), inputs()
    plain = model(x)
    for module in (model, model.blocks[0].bn):
        module.forward = module.forward
    tf.condition(model, SITES, tf.Vector(13))
    randomise(model.film)
    heard = model(x, cond=z)
    assert not torch.allclose(heard, plain)
    for module in (model, model.blocks[0].bn):
        module.forward = module.forward
    assert torch.equal(model(x, cond=z), heard)
    assert torch.equal(tf.remove(model)(x), plain)


@pytest.mark.plain
def test_a_batch_that_is_a_multiple_is_told_how_to_share_conditions():
    model, (x, z) = conditioned(), inputs()
    with pytest.raises(ValueError, match=r"each condition serves 3 rows of x, .*repeat=3, or repeat='any'"):
        model(x.repeat_interleave(3, dim=0), cond=z)


@pytest.mark.plain
def test_what_encodes_the_condition_has_a_size():
    pair = tf.Vector(13)
    pair.dim = (6, 7)
    for cond, got in ((nn.Linear(3, 5), "Linear with dim=None"), (pair, r"Vector with dim=\(6, 7\)")):
        with pytest.raises(ValueError, match=rf"expected a module with an integer `dim`.* got {got}"):
            tf.condition(Net(), "head", cond)


def test_a_generator_of_ones_own_replaces_that_of_the_fusion():
    made = tf.Generator(13, {"blocks.0.bn": 3, "blocks.1.bn": 3}, emit=("beta",))
    model = tf.condition(Net(), SITES, tf.Vector(13), generator=made)
    assert conditioning(model).generator is made
    model = tf.condition(Net(), SITES, tf.Vector(13), generator=tf.Generator)
    assert list(conditioning(model).generator.sites) == ["blocks.0.bn", "blocks.1.bn"]
    pair = tf.Vector(13)
    pair.dim = (6, 7)
    assert conditioning(tf.condition(Net(), SITES, pair, generator=made)).generator is made
    tf.condition(Net(), SITES, pair, generator=lambda dim, sites: tf.Generator(sum(dim), sites))


@pytest.mark.plain
def test_options_go_to_the_generator_and_not_beside_one():
    model = tf.condition(Net(), SITES, tf.Vector(13), emit=("beta",))
    assert conditioning(model).generator.emit == ("beta",)
    with pytest.raises(ValueError, match=r"expected no options beside a generator, got bound"):
        tf.condition(Net(), SITES, tf.Vector(13), generator=tf.Generator, bound="tanh")
    with pytest.raises(ValueError, match=r"options expected one of .*, got 'device'"):
        tf.condition(Net(), SITES, tf.Vector(13), device="cpu")


def test_a_network_whose_forward_has_a_cond_of_its_own_keeps_it():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x, cond=1):
            return self.layer(cond * x)

    model, x, z = Own(), torch.randn(2, 3), torch.randn(2, 13)
    expected = model(x, cond=2)
    tf.condition(model, "layer", tf.Vector(13))
    with tf.using(model, cond=z):
        assert torch.equal(model(x, cond=2), expected)


def test_copies_and_pickles_listen_on_their_own():
    model, (x, z) = conditioned(), inputs()
    expected = model(x, cond=z)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, cond=z), expected)
        randomise(other.film)
        assert not torch.allclose(other(x, cond=z), expected)
        assert torch.equal(model(x, cond=z), expected)


def test_a_frozen_encoder_stays_in_evaluation():
    class Encoder(nn.Sequential):
        dim = 6

    model = tf.condition(Net(), SITES, Encoder(nn.Linear(13, 6), nn.Dropout()).eval())
    assert not model.film.cond[1].training
    assert model.film.generator.training
    assert not tf.condition(Net().eval(), SITES, tf.Vector(13)).film.generator.training


def test_a_traced_graph_is_refused():
    with pytest.raises(ValueError, match=r"got an fx.GraphModule(.|\n)*nn.Sequential\(graph\)"):
        tf.condition(torch.fx.symbolic_trace(Net()), "stem", tf.Vector(13))


@pytest.mark.parametrize("order", ["before", "after"])
def test_parametrisations_may_come_before_or_after(order: str):
    model, (x, z) = Net().eval(), inputs()
    expected = model(x)
    if order == "before":
        parametrizations.weight_norm(model.blocks[0].conv)
    tf.condition(model, r"blocks\.\d\.conv", tf.Vector(13))
    if order == "after":
        parametrizations.weight_norm(model.blocks[0].conv)
    torch.testing.assert_close(model(x, cond=z), expected)
    randomise(model.film)
    heard = model(x, cond=z)
    assert not torch.allclose(heard, expected)
    torch.testing.assert_close(copy.deepcopy(model)(x, cond=z), heard)
    parametrize.remove_parametrizations(model.blocks[0].conv, "weight")
    torch.testing.assert_close(model(x, cond=z), heard)
    tf.remove(model)
    assert type(model.blocks[0].conv) is nn.Conv2d
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_removal_leaves_parametrisations(order: str):
    model, (x, _) = Net().eval(), inputs()
    expected = model(x)
    if order == "before":
        parametrizations.weight_norm(model.blocks[0].conv)
    tf.condition(model, r"blocks\.\d\.conv", tf.Vector(13))
    if order == "after":
        parametrizations.weight_norm(model.blocks[0].conv)
    tf.remove(model)
    assert parametrize.is_parametrized(model.blocks[0].conv, "weight")
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(model.blocks[0].conv, "weight")
    assert type(model.blocks[0].conv) is nn.Conv2d


@pytest.mark.plain
def test_sites_that_others_replaced_are_an_error_and_not_silence():
    model, (x, z) = conditioned(), inputs()
    model(x, cond=z)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    with pytest.raises(
        ValueError, match=r"Site 'blocks.0.bn': expected the module that was conditioned, got ano"
    ):
        converted(x, cond=z)
    with pytest.raises(ValueError, match=r"got another SyncBatchNorm in its place"):
        converted.eval()
    del model.blocks[1]
    with pytest.raises(ValueError, match=r"Site 'blocks.1.bn': .* got nothing in its place"):
        model.train()
    tf.remove(model)
    assert type(model.blocks[0].bn) is nn.BatchNorm2d


def test_a_class_with_a_metaclass_listens():
    class Abstract(nn.Module, abc.ABC):
        @abc.abstractmethod
        def kind(self): ...

    class Concrete(Abstract):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def kind(self): ...

        def forward(self, x):
            return self.layer(x)

    model, x = Concrete(), torch.randn(2, 3)
    expected = model(x)
    assert torch.equal(tf.condition(model, "layer", tf.Vector(13))(x, cond=torch.randn(2, 13)), expected)


FUSIONS = ("film", "scale", "bias", "gate", "concat", "low_rank", "cross_attention")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_listens_at_the_same_sites(fusion: str):
    base, (x, z) = Net().eval(), inputs()
    model = tf.condition(copy.deepcopy(base), SITES, tf.Vector(13), fusion=fusion)
    assert torch.equal(model(x, cond=z), base(x))
    randomise(model.film)
    assert not torch.allclose(model(x, cond=z), model(x, cond=-z))
    assert torch.equal(model(x, modulation=conditioning(model).modulations(z)), model(x, cond=z))


def test_conditions_may_be_several_missing_or_tokens():
    (x, z), both = inputs(), tf.Several({"a": tf.Vector(13), "b": tf.Maybe(tf.Vector(4))}, "compose")
    model = tf.condition(Net(), SITES, both)
    randomise(model.film)
    assert not torch.allclose(model(x, cond={"a": z}), model(x, cond={"a": z, "b": torch.randn(2, 4)}))
    model = tf.condition(Net(), SITES, tf.Maybe(tf.Vector(13))).eval()
    randomise(model.film)
    some = model(x, cond=tf.Masked(z, torch.tensor([True, False])))
    torch.testing.assert_close(some[0], model(x, cond=z)[0])
    torch.testing.assert_close(some[1], model(x, cond=tf.Masked(None))[1])
    model = tf.condition(Net(), SITES, tf.Tokens(6)).eval()
    randomise(model.film)
    words, mask = torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    shorter = model(x[1:], cond=(words[1:, :3], mask[1:, :3]))
    torch.testing.assert_close(model(x, cond=(words, mask))[1:], shorter)


class Queue(nn.Module):
    """A network with a length of its own, which is zero, and another way to set the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.warm = nn.Linear(3, 5), False

    def __len__(self) -> int:
        return 0

    def forward(self, x):
        return self.linear(x)

    def train(self, mode=True, *, warm=False):
        self.warm = warm
        return super().train(mode)


def test_a_network_of_no_length_is_found_in_its_wrappers_and_keeps_its_way_to_set_the_mode():
    model = tf.condition(Queue(), "linear", tf.Vector(7))
    for wrapped in (torch.compile(model, backend="eager"), torch.optim.swa_utils.AveragedModel(model)):
        assert tf.conditioning(wrapped) is not None
    assert model.train(warm=True).warm
