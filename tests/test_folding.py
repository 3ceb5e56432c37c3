"""A folded network computes what the conditioned one computes, with plain layers and without a generator."""

import copy
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.applying import Slot
from torchfilm.folding import fold, folded
from torchfilm.fusion import FUSIONS
from torchfilm.injection import condition, conditioning, remove
from torchfilm.sites import find


class Block(nn.Module):
    """A residual block as ResNets have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def network() -> nn.Module:
    """A small residual network in evaluation, with statistics as after training."""
    parts = [nn.Conv2d(3, 5, 3), Block(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)]
    model = randomise(nn.Sequential(*parts)).eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def conditioned(sites: str | list[str], model: nn.Module | None = None, **options) -> nn.Module:
    model = condition(network() if model is None else model, sites, tf.Vector(7), **options)
    randomise(conditioning(model))
    return model


def z() -> Tensor:
    return torch.randn(1, 7)


def plain_again(model: nn.Module, keys: Iterable[str]) -> bool:
    ours = [kind for kind in map(type, model.modules()) if hasattr(kind, "_film_base")]
    return not ours and set(model.state_dict()) == set(keys)


@pytest.mark.parametrize("sites", [r"1\.bn[12]", r"0|4", "1.conv2", r"0|1\.bn1|1\.conv2|4"])
def test_a_folded_network_computes_what_the_conditioned_one_does(sites):
    keys = set(network().state_dict())
    model, x, cond = conditioned(sites), torch.randn(2, 3, 7, 11), z()
    expected = model(x, cond=cond)
    plain, report = fold(model, cond=cond, inputs=(x,))
    assert plain_again(plain, keys | {"1.conv2.bias"} if "conv2" in sites else keys)
    torch.testing.assert_close(plain(x), expected)
    assert [entry.site for entry in report] == list(conditioning(model).sites)
    assert all(0 < entry.error < 1e-6 for entry in report)
    assert report.error < 1e-5
    assert torch.equal(model(x, cond=cond), expected)


def test_no_tensor_is_shared_with_the_conditioned_network():
    model = conditioned("4")
    plain, _ = fold(model, cond=z())
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize(
    "pairs", [True, [("1.conv1", "1.bn1"), ("1.conv2", "1.bn2")]], ids=["found", "given"]
)
def test_norms_go_into_the_convolutions_in_front_of_them(pairs):
    model, x, cond = conditioned(r"1\.bn[12]"), torch.randn(2, 3, 7, 11), z()
    plain, report = fold(model, cond=cond, fuse_norms=pairs)
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert not [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    assert report.fused == (("1.conv1", "1.bn1"), ("1.conv2", "1.bn2"))
    assert report["1.bn2"].target == "1.conv2.weight, 1.conv2.bias"
    assert report["1.bn2"].error < 1e-6


def test_a_pair_that_does_not_merge_is_refused():
    model = conditioned("4")
    with pytest.raises(ValueError, match=r"got \('1.conv1', '1.relu'\): 1.relu is no BatchNorm"):
        fold(model, cond=z(), fuse_norms=[("1.conv1", "1.relu")])
    with pytest.raises(
        ValueError, match=r"fold, fuse_norms: expected one of \d+ names, got '1.con1'.\n.*'1.conv1'"
    ):
        fold(model, cond=z(), fuse_norms=[("1.con1", "1.bn1")])
    for wrong in (["0", "1"], ["ab"], [("1.conv1", "1.bn1", "1.relu")]):
        with pytest.raises(
            ValueError, match=r"pairs of names \(convolution, BatchNorm\), got .*\nGive a list"
        ):
            fold(model, cond=z(), fuse_norms=wrong)


def test_in_the_block_the_network_is_folded_and_afterwards_it_is_what_it_was():
    model, x, cond = conditioned(r"1\.bn1|1\.conv2|4"), torch.randn(2, 3, 7, 11), z()
    expected, before = model(x, cond=cond), dict(model.named_parameters())
    with folded(model, cond=cond) as same:
        assert same is model
        torch.testing.assert_close(model(x), expected)
        assert not torch.equal(model[4].weight, before["4.weight"])
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert set(dict(model.named_parameters())) == set(before)
    assert torch.equal(model(x, cond=cond), expected)


def check_and_stop(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(model(x), expected)
    raise RuntimeError("stop")


@pytest.mark.parametrize("sites", [r"1\.bn1", r"1\.bn1|1\.relu"], ids=["all", "with a constant"])
def test_after_an_exception_in_the_block_everything_is_back(sites):
    model, x, cond = conditioned(sites, dim=1, features=5), torch.randn(2, 3, 7, 11), z()
    expected, before = model(x, cond=cond), dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), folded(model, cond=cond, leftover="constant"):
        check_and_stop(model, x, expected)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(x, cond=cond), expected)
    with pytest.raises(ValueError, match="expected an active condition"):
        model(x)


def test_what_cannot_be_folded_is_an_error_that_names_each_site_with_its_reason():
    model = conditioned(r"1|1\.relu", dim=1, features=5)
    before = copy.deepcopy(model.state_dict())
    reasons = r"2 of 2 that do not:\n  1  a module inside of it keeps.*\n  1.relu  ReLU does not end.*\n"
    pattern = reasons + "Use leftover='constant'"
    with pytest.raises(ValueError, match=pattern):
        fold(model, cond=z())
    with pytest.raises(ValueError, match=pattern), folded(model, cond=z()):
        pass
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_what_cannot_be_folded_is_kept_as_a_constant():
    model, x, cond = conditioned(r"1|1\.relu", dim=1, features=5), torch.randn(2, 3, 7, 11), z()
    keys = set(network().state_dict())
    plain, report = fold(model, cond=cond, leftover="constant")
    expected = model(x, cond=cond)
    assert torch.equal(plain(x), expected)
    assert report["1.relu"].target == "constant"
    assert "ReLU does not end with a layer" in report["1.relu"].note
    assert isinstance(plain[1].relu, nn.ReLU)
    assert set(plain.state_dict()) > keys
    assert not any(name.startswith("film.") for name in plain.state_dict())
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(other(x), expected)
    loaded, _ = fold(model, cond=cond + 1, leftover="constant")
    loaded.load_state_dict(plain.state_dict())
    assert torch.equal(loaded(x), expected)


@pytest.mark.plain
def test_a_network_with_a_constant_compiles_and_exports():
    model, x = conditioned(r"1\.relu", dim=1, features=5), torch.randn(2, 3, 7, 11)
    plain, _ = fold(model, cond=z(), leftover="constant")
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    torch.testing.assert_close(program.module()(x[:1]), plain(x[:1]))


PADDED = [{"padding": 1}, {"padding": (2, 1), "stride": 2}, {"padding": "same", "dilation": 2}]


@pytest.mark.parametrize("options", PADDED, ids=str)
def test_in_front_of_a_convolution_the_border_becomes_what_beta_needs(options):
    convs = nn.Sequential(nn.Conv2d(3, 5, 3, **options), nn.ReLU())
    model, x, cond = conditioned("0", convs, where="input"), torch.randn(2, 3, 7, 11), z()
    with pytest.raises(ValueError, match="beta is missing from the zeros of the padding"):
        fold(model, cond=cond)
    plain, report = fold(model, cond=cond, leftover="constant")
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert "border of -beta / gamma" in report["0"].note
    assert report["0"].error < 1e-6
    with folded(model, cond=cond, leftover="constant"):
        torch.testing.assert_close(model(x), plain(x))


def test_a_closed_channel_has_no_border_and_stays_a_constant():
    model = conditioned("0", nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)), where="input")
    m = conditioning(model).modulations(z())["0"]
    closed = {"0": m.replace(gamma=m.gamma * torch.tensor([1.0, 0.0, 1.0]))}
    plain, report = fold(model, modulation=closed, leftover="constant")
    x = torch.randn(2, 3, 7, 11)
    torch.testing.assert_close(plain(x), model(x, modulation=closed))
    assert report["0"].target == "constant"


@pytest.mark.parametrize(("dtype", "gamma"), [(torch.float16, 1e-5), (torch.float32, 1e-42)], ids=str)
def test_a_channel_whose_border_is_beyond_the_precision_stays_a_constant(dtype, gamma):
    model = conditioned("0", nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)), where="input").to(dtype)
    values = {"0": tf.Modulation(torch.tensor([[1, gamma, 1]]), torch.ones(1, 3))}
    plain, report = fold(model, modulation=values, leftover="constant")
    x = torch.randn(2, 3, 7, 11).to(dtype)
    assert torch.equal(plain(x), model(x, modulation=values))
    assert "border beyond the range" in report["0"].note


def test_weights_beyond_the_precision_are_refused():
    model = conditioned("0", nn.Sequential(nn.Linear(3, 5)).half())
    with pytest.raises(ValueError, match=r"0  its weight would be beyond the range of torch.float16"):
        fold(model, modulation={"0": tf.Modulation(torch.full((1, 5), 1e7), torch.zeros(1, 5))})
    nn.init.constant_(model[0].weight, 6e4)
    with pytest.raises(
        ValueError, match=r"site '0': expected folded weights.*got an error of inf(.|\n)*float32"
    ):
        fold(model, modulation={"0": tf.Modulation.identity(5)})
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(ValueError, match=r"0  its weight would be NaN\n"):
        fold(model, modulation={"0": tf.Modulation.identity(5)})


def test_a_module_and_its_last_layer_are_folded_in_the_order_they_run():
    parts = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(3, 5)), nn.ReLU())
    model, x, cond = condition(parts, find_both(parts), tf.Vector(7)), torch.randn(2, 3), z()
    randomise(conditioning(model))
    plain, report = fold(model, cond=cond)
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert report["0"].target == report["0.1"].target == "0.1.weight, 0.1.bias"


def find_both(parts: nn.Module):
    return find(parts, "0", dim=-1, features=5) + find(parts, r"0\.1")


def kept_and_folded(parts: nn.Module, sites: tf.Sites, x: torch.Tensor):
    """Fold what can be folded, see that the numbers stay, and return the report."""
    model, cond = condition(parts, sites, tf.Vector(7)), z()
    randomise(conditioning(model))
    plain, report = fold(model, cond=cond, leftover="constant")
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    return report


def test_a_module_inside_comes_first_whatever_it_is_called():
    shared = nn.Dropout(0.1)
    parts = nn.Sequential(shared, nn.Sequential(nn.Sequential(nn.Linear(5, 5), shared))).eval()
    sites = find(parts, r"1\.0", dim=-1, features=5) + find(parts, "0", dim=-1, features=5)
    assert "keeps a constant" in kept_and_folded(parts, sites, torch.randn(2, 5))["1.0"].note


def test_nothing_is_folded_across_a_border():
    parts = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()))
    sites = find(parts, "0", where="input", dim=1, features=3) + find(parts, r"0\.0", where="input")
    report = kept_and_folded(parts, sites, torch.randn(2, 3, 7, 11))
    assert report["0"].target == "constant"
    assert "border" in report["0.0"].note


def test_nothing_is_folded_across_a_constant_inside():
    parts = nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.Identity()), nn.ReLU())
    sites = find(parts, "0", dim=-1, features=5) + find(parts, r"0\.1", dim=-1, features=5)
    assert "keeps a constant" in kept_and_folded(parts, sites, torch.randn(2, 3))["0"].note


def test_a_module_used_twice_is_folded_for_both_uses():
    layer = nn.Linear(5, 5)
    model = conditioned("0", nn.Sequential(layer, nn.ReLU(), layer))
    x, cond = torch.randn(2, 5), z()
    plain, _ = fold(model, cond=cond)
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert plain[0] is plain[2]


class Tied(nn.Module):
    """Rows of a table go in, and score the output, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 3), nn.Linear(3, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, k: Tensor) -> Tensor:
        return self.head(self.table(k))


