"""What folding leaves as it was: the conditioned network, its other copies, and what an earlier fold kept."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torchfilm as tf
from catalogue import randomise


def conditioned(model: nn.Module, sites: str, **options) -> nn.Module:
    """Condition a network of five channels in evaluation on a vector, with a generator that was trained."""
    around = {"dim": -1, "features": 5} | options
    model = tf.condition(model.eval(), tf.find(model, sites, **around), tf.Vector(7))
    randomise(tf.conditioning(model))
    return model


def z() -> Tensor:
    return torch.randn(1, 7)


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(5, 5))


def test_a_parametrized_layer_inside_of_a_site_stays_one_in_the_original_and_its_copies():
    layer, x, cond = normed(), torch.randn(2, 5), z()
    model = conditioned(nn.Sequential(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(layer))), "0")
    average, expected, alone = copy.deepcopy(model), model(x, cond=cond), layer(x)
    plain, _ = tf.fold(model, cond=cond)
    torch.testing.assert_close(plain(x), expected)
    assert [type(layer) for layer in plain[0]] == [nn.Linear, nn.Linear]
    assert torch.equal(model(x, cond=cond), expected)
    assert torch.equal(average(x, cond=cond), expected)
    assert torch.equal(layer(x), alone)


def test_parametrizations_taken_off_the_copy_stay_at_the_original_also_beside_the_sites():
    model, x, cond = conditioned(nn.Sequential(normed(), nn.Linear(5, 5)), "1"), torch.randn(2, 5), z()
    expected = model(x, cond=cond)
    plain, _ = tf.fold(model, cond=cond)
    assert parametrize.is_parametrized(plain[0])
    parametrize.remove_parametrizations(plain[0], "weight")
    torch.testing.assert_close(plain(x), expected)
    assert torch.equal(model(x, cond=cond), expected)


def kept(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network that keeps a constant of a fold at "0.0", and the shape of what it takes."""
    layer = nn.Conv1d(5, 5, 3, padding=1) if kind == "border" else nn.Linear(5, 5)
    parts, cond = nn.Sequential(nn.Sequential(layer), nn.ReLU()).eval(), tf.Vector(7)
    if kind == "border":
        model = tf.condition(parts, r"0\.0", cond, where="input")
    elif kind == "attention":
        model = tf.condition(parts, r"0\.0", tf.Tokens(7, pooling=None), fusion="cross_attention")
    else:
        model = tf.condition(parts, r"0\.0", cond)
        each = tf.Modulation(torch.rand(1, 3, 5) + 0.5, torch.randn(1, 3, 5))
        return tf.fold(model, modulation={"0.0": each}, leftover="constant")[0], (2, 3, 5)
    randomise(tf.conditioning(model))
    given = z() if kind == "border" else torch.randn(1, 3, 7)
    return tf.fold(model, cond=given, leftover="constant")[0], (2, 5, 11) if kind == "border" else (2, 3, 5)


@pytest.mark.parametrize("kind", ["border", "positions"])
def test_nothing_is_folded_across_a_constant_of_an_earlier_fold(kind):
    earlier, shape = kept(kind)
    options = {"where": "input", "dim": 1} if kind == "border" else {}
    model, x, cond = conditioned(earlier, "0", **options), torch.randn(shape), z()
    with pytest.raises(ValueError, match="0  a module inside of it keeps a constant"):
        tf.fold(model, cond=cond)
    plain, report = tf.fold(model, cond=cond, leftover="constant")
    assert report["0"].target == "constant"
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    with tf.folded(model, cond=cond, leftover="constant"):
        torch.testing.assert_close(model(x), plain(x))


def test_no_norm_is_merged_across_a_constant_of_an_earlier_fold():
    parts = nn.Sequential(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.Conv1d(5, 5, 1)).eval()
    parts[1].running_mean.normal_()
    each = tf.Modulation(torch.rand(1, 3, 5) + 0.5, torch.randn(1, 3, 5))
    model = tf.condition(parts, "0", tf.Vector(7))
    earlier, _ = tf.fold(model, modulation={"0": each}, leftover="constant")
    model, x, cond = conditioned(earlier, "2", dim=1), torch.randn(2, 5, 3), z()
    plain, report = tf.fold(model, cond=cond, fuse_norms=True)
    assert report.fused == ()
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    with pytest.raises(ValueError, match=r"\('0', '1'\): a constant is kept between them"):
        tf.fold(model, cond=cond, fuse_norms=[("0", "1")])


