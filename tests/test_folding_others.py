"""Networks of transformers and diffusers, conditioned and then folded into plain ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import case_id, randomise
from torchfilm.dataflow import last_layer

Network = tuple[nn.Module, Callable[..., Any]]


def vit() -> Network:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
    )
    x = torch.randn(2, 3, 32, 32)
    return transformers.ViTModel(config), lambda model, **given: model(x, **given).last_hidden_state


def bert() -> Network:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=50
    )
    words = torch.randint(50, (2, 7))
    return transformers.BertModel(config), lambda model, **given: model(words, **given).last_hidden_state


def llama() -> Network:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=50
    )
    words = torch.randint(50, (2, 7))
    return transformers.LlamaForCausalLM(config), lambda model, **given: model(words, **given).logits


def t5() -> Network:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2, vocab_size=50)
    words, answer = torch.randint(50, (2, 7)), torch.randint(50, (2, 3))
    model = transformers.T5ForConditionalGeneration(config)
    return model, lambda net, **given: net(words, decoder_input_ids=answer, **given).logits


def resnet() -> Network:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=5, hidden_sizes=[5, 7], depths=[1, 1], layer_type="basic"
    )
    x = torch.randn(2, 3, 32, 32)
    return transformers.ResNetModel(config), lambda model, **given: model(x, **given).last_hidden_state


def unet() -> Network:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(6, 12),
        norm_num_groups=3,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    x = torch.randn(2, 3, 8, 8)
    return model, lambda network, **given: network(x, 3, **given).sample


CASES = [
    (vit, tf.preset("vit"), {}, "layernorm_after.weight"),
    (vit, r".*\.mlp", {"dim": -1, "features": 24}, "mlp.fc2.weight"),
    (bert, tf.preset("bert"), {}, "output.LayerNorm.weight"),
    (llama, r".*\.mlp", {"dim": -1, "features": 24}, "mlp.down_proj.weight"),
    (t5, r".*DenseReluDense\.wo", {}, "wo.weight"),
    (resnet, tf.preset("resnet"), {}, "convolution.weight"),
    (unet, tf.preset("unet"), {}, "norm2.weight"),
]


@pytest.mark.plain
@pytest.mark.parametrize(
    ("build", "sites", "options", "target"),
    CASES,
    ids=case_id,
)
@pytest.mark.filterwarnings("ignore")
def test_a_network_of_others_folds_into_itself(build, sites, options, target):
    model, call = build()
    tf.condition(model.eval(), sites, tf.Vector(7), **options)
    randomise(tf.conditioning(model))
    cond = torch.randn(1, 7)
    plain, report = tf.fold(model, cond=cond, fuse_norms=True)
    expected = call(model, cond=cond)
    torch.testing.assert_close(call(plain), expected, rtol=1e-4, atol=1e-4)
    assert all(target in entry.target and entry.error < 1e-5 for entry in report)
    assert not any(name.startswith("film.") for name in plain.state_dict())
    with tf.folded(model, cond=cond):
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore")
def test_a_norm_that_torch_does_not_know_keeps_its_constant():
    model, call = llama()
    tf.condition(model.eval(), tf.preset("llama"), tf.Vector(7))
    randomise(tf.conditioning(model))
    cond = torch.randn(1, 7)
    with pytest.raises(ValueError, match="LlamaRMSNorm does not end with a layer"):
        tf.fold(model, cond=cond)
    plain, _ = tf.fold(model, cond=cond, leftover="constant")
    assert torch.equal(call(plain), call(model, cond=cond))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_the_classes_own_forwards_put_back_on_the_instances_are_no_code_of_their_own():
    base = nn.Sequential(Outer(), nn.ReLU()).eval()
    for module in base.modules():  # what accelerate's remove_hook_from_module leaves
        module.forward = module.forward
    assert last_layer(base[0].inner) == "last"
    model = randomise(tf.condition(base, "0", tf.Vector(11), dim=-1, features=7))
    x, cond = torch.randn(2, 3), torch.randn(1, 11)
    expected = model(x, cond=cond)
    plain, report = tf.fold(model, cond=cond, inputs=(x,))
    assert report["0"].target == "0.inner.last.weight, 0.inner.last.bias"
    torch.testing.assert_close(plain(x), expected)
    assert plain[0].inner.forward.__self__ is plain[0].inner
    with tf.folded(model, cond=cond):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x, cond=cond), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_what_a_call_left_behind_that_cannot_be_copied_is_named_with_what_to_do():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.utils.weight_norm(nn.Conv1d(3, 3, 1)))
    model, x, z = tf.condition(net, "0", tf.Vector(5)).eval(), torch.randn(2, 2, 7), torch.randn(1, 5)
    randomise(model.film)
    expected = model(x, cond=z)
    with pytest.raises(ValueError, match=r"can be copied, got '1.weight'[\s\S]*remove_weight_norm first"):
        tf.fold(model, cond=z)
    with pytest.raises(ValueError, match="can be copied"), tf.folded(model, cond=z):
        pass
    nn.utils.remove_weight_norm(net[1])
    torch.testing.assert_close(tf.fold(model, cond=z)[0](x), expected)


class ActivatedNorm(nn.BatchNorm2d):
    """A norm with an activation in its own forward, as some families of networks have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Branching(nn.Sequential):
    """Code that cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 1e9 else super().forward(x)


@pytest.mark.parametrize("kind", [nn.Sequential, Branching])
def test_a_norm_that_computes_something_of_its_own_is_merged_into_nothing(kind):
    parts = [nn.Conv2d(3, 5, 1), ActivatedNorm(5), nn.Conv2d(5, 7, 1)]
    model = randomise(tf.condition(kind(*parts).eval(), "2", tf.Vector(11)))
    cond = torch.randn(1, 11)
    with pytest.raises(ValueError, match="ActivatedNorm computes something of its own on top of BatchNorm2d"):
        tf.fold(model, cond=cond, fuse_norms=[("0", "1")])
    plain, report = tf.fold(model, cond=cond, fuse_norms=True)
    assert report.fused == ()
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(plain(x), model(x, cond=cond))


def test_a_merge_beyond_the_precision_is_refused_where_no_site_is_too():
    parts = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Linear(7, 7)).half().eval()
    model = tf.condition(parts, "2", tf.Vector(11))
    nn.init.constant_(model[0].weight, 6e4)
    with pytest.raises(ValueError, match="fold, '0': expected folded weights that compute the same, got an"):
        tf.fold(model, cond=torch.randn(1, 11), fuse_norms=True)


class Graph(nn.Module):
    """A part that a copy leaves in training, as torchvision's feature extractors: `train` does more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.parts = (nn.functional.relu, nn.functional.relu6)
        self.part = self.parts[0]

    def train(self, mode: bool = True) -> "Graph":
        self.part = self.parts[not mode]
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(self.norm(x))

    def __deepcopy__(self, memo: dict) -> "Graph":
        copied = Graph()
        copied.load_state_dict(self.state_dict())
        return copied