@pytest.mark.parametrize("sites", ["table", "head", "table|head"])
def test_tied_weights_are_untied_where_they_are_folded(sites):
    model, k, cond = conditioned(sites, Tied()), torch.tensor([3, 0]), z()
    plain, report = fold(model, cond=cond)
    torch.testing.assert_close(plain(k), model(k, cond=cond))
    assert all("was tied: table.weight = head.weight" in entry.note for entry in report)
    with folded(model, cond=cond):
        torch.testing.assert_close(model(k), plain(k))
    assert model.head.weight is model.table.weight


def test_layers_without_a_bias_are_not_tied_and_get_one_each():
    model = conditioned("0|1", nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)))
    assert [entry.note for entry in fold(model, cond=z())[1]] == ["new: bias", "new: bias"]


@pytest.mark.parametrize("name", ["film", "scale", "bias", "gate", "concat", "low_rank"])
def test_every_fusion_that_is_an_affine_map_of_the_channels_folds(name):
    model, x, cond = conditioned("0|4", fusion=name), torch.randn(2, 3, 7, 11), z()
    plain, report = fold(model, cond=cond)
    torch.testing.assert_close(plain(x), model(x, cond=cond), rtol=1e-4, atol=1e-4)
    assert all(entry.error < 1e-5 for entry in report)
    assert set(FUSIONS) == {"film", "scale", "bias", "gate", "concat", "low_rank", "cross_attention"}


