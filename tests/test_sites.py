"""Finding sites: what matches, where the channels are, what is refused and why."""

import copy
import re
import time

import numpy as np
import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net
from torchfilm.channels import channels

# Each layer with an input for it; sizes pairwise different, so that only one axis fits.
LAYERS = {
    "Conv1d": (nn.Conv1d(3, 5, 1), (2, 3, 7)),
    "Conv2d": (nn.Conv2d(3, 5, 1), (2, 3, 7, 11)),
    "Conv3d": (nn.Conv3d(3, 5, 1), (2, 3, 7, 11, 4)),
    "ConvTranspose1d": (nn.ConvTranspose1d(3, 5, 1), (2, 3, 7)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 5, 1), (2, 3, 7, 11)),
    "ConvTranspose3d": (nn.ConvTranspose3d(3, 5, 1), (2, 3, 7, 11, 4)),
    "Conv2d/unbatched": (nn.Conv2d(3, 5, 1), (3, 7, 11)),
    "Linear": (nn.Linear(3, 5), (2, 7, 3)),
    "Embedding": (nn.Embedding(13, 5), None),
    "BatchNorm1d": (nn.BatchNorm1d(3), (2, 3, 7)),
    "BatchNorm1d/flat": (nn.BatchNorm1d(3), (2, 3)),
    "BatchNorm2d": (nn.BatchNorm2d(3), (2, 3, 7, 11)),
    "BatchNorm3d": (nn.BatchNorm3d(3), (2, 3, 7, 11, 4)),
    "InstanceNorm1d": (nn.InstanceNorm1d(3), (2, 3, 7)),
    "InstanceNorm2d": (nn.InstanceNorm2d(3), (2, 3, 7, 11)),
    "InstanceNorm2d/unbatched": (nn.InstanceNorm2d(3), (3, 7, 11)),
    "InstanceNorm3d": (nn.InstanceNorm3d(3), (2, 3, 7, 11, 4)),
    "GroupNorm": (nn.GroupNorm(3, 6), (2, 6, 7, 11)),
    "LayerNorm": (nn.LayerNorm(3), (2, 7, 3)),
    "RMSNorm": (nn.RMSNorm(3), (2, 7, 3)),
    "LSTM": (nn.LSTM(3, 5, batch_first=True), (2, 7, 3)),
    "LSTM/both ways": (nn.LSTM(3, 5, bidirectional=True, batch_first=True), (2, 7, 3)),
    "LSTM/projected": (nn.LSTM(3, 5, proj_size=4, batch_first=True), (2, 7, 3)),
    "GRU": (nn.GRU(3, 5, batch_first=True), (2, 7, 3)),
    "RNN": (nn.RNN(3, 5, batch_first=True), (2, 7, 3)),
    "GRUCell": (nn.GRUCell(3, 5), (2, 3)),
    "LSTMCell": (nn.LSTMCell(3, 5), (2, 3)),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(6, 2, 5, batch_first=True), (2, 7, 6)),
    "TransformerEncoder": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 5, batch_first=True), 2),
        (2, 7, 6),
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", LAYERS)
def test_the_channels_of_known_layers_are_where_the_layer_puts_them(name: str):
    layer, shape = LAYERS[name]
    x = torch.randint(13, (2, 7)) if shape is None else torch.randn(shape)
    output = layer(x)
    while isinstance(output, tuple):
        output = output[0]
    features, dim = channels(layer, "output")
    assert output.shape[dim] == features
    assert sum(size == features for size in output.shape) == 1
    if shape is not None:
        features, dim = channels(layer, "input")
        assert x.shape[dim] == features


