"""Each rule of folding against the layer itself, modulated by loops over single numbers."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import oracles
from catalogue import case_id, randomise
from torchfilm.fold_draft import Affine, Draft, NotExactError, restore
from torchfilm.fold_rules import fold_input, fold_output

Build = Callable[[], nn.Module]


def affine(channels: int, *, mixes: bool = False) -> Affine:
    factor = torch.randn(channels, channels) if mixes else torch.randn(channels)
    return Affine(factor.double(), torch.randn(channels).double())


def modulated(x: Tensor, value: Affine, dim: int) -> Tensor:
    """factor * x + shift by the loops, or factor @ x + shift for each position."""
    factor, shift = value.factor.numpy(), value.shift.numpy()
    if not value.mixes:
        return torch.from_numpy(oracles.film(x.numpy(), factor, shift, dim))
    rows = x.movedim(dim, -1)
    mixed = oracles.linear(rows.reshape(-1, rows.shape[-1]).numpy(), factor, shift)
    return torch.from_numpy(mixed).reshape(rows.shape).movedim(-1, dim)


def trained(build: Build) -> nn.Module:
    """The layer in float64 and evaluation, with random numbers everywhere, statistics included."""
    module = randomise(build().double()).eval()
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module


def draft_of(module: nn.Module) -> Draft:
    """A draft in a model of float64, for norms without numbers of their own."""
    return Draft(nn.ModuleList([module, nn.Linear(1, 1).double()]))


def run(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output = module(*inputs)
    return output[0] if isinstance(output, tuple) else output


IMAGE, SEQUENCE, TOKENS = (2, 6, 5, 7), (2, 6, 7), (2, 5, 6)
OUTPUTS: list[tuple[str, Build, tuple[int, ...], int, int]] = [
    ("conv1d", lambda: nn.Conv1d(6, 11, 3, padding=1), SEQUENCE, -2, 11),
    ("conv2d", lambda: nn.Conv2d(6, 11, 3, padding=1, stride=2), IMAGE, 1, 11),
    ("conv2d grouped", lambda: nn.Conv2d(6, 9, 3, groups=3), IMAGE, -3, 9),
    ("conv2d without bias", lambda: nn.Conv2d(6, 11, (1, 3), bias=False), IMAGE, 1, 11),
    ("conv3d", lambda: nn.Conv3d(6, 11, 2, dilation=2), (2, 6, 5, 3, 4), 1, 11),
    ("transposed1d", lambda: nn.ConvTranspose1d(6, 11, 3, stride=2), SEQUENCE, 1, 11),
    ("transposed2d grouped", lambda: nn.ConvTranspose2d(6, 9, 3, groups=3, bias=False), IMAGE, 1, 9),
    ("transposed3d", lambda: nn.ConvTranspose3d(6, 11, 2, padding=1), (2, 6, 5, 3, 4), -4, 11),
    ("linear", lambda: nn.Linear(6, 11), TOKENS, -1, 11),
    ("linear without bias", lambda: nn.Linear(6, 11, bias=False), TOKENS, -1, 11),
    ("batch norm 1d", lambda: nn.BatchNorm1d(6), SEQUENCE, 1, 6),
    ("batch norm 2d plain", lambda: nn.BatchNorm2d(6, affine=False), IMAGE, 1, 6),
    ("batch norm training", lambda: nn.BatchNorm2d(6).train(), IMAGE, 1, 6),
    ("instance norm", lambda: nn.InstanceNorm2d(6, affine=True), IMAGE, -3, 6),
    ("instance norm plain", lambda: nn.InstanceNorm2d(6), IMAGE, 1, 6),
    ("group norm", lambda: nn.GroupNorm(3, 6), IMAGE, 1, 6),
    ("group norm plain", lambda: nn.GroupNorm(3, 6, affine=False), IMAGE, 1, 6),
    ("layer norm", lambda: nn.LayerNorm(6), TOKENS, -1, 6),
    ("layer norm plain", lambda: nn.LayerNorm(6, elementwise_affine=False), TOKENS, -1, 6),
    ("layer norm without bias", lambda: nn.LayerNorm(6, bias=False), TOKENS, -1, 6),
    ("layer norm over an image", lambda: nn.LayerNorm((6, 5, 7)), IMAGE, -3, 6),
    ("sequential", lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 11), nn.Dropout(0.5)), TOKENS, -1, 11),
]
MIXING: list[tuple[str, Build, tuple[int, ...], int, int]] = [
    ("conv2d", lambda: nn.Conv2d(6, 11, 3), IMAGE, -3, 11),
    ("transposed2d", lambda: nn.ConvTranspose2d(6, 11, 3), IMAGE, -3, 11),
    ("linear", lambda: nn.Linear(6, 11, bias=False), TOKENS, -1, 11),
]


@pytest.mark.parametrize(("name", "build", "shape", "dim", "channels"), OUTPUTS, ids=case_id)
def test_a_modulated_output_is_the_output_of_folded_weights(name, build, shape, dim, channels):
    module, value, x = trained(build), affine(channels), torch.randn(shape).double()
    expected = modulated(run(copy.deepcopy(module), x), value, dim)
    draft = draft_of(module)
    fold_output(draft, module, value, dim)
    draft.apply()
    torch.testing.assert_close(run(module, x), expected)


@pytest.mark.parametrize(("name", "build", "shape", "dim", "channels"), MIXING, ids=case_id)
def test_mixed_output_channels_are_the_output_of_folded_weights(name, build, shape, dim, channels):
    module, value, x = trained(build), affine(channels, mixes=True), torch.randn(shape).double()
    expected = modulated(run(module, x), value, dim)
    draft = Draft(module)
    fold_output(draft, module, value, dim)
    draft.apply()
    torch.testing.assert_close(run(module, x), expected)


NO_SHIFT = [
    ("conv2d with zeros around", lambda: nn.Conv2d(6, 11, 3, padding=1), IMAGE, 1),
    ("transposed2d", lambda: nn.ConvTranspose2d(6, 11, 3, stride=2), IMAGE, 1),
    ("transposed2d grouped", lambda: nn.ConvTranspose2d(6, 9, 3, groups=3), IMAGE, 1),
]
INPUTS: list[tuple[str, Build, tuple[int, ...], int]] = [
    ("conv2d", lambda: nn.Conv2d(6, 11, 3), IMAGE, 1),
    ("conv1d grouped", lambda: nn.Conv1d(6, 9, 3, groups=3, bias=False), SEQUENCE, -2),
    ("conv2d grouped by two", lambda: nn.Conv2d(6, 8, 3, groups=2), IMAGE, 1),
    ("conv2d valid", lambda: nn.Conv2d(6, 11, 3, padding="valid"), IMAGE, 1),
    ("conv2d of size one", lambda: nn.Conv2d(6, 11, 1, padding="same"), IMAGE, 1),
    ("conv2d reflecting", lambda: nn.Conv2d(6, 11, 3, padding=1, padding_mode="reflect"), IMAGE, 1),
    ("conv2d circular", lambda: nn.Conv2d(6, 11, 3, padding="same", padding_mode="circular"), IMAGE, 1),
    ("conv3d", lambda: nn.Conv3d(6, 11, 2, dilation=2, stride=2), (2, 6, 5, 3, 4), 1),
    ("linear", lambda: nn.Linear(6, 11), TOKENS, -1),
    ("linear without bias", lambda: nn.Linear(6, 11, bias=False), TOKENS, -1),
    ("batch norm", lambda: nn.BatchNorm2d(6), IMAGE, 1),
    ("batch norm plain", lambda: nn.BatchNorm1d(6, affine=False), SEQUENCE, 1),
    ("sequential", lambda: nn.Sequential(nn.Identity(), nn.Linear(6, 11), nn.ReLU()), TOKENS, -1),
]


@pytest.mark.parametrize(("name", "build", "shape", "dim"), [*INPUTS, *NO_SHIFT], ids=case_id)
@pytest.mark.parametrize("mixes", [False, True], ids=["film", "mixing"])
def test_a_modulated_input_is_the_input_of_folded_weights(name, build, shape, dim, mixes):
    if mixes and ("grouped" in name or "norm" in name):
        pytest.skip("channels stay apart there")
    module, value, x = trained(build), affine(6, mixes=mixes), torch.randn(shape).double()
    if any(name == other[0] for other in NO_SHIFT):
        value = Affine(value.factor, torch.zeros_like(value.shift))
    expected = run(module, modulated(x, value, dim))
    draft = Draft(module)
    fold_input(draft, module, value, dim)
    draft.apply()
    torch.testing.assert_close(run(module, x), expected)


def test_rows_of_an_embedding_are_modulated():
    module, value, k = trained(lambda: nn.Embedding(7, 3, padding_idx=0)), affine(3), torch.arange(7)
    expected = modulated(run(module, k), value, -1)
    draft = Draft(module)
    fold_output(draft, module, value, -1)
    draft.apply()
    torch.testing.assert_close(run(module, k), expected)


def test_rms_norm_takes_a_factor_and_refuses_a_shift():
    module, value, x = trained(lambda: nn.RMSNorm(6)), affine(6), torch.randn(TOKENS).double()
    with pytest.raises(NotExactError, match="no bias for beta"):
        fold_output(Draft(module), module, value, -1)
    value = Affine(value.factor, torch.zeros(6).double())
    expected = modulated(run(module, x), value, -1)
    draft = Draft(module)
    fold_output(draft, module, value, -1)
    draft.apply()
    torch.testing.assert_close(run(module, x), expected)


class Branch(nn.Module):
    """A branch whose code ends with its own linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(6, 5), nn.Linear(5, 11), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.last(torch.relu(self.first(x))))