def test_a_fusion_that_looks_at_the_features_is_refused():
    model = conditioned("0", fusion="cross_attention")
    with pytest.raises(ValueError, match="CrossAttention is no affine map"):
        fold(model, cond=z())


def test_a_gate_goes_into_the_last_layer_of_its_branch():
    model = conditioned(r"1\.bn2", emit=("gamma", "beta", "gate"))
    x, cond = torch.randn(2, 3, 7, 11), z()
    assert conditioning(model).modulations(cond)["1.bn2"].gate is not None
    plain, _ = fold(model, cond=cond, fuse_norms=True)
    torch.testing.assert_close(plain(x), model(x, cond=cond))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_folded_network_is_no_further_from_the_truth(dtype):
    model = conditioned("0", nn.Sequential(nn.Linear(64, 48)))
    x, cond = torch.randn(32, 64).to(dtype), z()
    model[0].to(dtype)
    truth = copy.deepcopy(model).double()(x.double(), cond=cond.double())
    plain, report = fold(model, cond=cond)
    live, now = model(x, cond=cond).double(), plain(x).double()
    assert plain[0].weight.dtype == dtype
    assert (now - truth).pow(2).mean() < 2 * (live - truth).pow(2).mean()
    assert 0 < report["0"].error < 0.05


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_parametrized_layer_becomes_a_plain_one(before):
    parts = nn.Sequential(nn.Linear(3, 5))
    if before:
        nn.utils.parametrizations.weight_norm(parts[0])
    model, x, cond = conditioned("0", parts), torch.randn(2, 3), z()
    if not before:
        nn.utils.parametrizations.weight_norm(model[0])
    plain, _ = fold(model, cond=cond)
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    remedy = r"weight is parametrized[\s\S]*\nfold\(model\) makes parametrized weights plain, in the copy"
    with pytest.raises(ValueError, match=remedy), folded(model, cond=cond):
        pass