LISTENING = {
    "FiLM": (tf.FiLM(3, 4), (2, 3, 7, 11)),
    "FiLM/tokens": (tf.FiLM(3, 4, dim=-1), (2, 7, 3)),
    "DenseFiLM": (tf.DenseFiLM(3, 4), (2, 7, 3)),
    "BatchNorm1d": (tf.ConditionalBatchNorm1d(3, 4), (2, 3, 7)),
    "BatchNorm2d": (tf.ConditionalBatchNorm2d(3, 4), (2, 3, 7, 11)),
    "BatchNorm3d": (tf.ConditionalBatchNorm3d(3, 4), (2, 3, 7, 11, 5)),
    "InstanceNorm1d": (tf.ConditionalInstanceNorm1d(3, 4), (2, 3, 7)),
    "InstanceNorm2d": (tf.ConditionalInstanceNorm2d(3, 4), (2, 3, 7, 11)),
    "InstanceNorm3d": (tf.ConditionalInstanceNorm3d(3, 4), (2, 3, 7, 11, 5)),
    "GroupNorm": (tf.ConditionalGroupNorm(1, 3, 4), (2, 3, 7, 11)),
    "LayerNorm": (tf.ConditionalLayerNorm(3, 4), (2, 7, 3)),
    "RMSNorm": (tf.ConditionalRMSNorm(3, 4), (2, 7, 3)),
    "AdaLNZero": (tf.AdaLNZero(3, 4, gate="one"), (2, 7, 3)),
    "AdaRMSNorm": (tf.AdaRMSNorm(3, 4, gate="one"), (2, 7, 3)),
}


