"""Presets: which modules of a family they pick, and what they say of them."""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.presets import PRESETS

PRESET_NAMES = {
    "resnet": (["layer1.0.bn1", "layer1.0.bn2", "layer1.0.bn3"], ["layer1.0.bn3"]),
    "vit": (["blocks.0.norm1", "blocks.0.norm2"], ["blocks.0.norm2"]),
    "bert": (["encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.output.LayerNorm"], [1]),
    "llama": (["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"], [1]),
    "unet": (["down_blocks.0.resnets.0.norm1", "down_blocks.0.resnets.0.norm2"], [1]),
    "dit": (["transformer_blocks.0.norm1.norm", "transformer_blocks.0.norm3"], [1]),
    "efficientnet": (["blocks.0.0.conv_pw", "blocks.0.0.bn1", "bn1"], ["blocks.0.0"]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pick_the_usual_sites_of_a_family(name: str):
    names, wanted = PRESET_NAMES[name]
    root = nn.Sequential()
    for path in names:
        above = root
        for part in path.split(".")[:-1]:
            if part not in above._modules:
                above.add_module(part, nn.Sequential())
            above = above.get_submodule(part)
        above.add_module(path.split(".")[-1], nn.LayerNorm(3))
    assert [s.name for s in tf.find(root, tf.preset(name))] == [names[w] if w == 1 else w for w in wanted]


class Residual(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return x + y if x.shape == y.shape else y


def parts(**named: nn.Module) -> OrderedDict[str, nn.Module]:
    return OrderedDict(named)


def conv(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width), nn.SiLU())


def squeeze(width: int, first: str, second: str) -> nn.Module:
    return nn.Sequential(parts(**{first: nn.Conv2d(width, 2, 1), second: nn.Conv2d(2, width, 1)}))


def as_in_torchvision() -> tuple[nn.Module, dict[str, int]]:
    """Names and order of parts as in its EfficientNets: MBConv, FusedMBConv with and without expansion."""

    def block(*layers: nn.Module) -> nn.Module:
        return Residual(parts(block=nn.Sequential(*layers), stochastic_depth=nn.Identity()))

    stages = [block(conv(5, 5))], [block(conv(5, 20), conv(20, 7))]
    last = [block(conv(i, 9), squeeze(9, "fc1", "fc2"), conv(9, 11)) for i in (7, 11)]
    features = conv(3, 5), *(nn.Sequential(*stage) for stage in (*stages, last)), conv(11, 13)
    widths = {"features.1.0": 5, "features.2.0": 7, "features.3.0": 11, "features.3.1": 11}
    return nn.Sequential(parts(features=nn.Sequential(*features))), widths


def as_in_timm() -> tuple[nn.Module, dict[str, int]]:
    """Names and order of parts as in its EfficientNets: ConvBnAct, EdgeResidual, two more kinds of blocks."""
    plain, norm = partial(nn.Conv2d, kernel_size=1), nn.BatchNorm2d
    se = squeeze(9, "conv_reduce", "conv_expand")
    only = parts(conv=plain(5, 5), bn1=norm(5), aa=nn.Identity(), drop_path=nn.Identity())
    edge = parts(conv_exp=plain(5, 9), bn1=norm(9), se=nn.Identity(), conv_pwl=plain(9, 7), bn2=norm(7))
    depth = parts(conv_dw=plain(7, 9), bn1=norm(9), se=se, conv_pw=plain(9, 7), bn2=norm(7))
    first = parts(conv_pw=plain(7, 9), bn1=norm(9), conv_dw=plain(9, 9), bn2=norm(9))
    inverted = first | parts(se=copy.deepcopy(se), conv_pwl=plain(9, 11), bn3=norm(11))
    stages = nn.Sequential(*(nn.Sequential(Residual(one)) for one in (only, edge, depth, inverted)))
    model = parts(conv_stem=plain(3, 5), bn1=norm(5), blocks=stages, conv_head=plain(11, 13), bn2=norm(13))
    return nn.Sequential(model), {"blocks.0.0": 5, "blocks.1.0": 7, "blocks.2.0": 7, "blocks.3.0": 11}


@pytest.mark.parametrize("build", [as_in_torchvision, as_in_timm])
def test_the_blocks_of_an_efficientnet_listen_behind_their_addition(build):
    model, widths = build()
    model = nn.Sequential(parts(trunk=randomise(model).eval(), proj=nn.Conv2d(13, 17, 1)))
    found = tf.find(model, tf.preset("efficientnet")) + tf.find(model, "proj", dim=1)  # all sites of RT-1
    widths = {f"trunk.{name}": width for name, width in widths.items()} | {"proj": 17}
    assert {site.name: site.features for site in found} == widths
    assert {site.dim for site in found} == {1}
    some = tf.find(
        model, tf.preset("efficientnet"), features=lambda name, _: 3 if name.endswith("0.0") else None
    )
    assert {site.features for site in some if widths[site.name] == 11} == {11}  # where the function says None
    with pytest.raises(ValueError, match=r"\(its input\)"):  # where blocks have other widths
        tf.find(model, tf.preset("efficientnet"), where="input")
    by_hand, x, z = copy.deepcopy(model), torch.randn(2, 3, 4, 4), torch.randn(2, 6)
    tf.condition(model, found, tf.Vector(6))
    assert torch.equal(model(x, cond=z), by_hand(x))
    randomise(model.film)
    for name, m in tf.modulations(model, z).items():
        factor, shift = m.gamma[:, :, None, None], m.beta[:, :, None, None]
        by_hand.get_submodule(name).register_forward_hook(lambda *call, f=factor, s=shift: f * call[-1] + s)
    torch.testing.assert_close(model(x, cond=z), by_hand(x))


class OwnLayerNorm(nn.LayerNorm):
    """As timm has one: the same in code of its own."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def blocks(norm: nn.Module, *above: str) -> nn.Module:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"norm2": norm})])})
    for name in above:
        model = nn.ModuleDict({name: nn.ModuleList([model])})
    return model


def test_a_preset_says_the_axis_where_the_type_does_not():
    vit = tf.preset("vit")
    found = [tf.find(blocks(norm), vit)[0] for norm in (OwnLayerNorm(3), nn.BatchNorm2d(5))]
    assert [(site.features, site.dim) for site in found] == [(3, -1), (5, 1)]
    assert tf.find(blocks(OwnLayerNorm(3)), vit, dim=1)[0].dim == 1
    with pytest.raises(ValueError, match="matches the whole name of none"):  # these may have channels first
        tf.find(blocks(OwnLayerNorm(3), "stages"), vit)


@pytest.mark.plain
def test_an_unknown_preset_is_refused():
    with pytest.raises(
        ValueError, match=r"preset: expected one of \['resnet', 'vit', .*, got 'vgg'.\nFor other"
    ):
        tf.preset("vgg")