def test_several_conditions_are_refused():
    model = conditioned("4")
    with pytest.raises(ValueError, match=r"site '4': expected one condition, got 2(.|\n)*tabulate"):
        fold(model, cond=torch.randn(2, 7))


def test_a_condition_per_position_stays_a_constant():
    model, x = conditioned("0", nn.Sequential(nn.Linear(3, 5))), torch.randn(2, 11, 3)
    cond = torch.randn(1, 11, 7)
    with pytest.raises(ValueError, match="each of 11 positions is modulated differently"):
        fold(model, cond=cond)
    plain, _ = fold(model, cond=cond, leftover="constant")
    assert torch.equal(plain(x), model(x, cond=cond))


def test_numbers_that_are_not_finite_are_refused():
    model = conditioned("4")
    with pytest.raises(ValueError, match=r"site '4': expected finite numbers, got \d+ that are not"):
        fold(model, cond=torch.full((1, 7), torch.inf))


@pytest.mark.plain
def test_arguments_that_do_not_fit_are_refused():
    model = conditioned("4")
    with pytest.raises(ValueError, match="expected a condition or a modulation, got neither"):
        fold(model)
    with pytest.raises(ValueError, match=r"leftover expected one of \['error', 'constant'\], got 'drop'"):
        fold(model, cond=z(), leftover="drop")
    with pytest.raises(ValueError, match="expected a conditioned network, got a plain one"):
        fold(network(), cond=z())
    with pytest.raises(ValueError, match="got it inside of AveragedModel"):
        fold(torch.optim.swa_utils.AveragedModel(model), cond=z())
    with pytest.raises(ValueError, match="expected a network in evaluation to compare outputs"):
        fold(model.train(), cond=z(), inputs=(torch.randn(2, 3, 7, 11),))