class Hearing(nn.Module):
    """A network with a layer that listens by itself, to a condition of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, own):
        y = self.layer(x, own)
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", LISTENING)
@pytest.mark.parametrize("where", ["output", "input"])
def test_layers_that_listen_are_sites_whose_channels_are_known(name: str, where: str):
    layer, shape = copy.deepcopy(LISTENING[name])
    model, plain = Hearing(randomise(layer)), Hearing(copy.deepcopy(layer))
    x, own = torch.randn(shape), torch.randn(2, 4)
    (site,) = tf.find(model, "layer", where=where)
    assert (site.features, shape[site.dim]) == (3, 3)
    assert ("the first of its outputs" in site.note) == (name.startswith("Ada") and where == "output")
    tf.condition(model, "layer", tf.Vector(6), where=where)
    m = tf.Modulation(torch.rand(2, 3) + 0.5, torch.randn(2, 3))
    sizes = [2] + [3 if shape[site.dim] == size else 1 for size in shape[1:]]
    gamma, beta = m.gamma.view(sizes), m.beta.view(sizes)
    expected = gamma * plain(x, own) + beta if where == "output" else plain(gamma * x + beta, own)
    torch.testing.assert_close(model(x, own, modulation={"layer": m}), expected)


def test_the_input_of_a_bilinear_layer_is_its_first():
    layer = nn.Bilinear(3, 5, 7)
    assert (channels(layer, "output"), channels(layer, "input")) == ((7, -1), (3, -1))


def test_the_channels_of_a_decoder_are_on_the_last_axis_of_what_it_decodes():
    layer = nn.TransformerDecoderLayer(6, 2, 5, batch_first=True)
    for decoder in (layer, nn.TransformerDecoder(layer, 2)):
        assert decoder(torch.randn(2, 7, 6), torch.randn(2, 3, 6)).shape == (2, 7, 6)
        assert channels(decoder, "output") == channels(decoder, "input") == (6, -1)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("where", ["output", "input"])
def test_known_layers_are_conditioned_on_the_side_that_was_asked_for(name: str, where: str):
    layer, shape = LAYERS[name]
    if name.endswith("unbatched") or (shape is None and where == "input"):
        pytest.skip("no batch, or no channels there")
    x = torch.randint(13, (2, 7)) if shape is None else torch.randn(shape)
    model = nn.Sequential(layer).eval()

    def first(output):
        while isinstance(output, tuple):
            output = output[0]
        return output

    plain = first(model(x))
    tf.condition(model, "0", tf.Vector(3), where=where)
    z = torch.randn(2, 3)
    torch.testing.assert_close(first(model(x, cond=z)), plain)
    m, dim = model.film.modulations(z)["0"], model.film.sites["0"].dim
    gamma, beta = torch.rand_like(m.gamma) + 0.5, torch.randn_like(m.beta)
    changed = first(model(x, modulation={"0": tf.Modulation(gamma, beta)}))

    def modulated(t):
        shape = [2] + [1] * (t.ndim - 1)
        shape[dim] = gamma.shape[1]
        return gamma.view(shape) * t + beta.view(shape)

    tf.remove(model)
    expected = modulated(plain) if where == "output" else first(model(modulated(x)))
    torch.testing.assert_close(changed, expected)


def test_a_whole_name_has_to_match():
    assert [site.name for site in tf.find(Net(), SITES)] == ["blocks.0.bn", "blocks.1.bn"]
    with pytest.raises(ValueError, match="'bn' matches the whole name of none of the"):
        tf.find(Net(), "bn")


def test_lists_functions_and_earlier_finds_select_sites_in_the_order_of_the_model():
    model, names = Net(), ["stem", "blocks.1.bn", "head"]
    found = tf.find(model, ["head", r"blocks\.1\.bn", "stem"])
    assert [site.name for site in found] == names
    assert tf.find(model, lambda name, module: name in names) == found
    assert tf.find(model, found) == found
    assert tf.find(model, ["stem"]) + tf.find(model, r"blocks\.1\.bn|head") == found
    assert isinstance(found + found, tf.Sites)


def test_an_earlier_find_keeps_its_options():
    model = Net()
    found = tf.find(model, "stem", where="input", repeat=3) + tf.find(model, "head")
    assert [(s.where, s.repeat, s.features) for s in tf.find(Net(), found)] == [
        ("input", 3, 2),
        ("output", 1, 5),
    ]
    tf.condition(model, found, tf.Vector(13))
    assert [site.where for site in model.film.sites.values()] == ["input", "output"]


@pytest.mark.plain
def test_some_of_the_sites_that_were_found_are_chosen_with_their_options():
    model = Net()
    found = tf.find(model, "stem|head", where="input", repeat=3)
    assert isinstance(found[:1], tf.Sites)
    for chosen in (found[0], found[:1], [site for site in found if site.name != "head"], (found[0],)):
        assert tf.find(Net(), chosen) == found[:1]
    with pytest.raises(ValueError, match=r"expected no options beside sites that were found"):
        tf.find(model, found[1], repeat=2)
    with pytest.raises(ValueError, match=r"got a Site among them.\nGive its name: 'stem'.$"):
        tf.find(model, ["head", found[0]])
    tf.condition(model, found[1:], tf.Vector(13))
    assert [(site.name, site.repeat) for site in model.film.sites.values()] == [("head", 3)]
    for sites in (found, found[0]):
        with pytest.raises(ValueError, match=r"got a Site among them.\nGive its name: 'stem'"):
            tf.sweep(model, sites, [0], list)


def test_a_search_prints_as_a_table():
    lines = repr(tf.find(Net(), "stem|blocks.1.bn")).splitlines()
    assert lines[0].split() == ["name", "type", "features", "dim", "where", "note"]
    assert lines[1].split() == ["stem", "Conv2d", "3", "-3", "output"]
    assert lines[2].split() == ["blocks.1.bn", "BatchNorm2d", "3", "1", "output"]


@pytest.mark.plain
def test_nothing_found_names_the_nearest_three():
    with pytest.raises(ValueError, match=r"nearest names are 'blocks.0.bn', 'blocks.1.bn', 'blocks.0.conv'"):
        tf.find(Net(), "block.0.bn")
    with pytest.raises(ValueError, match=r"'heads' matches .*\n.*'head'"):
        tf.find(Net(), ["stem", "heads"])
    with pytest.raises(ValueError, match="an empty list"):
        tf.find(Net(), [])
    with pytest.raises(ValueError, match=r"a function that is true for some .* true for none\.\nIt gets"):
        tf.find(Net(), lambda name, module: False)
    with pytest.raises(ValueError, match="none, for there are no names"):
        tf.find(nn.Linear(3, 5), "x")
    with pytest.raises(ValueError, match="'stem' matches"):
        tf.find(nn.Sequential(nn.Linear(3, 5)), tf.find(Net(), "stem"))


def test_a_compiled_expression_matches_as_its_text():
    assert tf.find(Net(), re.compile(r"blocks\.\d\.bn")) == tf.find(Net(), r"blocks\.\d\.bn")
    assert [site.name for site in tf.find(Net(), [re.compile("STEM", re.IGNORECASE), "head"])] == [
        "stem",
        "head",
    ]
    with pytest.raises(ValueError, match=r"nearest names are 'blocks.0.bn'"):
        tf.find(Net(), re.compile("block.0.bn"))


@pytest.mark.plain
def test_what_is_no_regular_expression_is_refused():
    model = Net()
    with pytest.raises(ValueError, match=r"expected patterns for names, got a Conv2d among them"):
        tf.find(model, [model.stem])
    with pytest.raises(ValueError, match=r"expected a name, or a regular expression, got 'blocks.\['"):
        tf.find(Net(), "blocks.[")


@pytest.mark.parametrize("name", ["c++", "a[0]", "(x", "*"])
def test_a_name_stands_for_itself_whatever_it_is_as_an_expression(name: str):
    model = nn.ModuleDict({name: nn.Linear(3, 5), "b": nn.Linear(3, 7)})
    assert [site.name for site in tf.find(model, name)] == [name]
    model["again"] = model[name]
    assert [site.name for site in tf.find(model, ["again", name])] == [name]


def test_a_name_with_a_dot_is_that_name_alone_and_else_a_dot_stands_for_any_character():
    model = nn.Sequential(*[nn.Linear(2, 3) for _ in range(101)])
    model[1] = nn.Sequential(nn.Linear(3, 5))
    assert [site.name for site in tf.find(model, "1.0")] == ["1.0"]
    assert [site.name for site in tf.find(model, ["1.0", "99"])] == ["1.0", "99"]
    assert [site.name for site in tf.find(model, re.compile("1.0"))] == ["1.0", "100"]
    assert [site.name for site in tf.find(model, "9.")] == [f"9{i}" for i in range(10)]


@pytest.mark.plain
def test_thousands_of_names_are_found_in_a_moment():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 3) for _ in range(3000))})
    names, start = [f"layers.{i}" for i in range(3000)], time.process_time()
    assert [site.name for site in tf.find(model, names)] == names
    assert time.process_time() - start < 1


@pytest.mark.plain
def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"expected where 'output' or 'input', .* got 'middle', 1 and None"):
        tf.find(Net(), "stem", where="middle")
    with pytest.raises(ValueError, match=r"repeat at least 1 .* got 'output', 0 and None"):
        tf.find(Net(), "stem", repeat=0)
    with pytest.raises(ValueError, match=r"repeat at least 1 .* got 'output', 2.5 and None"):
        tf.find(Net(), "stem", repeat=2.5)
    for flag in ({"repeat": True}, {"batch": True}):
        with pytest.raises(ValueError, match="True"):
            tf.find(Net(), "stem", **flag)


@pytest.mark.plain
def test_a_number_of_rows_may_be_one_of_numpys():
    (site,) = tf.find(Net(), "stem", repeat=np.int64(4))
    assert site.repeat == 4
    assert type(site.repeat) is int


class ChannelsFirst(nn.LayerNorm):
    """A common subclass that normalises [B, C, H, W]."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OursChannelsFirst(tf.ConditionalLayerNorm):
    """The same of a layer of torchfilm."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x.movedim(1, -1), *args, **kwargs).movedim(-1, 1)


class OwnRMSNorm(nn.Module):
    """As every language model has one."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(("layer", "width"), [(OwnRMSNorm(7), 7), (OwnRMSNorm(1), None), (nn.PReLU(), None)])