def test_a_copy_that_is_left_in_training_is_put_back_into_its_mode():
    model = nn.Sequential(nn.Linear(3, 5), Graph(), nn.Dropout(0.5)).eval()
    model[2].train()
    tf.condition(model, "0", tf.Vector(11))
    randomise(model)
    x, cond = 9 * torch.randn(2, 3), torch.randn(1, 11)
    plain, _ = tf.fold(model, cond=cond)
    modes = {name: module.training for name, module in plain.named_modules()}
    assert modes == {"": False, "0": False, "1": False, "1.norm": False, "2": True}
    torch.testing.assert_close(plain.eval()(x), model.eval()(x, cond=cond))
    assert not torch.equal(plain(x), plain.train()(x))
    with tf.folded(model, cond=cond):
        assert not model[1].training


def test_a_site_that_copies_itself_is_folded_too():
    model = nn.Sequential(nn.Linear(3, 5), Graph()).eval()
    randomise(tf.condition(model, "1", tf.Vector(11), dim=-1, features=5))
    x, cond = torch.randn(2, 3), torch.randn(1, 11)
    plain, report = tf.fold(model, cond=cond, leftover="constant")
    assert report["1"].target == "constant"
    torch.testing.assert_close(plain(x), model(x, cond=cond))


LATER = [
    {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 3)},
    {"stride": (1, 1), "dilation": (2, 3), "padding": "same"},
    {"padding": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("later", LATER, ids=str)
def test_a_convolution_whose_options_were_changed_since_pads_as_they_say_now(later: dict):
    conv = nn.Conv2d(3, 5, (3, 4), stride=2, padding=1)
    vars(conv).update(later)  # as segmentation_models_pytorch makes strides dilations
    model = randomise(tf.condition(nn.Sequential(conv).eval(), "0", tf.Vector(11), where="input"))
    x, cond = torch.randn(2, 3, 9, 12), torch.randn(1, 11)
    plain, _ = tf.fold(model, cond=cond, leftover="constant")
    torch.testing.assert_close(plain(x), model(x, cond=cond))


@torch.no_grad()
def test_a_constant_inside_of_a_transformer_hears_no_packed_sequences():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True), 2).eval()
    model = tf.condition(encoder, r"layers\.1\.dropout", tf.Vector(3), dim=-1, features=10)
    randomise(model.film.generator)
    x, z, padded = torch.randn(2, 5, 6), torch.randn(1, 3), torch.arange(5) > torch.tensor([[2], [3]])
    plain, report = tf.fold(model, cond=z, leftover="constant")
    assert report["layers.1.dropout"].target == "constant"
    expected = model(x, src_key_padding_mask=padded, cond=z)
    torch.testing.assert_close(plain(x, src_key_padding_mask=padded), expected)


class Looks(nn.Module):
    """Code that fails as a table does which lacks something, by an error that tracing never causes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 5)

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise LookupError("no table for these")
        return self.a(x)


def test_an_error_that_is_the_models_own_is_told_as_it_is():
    model = tf.condition(nn.Sequential(Looks()).eval(), "0", tf.Vector(7), dim=-1, features=5)
    with pytest.raises(LookupError, match="no table for these"):
        tf.fold(model, cond=torch.rand(1, 7))