class Reads(nn.Module):
    """A network that uses the weight of a layer which it never calls."""

    def __init__(self, *, traceable: bool) -> None:
        super().__init__()
        self.a, self.b, self.traceable = nn.Linear(3, 5), nn.Linear(5, 2), traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.b(nn.functional.linear(x, self.a.weight, self.a.bias).relu())


class ReadsPadded(nn.Module):
    """A network that reads the weight of its convolution also beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.weight.sum()


def test_a_convolution_that_takes_no_border_keeps_its_padding():
    model, x, cond = conditioned("conv", ReadsPadded(), where="input"), torch.randn(2, 3, 7, 11), z()
    plain, report = fold(model, cond=cond, leftover="constant")
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert "code of the network reads its weight" in report["conv"].note


def test_weights_that_code_reads_without_a_call_are_refused_or_left_alone():
    model, x, cond = conditioned("a|b", Reads(traceable=True).eval()), torch.randn(2, 3), z()
    with pytest.raises(ValueError, match=r"a  code of the network reads its weight without calling it"):
        fold(model, cond=cond)
    plain, report = fold(model, cond=cond, leftover="constant", inputs=(x,))
    assert report["a"].target == "constant"
    assert report["b"].target == "b.weight, b.bias"
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    with folded(model, cond=cond, leftover="constant"):
        torch.testing.assert_close(model(x), plain(x))


def test_where_code_cannot_be_traced_the_outputs_tell():
    model, x = conditioned("a|b", Reads(traceable=False).eval()), torch.randn(2, 3)
    with pytest.raises(
        ValueError, match=r"computes the same, but its outputs differ by \d(.|\n)*Its code reads"
    ):
        fold(model, cond=z(), inputs=(x,))


def test_a_network_without_outputs_but_zero_is_the_same():
    model = conditioned("0", nn.Sequential(nn.Linear(3, 5), nn.Threshold(1e9, 0)).eval())
    assert fold(model, cond=z(), inputs=(torch.randn(2, 3),))[1].error == 0


def test_dropped_conditions_do_not_get_into_the_weights():
    maybe = tf.Maybe(tf.Vector(7), dropout=0.9)
    model = randomise(condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), "0|1", maybe)).train()
    x, cond = torch.randn(2, 3), z()
    expected = model.eval()(x, cond=cond)
    for _ in range(5):
        plain, _ = fold(model.train(), cond=cond)
        torch.testing.assert_close(plain(x), expected)
        with folded(model, cond=cond):
            torch.testing.assert_close(model(x), expected)
    assert all(module.training for module in model.modules())


def test_the_report_prints_as_a_table():
    model = conditioned(r"1\.bn2|4")
    _, report = fold(model, cond=z(), fuse_norms=True)
    lines = repr(report).splitlines()
    assert lines[0].split() == ["site", "went", "into", "error", "note"]
    assert lines[1].startswith("1.bn2  1.conv2.weight, 1.conv2.bias")
    assert "1.conv2 took the BatchNorm 1.bn2" in lines
    assert "parameters became" in lines[-1]
    assert len(report) == 2


def test_removing_and_folding_leave_no_slot_behind():
    model = conditioned("4")
    plain, _ = fold(model, cond=z())
    for module in (*plain.modules(), *remove(model).modules()):
        assert not any(isinstance(value, Slot) for value in vars(module).values())


@pytest.mark.parametrize(
    ("sites", "options"),
    [("1", {"dim": -1, "features": 3}), ("2", {"where": "input"})],
    ids=["value", "border"],
)
def test_kept_constants_stay_in_float32(sites: str, options: dict):
    base = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Conv1d(5, 5, 3, padding=1))
    model = conditioned(sites, base, **options).eval()
    plain, _ = fold(model, cond=z(), leftover="constant")
    before = {name: value.clone() for name, value in plain.named_buffers()}
    plain.bfloat16()
    assert before
    assert plain[0].weight.dtype == torch.bfloat16
    for name, value in plain.named_buffers():
        assert torch.equal(value, before[name]), name
    assert plain(torch.randn(2, 5, 3).bfloat16()).dtype == torch.bfloat16