def test_a_weight_for_each_channel_says_how_many_there_are_and_a_single_number_does_not(layer, width):
    assert channels(layer, "output") == channels(layer, "input") == (width, None)


@pytest.mark.plain
def test_channels_that_are_not_known_have_to_be_said():
    model = nn.Sequential(
        nn.ReLU(), nn.LayerNorm((3, 5)), ChannelsFirst(3), OwnRMSNorm(7), nn.Embedding(3, 5)
    )
    with pytest.raises(ValueError, match=r"Site '0': .* got a ReLU \(its output\).\nGive features and dim"):
        tf.find(model, "0")
    with pytest.raises(ValueError, match=r"Site '1': .* got a LayerNorm"):
        tf.find(model, "1")
    with pytest.raises(ValueError, match=r"Site '2': .* got a ChannelsFirst .*\nGive dim"):
        tf.find(model, "2")
    with pytest.raises(ValueError, match=r"Site '4': .* got a Embedding \(its input\)"):
        tf.find(model, "4", where="input")
    with pytest.raises(ValueError, match=r"Site '0': .* got a OursChannelsFirst .*\nGive features and dim"):
        tf.find(nn.Sequential(OursChannelsFirst(3, 7)), "0")
    assert tf.find(model, "0", dim=1, features=3)[0].features == 3
    assert tf.find(model, "2", dim=1)[0].features == 3
    assert tf.find(model, "3", dim=-1)[0].features == 7