ENDS = [
    ("attention", lambda: nn.MultiheadAttention(6, 2, batch_first=True), 3, "out_proj", 6),
    ("encoder layer", lambda: nn.TransformerEncoderLayer(6, 2, 11, batch_first=True), 1, "norm2", 6),
    ("decoder layer", lambda: nn.TransformerDecoderLayer(6, 2, 11, batch_first=True), 2, "norm3", 6),
    ("a branch of others", Branch, 1, "last", 11),
]


@pytest.mark.parametrize(("name", "build", "count", "end", "channels"), ENDS, ids=case_id)
def test_what_ends_with_a_layer_folds_into_that_layer(name, build, count, end, channels):
    module, value, x = trained(build), affine(channels), torch.randn(TOKENS).double()
    expected = modulated(run(module, *[x] * count), value, -1)
    draft = Draft(module)
    assert fold_output(draft, module, value, -1) is module.get_submodule(end)
    draft.apply()
    torch.testing.assert_close(run(module, *[x] * count), expected)


def test_two_maps_of_one_layer_are_rounded_once():
    module, x = nn.Linear(3, 5).bfloat16(), torch.randn(2, 3).double()
    one, two = affine(5), affine(5)
    wide = copy.deepcopy(module).double()
    expected = modulated(modulated(run(wide, x), one, -1), two, -1)
    draft = Draft(module)
    fold_output(draft, module, one, -1)
    fold_output(draft, module, two, -1)
    draft.apply()
    both = copy.deepcopy(module).double()
    assert module.weight.dtype == torch.bfloat16
    weight = two.rows(one.rows(wide.weight.detach()))
    torch.testing.assert_close(both.weight.detach(), weight.bfloat16().double(), rtol=0, atol=0)
    torch.testing.assert_close(run(both, x), expected, rtol=2e-2, atol=2e-2)


