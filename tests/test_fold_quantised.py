"""Modulations go into the scales of int8 weights, and nothing is quantised again."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.fold_draft import Affine, Draft, NotExactError
from torchfilm.fold_quantised import rescaled
from torchfilm.fold_rules import fold_output


def conditioned(quantised: nn.Module) -> nn.Module:
    """A network that listens at its quantised layer, whose channels nothing but the caller knows."""
    model = tf.condition(quantised, tf.find(quantised, "0", dim=-1, features=5), tf.Vector(7))
    randomise(tf.conditioning(model).generator)
    return model


def by_torchao(name: str, dtype: torch.dtype = torch.float32, size: float = 1) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.Linear(64, 5), nn.ReLU()).to(dtype)
        nn.init.normal_(model[0].weight, std=size)
        quantization.quantize_(model, getattr(quantization, name)())
    return model


def by_torch(*, per_channel: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        per_channel_config = {"": torch.ao.quantization.per_channel_dynamic_qconfig}
        return torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(64, 5), nn.ReLU()), per_channel_config if per_channel else {nn.Linear}
        )


def check(model: nn.Module, integers: Tensor) -> nn.Module:
    x, cond = torch.randn(3, 64), torch.randn(1, 7)
    with torch.device("meta"):  # another default device than the network's
        plain, report = tf.fold(model, cond=cond)
    assert (tf.conditioning(model).modulations(cond)["0"].gamma < 0).any()
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert report["0"].error < 1e-6
    before = model(x, cond=cond)
    with tf.folded(model, cond=cond):
        torch.testing.assert_close(model(x), plain(x))
    assert torch.equal(model(x, cond=cond), before)
    assert integers.dtype == torch.int8
    return plain


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.filterwarnings("ignore")
def test_a_torchao_weight_keeps_its_integers(name: str):
    model = conditioned(by_torchao(name))
    integers = model[0].weight.qdata
    plain = check(model, integers)
    assert type(plain[0].weight) is type(model[0].weight)
    assert torch.equal(plain[0].weight.qdata, integers)


@pytest.mark.parametrize("size", [1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.filterwarnings("ignore")
def test_a_torchao_weight_keeps_its_integers_in_half_precision(name: str, dtype: torch.dtype, size: float):
    model = conditioned(by_torchao(name, dtype, size)).eval()
    x, cond = torch.randn(3, 64, dtype=dtype), torch.randn(1, 7)
    plain, report = tf.fold(model, cond=cond, inputs=x)
    assert torch.equal(plain[0].weight.qdata, model[0].weight.qdata)
    assert max(report.error, report["0"].error) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("per_channel", [False, True], ids=["one scale", "a scale per channel"])
@pytest.mark.filterwarnings("ignore")
def test_a_dynamically_quantised_layer_keeps_its_integers(per_channel: bool):
    model = conditioned(by_torch(per_channel=per_channel))
    integers = model[0].weight().int_repr()
    plain = check(model, integers)
    assert type(plain[0]).__name__ == "Linear"
    assert torch.equal(plain[0].weight().int_repr(), integers)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_gets_the_bias_it_lacks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = nn.Sequential(nn.Linear(64, 5, bias=False))
        model = conditioned(torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}))
    check(model, model[0].weight().int_repr())


class Last(nn.Module):
    """The states of a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_recurrence_is_refused_with_its_reason():
    model = torch.ao.quantization.quantize_dynamic(Last(), {nn.LSTM})
    with pytest.raises(NotExactError, match="LSTM"):
        fold_output(Draft(model), model.rnn, Affine(torch.ones(5).double(), torch.zeros(5).double()), -1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("qnnpack" not in torch.backends.quantized.supported_engines, reason="needs qnnpack")
def test_an_engine_without_negative_scales_takes_positive_factors_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    packed = by_torch(per_channel=False)
    factor, shift, x = torch.rand(5).double() + 0.5, torch.randn(5).double(), torch.randn(3, 64)
    draft, y = Draft(packed), packed[0](x)
    fold_output(draft, packed[0], Affine(factor, shift), -1)
    draft.apply()
    torch.testing.assert_close(packed[0](x), (y * factor + shift).float())
    for gamma in (0, -1):
        with pytest.raises(NotExactError, match="qnnpack takes no scale that is not positive"):
            fold_output(Draft(packed), packed[0], Affine(gamma * factor, shift), -1)


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_scale_per_channel_is_refused():
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor())
    model = nn.Sequential(nn.Linear(64, 5))
    quantization.quantize_(model, config)
    map_of_channels = Affine(torch.randn(5).double(), torch.zeros(5).double())
    with pytest.raises(
        NotExactError, match=r"its weight is a Int8Tensor of torch.float32, not plain numbers"
    ):
        fold_output(Draft(model), model[0], map_of_channels, -1)
    mixing = Affine(torch.randn(5, 5).double(), torch.zeros(5).double())
    packed = by_torch(per_channel=True)
    with pytest.raises(NotExactError, match="mixes channels"):
        fold_output(Draft(packed), packed[0], mixing, -1)


class ByColumn(Tensor):
    """A quantised weight with a scale for each input channel."""

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> "ByColumn":
        made = Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)
        made.integers, made.scale = integers, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: object) -> "ByColumn":
        return ByColumn(**tensors)

    def dequantize(self) -> Tensor:
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, *_: object) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("size", [1, 1e-9])
def test_a_scale_along_another_axis_takes_no_factor_however_small_it_is(size: float):
    weight = ByColumn(torch.arange(25.0).view(5, 5), size * (1 + torch.rand(5)))
    assert rescaled(weight, torch.rand(5).double()) is None