def test_a_module_that_keeps_a_constant_is_refused_as_a_site_in_words():
    earlier, _ = tf.fold(conditioned(nn.Sequential(nn.ReLU()), "0"), cond=z(), leftover="constant")
    with pytest.raises(ValueError, match=r"Site '0': .* a ReLU that applies a constant which a fold kept"):
        tf.find(earlier, "0", dim=-1, features=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_site_whose_weights_compute_something_else_is_refused(dtype, monkeypatch):
    model = conditioned(nn.Sequential(nn.Linear(5, 5)).to(dtype), "0")
    assert tf.fold(model, cond=z())[1]["0"].error < 0.02

    def wrong(draft, module, affine, dim):
        draft.write(module, weight=2 * draft.read(module, "weight"))
        return module

    monkeypatch.setattr("torchfilm.folding.fold_output", wrong)
    before = dict(model.named_parameters())
    for act in (tf.fold, lambda *args, **options: tf.folded(*args, **options).__enter__()):
        with pytest.raises(ValueError, match=r"site '0': expected folded weights that compute the same, got"):
            act(model, cond=z())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_network_that_keeps_a_mask_moves_converts_and_folds_again():
    earlier, shape = kept("attention")
    x, cond = torch.randn(shape), z()
    before = {name: tensor.dtype for name, tensor in earlier.named_buffers()}
    assert torch.bool in before.values()
    for convert in (nn.Module.cpu, nn.Module.half, nn.Module.float):
        assert {name: t.dtype for name, t in convert(earlier).named_buffers()} == before
    model = conditioned(earlier, "0")
    plain, report = tf.fold(model, cond=cond, leftover="constant")
    assert report["0"].target == "constant"
    torch.testing.assert_close(plain(x), model(x, cond=cond))


class Words(nn.Module):
    """An encoder of conditions that shares the table of the network."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.dim = table, 5

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words)


def test_a_copy_shares_nothing_with_an_encoder_that_uses_a_part_of_the_network():
    parts = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 5))
    model, words = tf.condition(parts, "1", Words(parts[0])), torch.tensor([3])
    randomise(tf.conditioning(model))
    plain, _ = tf.fold(model, cond=words)
    torch.testing.assert_close(plain(words), model(words, cond=words))
    plain.half()
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("act", ["fold", "folded"])
def test_nothing_of_a_folded_network_waits_for_the_garbage_collector(act: str):
    model = conditioned(
        nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5), nn.Tanh())), "2"
    )
    gc.disable()
    try:
        if act == "fold":
            model, _ = tf.fold(model, cond=z(), leftover="constant")
        else:
            with tf.folded(model, cond=z(), leftover="constant"):
                pass
        parameters = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert [parameter() for parameter in parameters] == [None] * len(parameters)
    finally:
        gc.enable()


def megabytes() -> float:
    """What all tensors that are alive take."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    tensors = [one for one in found if one.layout is torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) / 1e6


class Watched(nn.Sequential):
    """A network that remembers how much was in memory while it was called."""

    most = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            Watched.most = max(Watched.most, megabytes())
        return super().forward(x)


def test_folded_weights_are_beside_the_old_ones_and_nothing_else_is():
    base, x, size = Watched(*[nn.Linear(300, 300) for _ in range(4)]), torch.randn(2, 300), 4 * 0.3612
    model = tf.condition(base.eval(), ".+", tf.Vector(7))
    start = megabytes()
    with tf.folded(model, cond=z()):
        model(x)
    assert Watched.most - start < 1.1 * size
    plain, _ = tf.fold(model, cond=z(), inputs=x)
    assert Watched.most - start < 2.1 * size
    assert megabytes() - start < 1.1 * size
    del plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_a_network_on_a_gpu_is_folded_and_measured(kind):
    model = conditioned(nn.Sequential(kind(5, 5)), "0").cuda()
    x = torch.arange(5) if kind is nn.Embedding else torch.randn(2, 5)
    plain, report = tf.fold(model, cond=z().cuda(), inputs=x.cuda())
    assert plain[0].weight.is_cuda
    assert report["0"].error < 1e-5


def test_an_rms_norm_takes_no_shift_though_some_channels_have_none():
    model = tf.condition(nn.Sequential(nn.RMSNorm(3)), "0", tf.Vector(5))
    x, shift = torch.randn(2, 3), {"0": tf.Modulation(torch.ones(1, 3), torch.tensor([[0.0, 2.0, 0.0]]))}
    plain, _ = tf.fold(model, modulation=shift, leftover="constant")
    torch.testing.assert_close(plain(x), model(x, modulation=shift))