def test_undo_puts_the_very_tensors_back():
    module = nn.Sequential(nn.Conv2d(6, 3, 1, bias=False), nn.GroupNorm(3, 3, affine=False))
    before = {name: value for name, value in module.named_parameters()}
    flags = module[1].affine
    draft = Draft(module)
    fold_output(draft, module[0], affine(3), 1)
    fold_output(draft, module[1], affine(3), 1)
    undo = []
    draft.apply(undo=undo)
    assert set(dict(module.named_parameters())) > set(before)
    restore(undo)
    after = dict(module.named_parameters())
    assert set(after) == set(before)
    assert all(after[name] is before[name] for name in before)
    assert module[1].affine is flags
    assert module[0].bias is None


def test_nothing_changes_before_a_draft_is_applied():
    module = nn.Linear(3, 5)
    before = module.weight.clone()
    fold_output(Draft(module), module, affine(5), -1)
    assert torch.equal(module.weight, before)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.ModuleList([nn.Sequential(layer), nn.Sequential(nn.ReLU(), layer)])


def hooked() -> nn.Module:
    layer = nn.Sequential(nn.Linear(6, 6))
    layer[0].register_forward_hook(lambda *_: None)
    return layer


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))


def patched() -> nn.Module:
    module = nn.Linear(6, 6)
    module.forward = lambda x: nn.Linear.forward(module, x).relu()
    return module