class Block(nn.Module):
    """A block of others: its width is an attribute of its own."""

    def __init__(self, inputs, width):
        super().__init__()
        self.mix, self.width = nn.Conv2d(inputs, width, 1), width

    def forward(self, x):
        return self.mix(x)


def test_a_function_says_the_channels_of_blocks_of_several_widths():
    model = nn.Sequential(Block(3, 5), Block(5, 7), nn.Conv2d(7, 2, 1))
    told = {"features": lambda name, block: getattr(block, "width", None)}  # of the convolution it is known
    told["dim"] = lambda name, block: {"0": 1, "1": -3}.get(name)
    found = tf.find(model, r"\d", **told)
    assert [(site.features, site.dim) for site in found] == [(5, 1), (7, -3), (2, -3)]
    x, z = torch.randn(2, 3, 4, 4), torch.randn(2, 13)
    plain = model(x)
    assert torch.equal(tf.condition(model, r"\d", tf.Vector(13), **told)(x, cond=z), plain)
    assert list(model.film.modulations(z)["1"].gamma.shape) == [2, 7]
    with pytest.raises(ValueError, match=r"Site '1': .* got a Block .*\nGive features"):
        tf.find(nn.Sequential(nn.ReLU(), Block(3, 5)), "1", dim=1, features=lambda name, block: None)


@pytest.mark.plain
def test_modules_that_cannot_listen_are_refused_with_advice():
    attention = nn.MultiheadAttention(6, 2)
    with pytest.raises(
        ValueError, match=r"(?s)reads the weight of its out_proj.*Condition the attention itself"
    ):
        tf.find(nn.Sequential(attention), r"0\.out_proj")
    with pytest.raises(ValueError, match=r"got a ModuleList, which has no forward"):
        tf.find(Net(), "blocks", dim=1, features=3)
    with pytest.raises(ValueError, match=r"got a LazyLinear that was never called"):
        tf.find(nn.Sequential(nn.LazyLinear(3)), "0")
    model = Net()
    model.stem.forward = lambda x: x
    with pytest.raises(ValueError, match=r"got a Conv2d whose forward was replaced on the instance"):
        tf.find(model, "stem")


def test_a_tied_module_is_one_site_under_its_first_name():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    (site,) = tf.find(model, "2")
    assert (site.name, site.note) == ("0", "also used as 2: the same modulation for each use")
    x, z = torch.randn(2, 3), torch.randn(2, 5)
    tf.condition(model, "2", tf.Vector(5))
    m = tf.Modulation(torch.rand(2, 3), torch.rand(2, 3))
    y = model(x, modulation={"0": m})
    first = m.gamma * layer._film_base.forward(layer, x) + m.beta
    second = m.gamma * layer._film_base.forward(layer, first.relu()) + m.beta
    torch.testing.assert_close(y, second)
    assert model(x, cond=z).shape == (2, 3)


