"""Packed convolutions: the same numbers, keys and gradients as the plain ones."""

import copy
import pickle

import pytest
import torch
from torch import nn

from torchfilm.blocks.packing import PackedConv1d, pack_convolutions

CONVS = {
    "same": dict(in_channels=6, out_channels=10, kernel_size=5, padding=2),
    "one": dict(in_channels=6, out_channels=3, kernel_size=1),
    "strided": dict(in_channels=6, out_channels=6, kernel_size=3, stride=2, padding=1),
    "dilated": dict(in_channels=6, out_channels=6, kernel_size=3, dilation=2),
    "groups without bias": dict(in_channels=6, out_channels=9, kernel_size=3, groups=3, bias=False),
    "padded by words": dict(in_channels=6, out_channels=6, kernel_size=3, padding="same"),
    "reflected": dict(in_channels=6, out_channels=6, kernel_size=3, padding=1, padding_mode="reflect"),
}


def packings(monkeypatch) -> list[torch.Tensor]:
    """What is packed from now on."""
    seen, pack = [], torch.ops.mkldnn._reorder_convolution_weight

    class Spy:
        _convolution_pointwise = torch.ops.mkldnn._convolution_pointwise

        @staticmethod
        def _reorder_convolution_weight(weight, *rest):
            seen.append(weight)
            return pack(weight, *rest)

    monkeypatch.setattr("torchfilm.blocks.packing._OPS", Spy)
    return seen


@pytest.mark.parametrize("kind", CONVS)
def test_the_output_and_the_keys_are_those_of_the_plain_one(kind: str):
    torch.manual_seed(0)
    conv = nn.Conv1d(**CONVS[kind])
    packed = PackedConv1d(conv)
    assert packed.state_dict().keys() == conv.state_dict().keys()
    with torch.no_grad():
        for batch, time in ((1, 16), (3, 9), (1, 16)):
            x = torch.randn(batch, 6, time)
            torch.testing.assert_close(packed(x), conv(x))


def test_it_packs_once_and_again_when_the_weight_has_changed(monkeypatch):
    seen, packed, x = packings(monkeypatch), PackedConv1d(nn.Conv1d(4, 4, 3)), torch.randn(1, 4, 8)
    with torch.no_grad():
        before = packed(x)
        packed(x)
        assert len(seen) == 1
        packed.weight.mul_(2)
        torch.testing.assert_close(packed(x) - packed.bias[:, None], 2 * (before - packed.bias[:, None]))
        assert len(seen) == 2


@pytest.mark.parametrize("way", ["gradient", "float64", "autocast", "compiled", "switched off"])
def test_what_cannot_be_packed_takes_the_plain_way(way: str, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", way != "switched off")
    seen, conv = packings(monkeypatch), nn.Conv1d(4, 4, 3)
    packed, x = PackedConv1d(conv), torch.randn(1, 4, 8)
    if way == "gradient":
        packed(x).sum().backward()
        assert conv.weight.grad is not None
    elif way == "float64":
        packed.double()
        assert packed(x.double()).dtype == torch.float64
    else:
        with torch.no_grad(), torch.autocast("cpu", enabled=way == "autocast"):
            call = torch.compile(packed, backend="eager", fullgraph=True) if way == "compiled" else packed
            torch.testing.assert_close(call(x), conv(x))
    assert seen == []


def test_weights_made_in_inference_mode_take_the_plain_way(monkeypatch):
    seen = packings(monkeypatch)
    with torch.inference_mode():
        conv = nn.Conv1d(4, 4, 3)
        x = torch.randn(1, 4, 8)
        torch.testing.assert_close(PackedConv1d(conv)(x), conv(x))
    assert seen == []


def normed(conv: nn.Conv1d) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(conv)


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.register_forward_hook(lambda module, args, output: 0 * output),
        lambda conv: conv.register_forward_pre_hook(lambda module, args: (0 * args[0],)),
        lambda conv: conv.register_full_backward_hook(lambda *_: None),
        lambda conv: setattr(conv, "forward", lambda x: 0 * x),
        normed,
    ],
    ids=["hook", "hook in front", "backward hook", "patched", "weight norm"],
)
def test_a_convolution_that_does_more_than_its_own_is_left_alone(change):
    net = nn.Sequential(nn.Conv1d(4, 6, 3))
    change(net[0])
    assert type(pack_convolutions(net, least=1)[0]) is nn.Conv1d


def test_every_plain_convolution_inside_is_packed_and_can_be_copied_and_pickled():
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Sequential(nn.ReLU(), nn.Conv1d(6, 2, 1)), nn.Conv2d(1, 1, 1))
    keys = list(net.state_dict())
    assert pack_convolutions(net, least=12) is net
    assert [type(m) for m in net.modules() if isinstance(m, nn.Conv1d)] == [PackedConv1d, PackedConv1d]
    assert type(net[2]) is nn.Conv2d
    narrow = pack_convolutions(nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(256, 256, 2)))
    assert [type(conv) for conv in narrow] == [nn.Conv1d, PackedConv1d]
    assert list(net.state_dict()) == keys
    x = torch.randn(1, 4, 7)
    with torch.no_grad():
        y = net[:2](x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(other[:2](x), y)
