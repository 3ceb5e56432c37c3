"""What is frozen while only the conditioning trains, whatever others wrap around it afterwards."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import torchfilm as tf
from networks import SITES, Net, inputs


def test_freezing_the_base_leaves_the_conditioning_alone_to_train():
    model, (x, _) = tf.condition(Net(), SITES, tf.Classes(5, 13)), inputs()
    assert tf.freeze_base(model) is model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if name.startswith("film.")}
    statistics = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    model.train()(x, cond=torch.tensor([3, 1])).sum().backward()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in statistics.items())
    assert model.training
    assert model.film.training
    assert not model.blocks[0].bn.training


def test_the_norms_of_the_encoder_go_on_learning_where_the_base_is_frozen():
    class Encoder(nn.Sequential):
        dim = 6

    encoder = Encoder(nn.Linear(13, 6), nn.BatchNorm1d(6))
    model, (x, z) = tf.freeze_base(tf.condition(Net(), SITES, encoder)).train(), inputs(4)
    model(x, cond=z)
    assert encoder[1].num_batches_tracked == 1
    assert model.blocks[0].bn.num_batches_tracked == 0


@pytest.mark.parametrize("inner_first", [True, False])
def test_the_conditioning_of_a_network_inside_is_frozen_with_the_base(inner_first: bool):
    inner = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Vector(5))
    outer = tf.condition(nn.ModuleDict({"inner": inner, "head": nn.Linear(3, 2)}), "head", tf.Vector(7))
    for one in (inner, outer) if inner_first else (outer, inner):
        tf.freeze_base(one)
    trained = {name.split(".generator")[0] for name, p in outer.named_parameters() if p.requires_grad}
    assert trained == {"film"}


def test_removal_lets_the_base_train_again():
    model = Net()
    model.stem.requires_grad_(False)
    model.blocks[1].eval()
    tf.freeze_base(tf.freeze_base(tf.condition(model, SITES, tf.Vector(13))))
    tf.remove(model)
    assert [block.bn.training for block in model.blocks] == [True, False]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", "stem.bias"}
    assert model.train().blocks[0].bn.training


def test_unfreezing_lets_everything_train_as_before_and_keeps_the_conditioning():
    model = tf.condition(Net(), SITES, tf.Vector(13))
    model.stem.requires_grad_(False)
    model.blocks[1].eval()
    assert tf.unfreeze_base(tf.freeze_base(model)) is model
    assert [block.bn.training for block in model.blocks] == [True, False]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", "stem.bias"}
    assert model.eval().train().blocks[1].bn.training
    x, z = inputs(4)
    model(x, cond=z).sum().backward()
    assert model.blocks[0].bn.num_batches_tracked == 1
    assert model.head.weight.grad is not None
    model.head.requires_grad_(False)
    tf.remove(tf.unfreeze_base(model))  # frozen no more: what is frozen since stays so
    assert not model.head.weight.requires_grad


def test_what_estimates_statistics_anew_leaves_those_of_a_frozen_base():
    model, (x, z) = tf.condition(Net(), SITES, tf.Vector(13)), inputs(4)
    model(x, cond=z)
    averaged = AveragedModel(tf.freeze_base(model.train()))
    before = {key: value.clone() for key, value in averaged.module.named_buffers()}
    assert before
    with tf.using(averaged, cond=z):
        update_bn([x], averaged)
        assert all(torch.equal(value, before[key]) for key, value in averaged.module.named_buffers())
        tf.unfreeze_base(averaged)
        update_bn([x, x], averaged)
    assert averaged.module.blocks[0].bn.num_batches_tracked == 2
    assert not [one for one in averaged.modules() if "reset_running_stats" in vars(one)]


def test_what_was_frozen_before_norms_knew_their_network_can_be_read():
    model = tf.freeze_base(tf.condition(Net(), SITES, tf.Vector(13)))
    del model.film.frozen.hold  # as in a pickle from before
    again = pickle.loads(pickle.dumps(model)).train()
    assert again.film.frozen.hold is not None
    assert not any(norm.training for norm in again.modules() if isinstance(norm, nn.BatchNorm2d))


def test_unfreezing_in_evaluation_leaves_the_norms_there():
    model = tf.freeze_base(tf.condition(Net(), SITES, tf.Vector(13))).eval()
    assert not any(module.training for module in tf.unfreeze_base(model).modules())


def test_a_norm_without_statistics_may_take_the_place_of_a_frozen_one():
    model, (x, z) = tf.freeze_base(tf.condition(Net(), r"stem", tf.Vector(13))), inputs(4)
    model.blocks[0].bn = nn.BatchNorm2d(model.blocks[0].bn.num_features, track_running_stats=False)
    model.train()(x, cond=z)
    assert not model.blocks[0].bn.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_part_that_is_copied_out_of_a_frozen_network_and_trained_is_reset_as_any_norm(copied):
    layers = nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3))
    layers(torch.randn(9, 5))
    part = copied(tf.freeze_base(tf.condition(layers, "1", tf.Vector(7)))[0]).train()
    part[1].reset_running_stats()
    assert (part[1].num_batches_tracked, part[1].running_mean.any()) == (0, False)
    assert layers[0][1].num_batches_tracked == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_part_that_is_copied_out_of_a_frozen_network_is_measured_anew(copied):
    layers = nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3))
    layers(torch.randn(9, 5))
    part = copied(tf.freeze_base(tf.condition(layers, "1", tf.Vector(7)))[0])
    x = 3 * torch.rand(9, 5) - 5
    update_bn([x], part)
    torch.testing.assert_close(part[1].running_mean, part[0](x).mean(dim=0))


def test_what_is_frozen_on_the_meta_device_is_reset_where_it_gets_its_memory():
    with torch.device("meta"):
        layers = tf.condition(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), "1", tf.Vector(7))
    norm = tf.freeze_base(layers).to_empty(device="cpu")[0]
    norm.running_mean.fill_(77)
    norm.reset_parameters()
    assert not norm.running_mean.any()


@pytest.mark.parametrize("change", [tf.freeze_base, tf.unfreeze_base], ids=lambda change: change.__name__)
def test_inside_of_folded_nothing_is_frozen_nor_unfrozen(change):
    model, (_, z) = tf.condition(Net().eval(), SITES, tf.Vector(13)), inputs()
    with tf.folded(model, cond=z[:1]), pytest.raises(ValueError, match=f"got {change.__name__}"):
        change(model)


WRAPPED = {
    "compiled": lambda block: torch.compile(block, backend="eager"),
    "wrapped": nn.Sequential,
    "weight_norm": lambda block: nn.utils.parametrizations.weight_norm(block.conv) and block,
    "as it is": lambda block: block,
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_what_is_wrapped_afterwards_stays_frozen_and_is_trained_again_after_removal(name: str, copied):
    model = Net()
    model.blocks[1].conv.bias.requires_grad_(False)
    tf.freeze_base(tf.condition(model, r"blocks\.0\.bn", tf.Vector(13)))
    model = copied(model)
    model.blocks[1] = WRAPPED[name](model.blocks[1])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.training for norm in model.train() and norms] == [False, False]
    assert not [key for key, p in model.named_parameters() if p.requires_grad and not key.startswith("film.")]
    tf.remove(model)
    assert [norm.training for norm in norms] == [True, True]
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 1
    assert frozen[0].endswith("conv.bias")


def test_what_a_parametrised_weight_is_made_of_is_trained_again_only_if_it_was():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.head)
    model.head.parametrizations.weight.original0.requires_grad_(False)
    tf.remove(tf.freeze_base(tf.condition(model, SITES, tf.Vector(13))))
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["head.parametrizations.weight.original0"]


@pytest.mark.parametrize("where", ["output", "input"])
def test_a_base_that_is_frozen_stays_so_where_a_condition_is_folded_in(where: str):
    model, (x, z) = tf.condition(Net(), SITES, tf.Vector(13), where=where, init="default"), inputs()
    tf.freeze_base(model.train())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = model(x, cond=z[:1])
    with tf.folded(model, cond=z[:1], leftover="constant"):
        torch.testing.assert_close(model(x), expected)
    plain, _ = tf.fold(model, cond=z[:1], leftover="constant")
    assert not any(norm.training for norm in plain.modules() if isinstance(norm, nn.BatchNorm2d))
    torch.testing.assert_close(plain(x), expected)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_a_frozen_weight_that_is_replaced_is_let_go_and_the_new_one_is_thawed_where_it_can_be():
    model = tf.freeze_base(tf.condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5)), "1", tf.Vector(7)))
    old = weakref.ref(model[0].weight)
    model[0].weight = nn.Parameter(torch.zeros(5, 3), requires_grad=False)
    model[1].weight = nn.Parameter(torch.zeros(5, 5, dtype=torch.int8), requires_grad=False)
    gc.collect()
    assert old() is None
    tf.remove(model)
    assert model[0].weight.requires_grad
    assert not model[1].weight.requires_grad


@pytest.mark.plain
def test_a_frozen_network_with_a_parameter_of_its_own_is_freed_at_once():
    model = Net()
    model.token = nn.Parameter(torch.zeros(3))
    tf.freeze_base(tf.condition(model, SITES, tf.Vector(13)))
    weight = weakref.ref(model.stem.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_parameter_of_the_root_is_frozen_and_trained_again_after_removal(copied):
    model = Net()
    model.token = nn.Parameter(torch.zeros(3))
    model = copied(tf.freeze_base(tf.condition(model, SITES, tf.Vector(13))))
    assert not model.token.requires_grad
    assert tf.remove(model).token.requires_grad