def test_conditioned_parts_of_a_model_are_left_out():
    model = nn.Sequential(tf.condition(Net(), SITES, tf.Vector(13)), nn.Linear(5, 5))
    names = [site.name for site in tf.find(model, lambda name, module: isinstance(module, nn.Linear))]
    assert names == ["0.head", "1"]


class FrozenNorm(nn.Module):
    """As torchvision has one for detection: its numbers are buffers."""

    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))

    def forward(self, x):
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def test_a_weight_that_is_a_buffer_says_how_many_channels_there_are():
    assert channels(FrozenNorm(7), "output") == (7, None)
    with pytest.raises(ValueError, match=r"got a FrozenNorm \(its output\).\nGive dim:"):
        tf.find(nn.Sequential(FrozenNorm(7)), "0")


@pytest.mark.plain
def test_options_beside_sites_that_have_their_own_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    found = tf.find(model, "1")
    with pytest.raises(ValueError, match=r"beside sites that were found with theirs, got where='input'"):
        tf.condition(model, found, tf.Vector(7), where="input")
    with pytest.raises(
        ValueError, match=r"got dim=-1, features=3, field=0, repeat=3.\nGive them where the sites"
    ):
        tf.find(model, found, dim=-1, features=3, field=0, repeat=3)
    assert not isinstance(getattr(model, "film", None), nn.Module)
    assert tf.find(model, found) == found


@pytest.mark.plain
def test_a_module_is_no_pattern_and_a_preset_says_all_that_it_looked_for():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=r"got a module, BatchNorm2d.\nGive its name: '1'"):
        tf.find(model, model[1])
    with pytest.raises(
        ValueError, match=r"got a module, Vector.\nIt is none inside of this network: sites co"
    ):
        tf.condition(model, tf.Vector(16), "0")
    with pytest.raises(ValueError, match=r"norm2' or '.*layernorm_after' or '.*ln_2' matches the whole name"):
        tf.find(model, tf.preset("vit"))


def test_the_input_of_attention_is_its_query():
    net = nn.Sequential(nn.MultiheadAttention(6, 2, batch_first=True))
    assert [site.note for site in tf.find(net, "0", where="input")] == ["the query alone"]
    assert [site.note for site in tf.find(net, "0", where="input", field="key")] == ["input 'key'"]


def test_the_table_says_where_time_comes_first():
    net = nn.Sequential(nn.Linear(3, 6), nn.TransformerEncoderLayer(6, 2), nn.GRU(6, 5, batch_first=True))
    first, second, third = (site.note for site in tf.find(net, r"\d"))
    assert (first, second, third) == ("", "time first, the batch on axis 1", "the first of its outputs")
    assert [site.note for site in tf.find(net, "0", batch=1)] == [second]


@pytest.mark.parametrize("kind", [nn.Linear, nn.Identity])
def test_a_class_is_no_pattern(kind: type[nn.Module]):
    with pytest.raises(
        ValueError, match=rf"got the class {kind.__name__}.\n.*isinstance\(module, {kind.__name__}\)"
    ):
        tf.find(nn.Sequential(nn.Linear(3, 6)), kind)


def test_a_site_is_no_network_to_be_conditioned_once_more():
    net = tf.condition(nn.Sequential(nn.Sequential(nn.Linear(3, 5))), "0", tf.Vector(7), features=5, dim=-1)
    with pytest.raises(ValueError, match="conditioned already"):
        tf.condition(net[0], "0", tf.Vector(7))


@pytest.mark.plain
@pytest.mark.parametrize("given", [{"dim": "1"}, {"features": 6.0}, {"features": lambda name, module: 6.0}])
def test_axis_and_channels_are_whole_numbers(given):
    (name, value), *_ = given.items()
    value = 6.0 if callable(value) else value
    with pytest.raises(
        ValueError, match=f"find: expected {name} as a whole number, .* got {value!r} for site '0'"
    ):
        tf.find(nn.Sequential(nn.Linear(3, 6)), "0", **given)