def encoder_without_norm() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7), 1)


REFUSED_OUTPUTS = [
    ("a nonlinearity", nn.ReLU, "ReLU does not end with a layer"),
    ("another forward", lambda: Doubled(6, 6), "computes something of its own on top of Linear"),
    ("another forward of its own", patched, "computes something of its own on top of Linear"),
    ("a parametrized weight", parametrized, "weight is parametrized"),
    ("a layer with hooks", hooked, "Linear has hooks"),
    ("a residual sum", lambda: nn.TransformerEncoderLayer(6, 2, 7, norm_first=True), "residual sum"),
    ("no norm at the end", encoder_without_norm, "residual sum"),
    ("max_norm", lambda: nn.Embedding(7, 6, max_norm=1.0), "max_norm rescales"),
    ("a meta tensor", lambda: nn.Linear(6, 6, device="meta"), "meta device"),
    ("an empty sequence", lambda: nn.Sequential(nn.Identity()), "no layer with weights"),
]


@pytest.mark.parametrize(("name", "build", "reason"), REFUSED_OUTPUTS, ids=case_id)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_what_cannot_be_folded_is_refused_with_the_reason(name, build, reason):
    module = build()
    with pytest.raises(NotExactError, match=reason):
        fold_output(Draft(module), module, affine(6), -1)


def test_a_layer_used_in_two_places_is_refused():
    module = tied()
    with pytest.raises(NotExactError, match="used in another place too"):
        fold_output(Draft(module), module[0], affine(6), -1)


OTHER_AXES = [
    (nn.Linear(6, 6), 1, -1),
    (nn.Embedding(7, 6), 1, -1),
    (nn.LayerNorm(6), 1, -1),
    (nn.RMSNorm(6), 1, -1),
    (nn.MultiheadAttention(6, 2), 1, -1),
    (nn.Conv2d(6, 6, 3), -1, -3),
    (nn.ConvTranspose2d(6, 6, 3), -1, -3),
    (nn.GroupNorm(2, 6), -1, 1),
    (nn.InstanceNorm2d(6), -1, -3),
]


@pytest.mark.parametrize(("module", "dim", "own"), OTHER_AXES, ids=str)
def test_another_axis_is_refused(module, dim, own):
    message = f"dim={dim} is modulated, but {type(module).__name__} has its channels on dim={own}"
    with pytest.raises(NotExactError, match=message):
        fold_output(Draft(module), module, affine(6), dim)
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        with pytest.raises(NotExactError, match=message):
            fold_input(Draft(module), module, affine(6), dim)


def test_mixed_channels_do_not_go_into_what_keeps_them_apart():
    for module in (nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=2)):
        with pytest.raises(NotExactError, match="mixes channels"):
            fold_output(Draft(module), module, affine(6, mixes=True), 1)


REFUSED_INPUTS = [
    ("zeros around", lambda: nn.Conv2d(6, 3, 3, padding=1), "missing from the zeros of the padding"),
    ("same", lambda: nn.Conv2d(6, 3, 3, padding="same"), "missing from the zeros of the padding"),
    ("zeros around size one", lambda: nn.Conv2d(6, 3, 1, padding=1), "missing from the zeros"),
    ("transposed", lambda: nn.ConvTranspose2d(6, 3, 3), "border of a transposed convolution"),
    ("batch norm in training", lambda: nn.BatchNorm2d(6), "normalises by the batch"),
    ("group norm", lambda: nn.GroupNorm(2, 6), "GroupNorm does not start with a layer"),
]


@pytest.mark.parametrize(("name", "build", "reason"), REFUSED_INPUTS, ids=case_id)
def test_inputs_that_cannot_be_folded_are_refused_with_the_reason(name, build, reason):
    module = build()
    with pytest.raises(NotExactError, match=reason):
        fold_input(Draft(module), module, affine(6), 1)
