"""A condition per step where the features of a site have another rate."""

import copy

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.fusion import Film


class Strided(nn.Module):
    """A network whose layers have other lengths each, as a vocoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 3, 4, 4)
        self.same = nn.Conv1d(3, 5, 3, padding=1)
        self.down = nn.Conv1d(5, 2, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.same(self.up(x).relu()).relu())


SITES = "up|same|down"


def strided(align: str = "linear", **options: object) -> nn.Module:
    return randomise(tf.condition(Strided(), SITES, tf.Vector(13), align=align, **options)).eval()


def linear(values: list[float], length: int) -> list[float]:
    """Read values at the centres of `length` equal parts of the time that they cover, the ends held."""
    read = []
    for i in range(length):
        place = (i + 0.5) * len(values) / length - 0.5
        place = min(max(place, 0), len(values) - 1)
        low = min(int(place), len(values) - 2)
        read.append(values[low] + (place - low) * (values[low + 1] - values[low]))
    return read


def nearest(values: list[float], length: int) -> list[float]:
    return [values[int((i + 0.5) * len(values) / length)] for i in range(length)]


@pytest.mark.parametrize("align", [linear, nearest], ids=lambda align: align.__name__)
@pytest.mark.parametrize("length", [3, 7, 20])
@pytest.mark.parametrize("dim", [1, -1])
def test_each_step_of_the_features_reads_the_condition_at_its_time(align, length: int, dim: int):
    fusion, steps = Film(align=align.__name__), 5
    m = tf.Modulation(*(torch.randn(2, steps, 3, dtype=torch.float64) for _ in range(3)))
    x = torch.randn(2, length, 3, dtype=torch.float64)
    y = fusion.apply(x if dim == -1 else x.transpose(1, 2), m, dim, "here")
    y = y if dim == -1 else y.transpose(1, 2)
    for b in range(2):
        for c in range(3):
            gamma, beta, gate = (align(f[b, :, c].tolist(), length) for f in (m.gamma, m.beta, m.gate))
            for t in range(length):
                wanted = gate[t] * (gamma[t] * x[b, t, c] + beta[t])
                torch.testing.assert_close(y[b, t, c], wanted)


def test_what_has_no_steps_or_the_same_is_not_touched():
    fusion, x = Film(align="linear"), torch.randn(2, 3, 7)
    for shape in ((3,), (2, 3), (1, 3), (2, 1, 3), (2, 7, 3)):
        m = tf.Modulation(torch.randn(shape), torch.randn(shape))
        assert torch.equal(fusion.apply(x, m, 1, "here"), Film().apply(x, m, 1, "here"))


def test_frames_of_a_spectrogram_are_resized_along_their_own_axis():
    fusion, x = Film(align="nearest"), torch.randn(2, 3, 11, 14)
    m = tf.Modulation(torch.randn(2, 1, 7, 3), torch.randn(2, 1, 7, 3))
    twice = tf.Modulation(m.gamma.repeat_interleave(2, dim=2), m.beta.repeat_interleave(2, dim=2))
    assert torch.equal(fusion.apply(x, m, 1, "here"), Film().apply(x, twice, 1, "here"))


@pytest.mark.parametrize("align", ["linear", "nearest"])
@pytest.mark.parametrize("fusion", ["film", "scale", "bias", "gate"])
def test_a_strided_network_hears_a_condition_per_step_and_starts_as_it_was(align: str, fusion: str):
    base, x, z = Strided(), torch.randn(2, 2, 7), torch.randn(2, 7, 13)
    expected = base(x)
    model = tf.condition(base, SITES, tf.Vector(13), align=align, fusion=fusion)
    assert torch.equal(model(x, cond=z), expected)
    randomise(model.film)
    other = z.clone()
    other[:, -1] += 1
    changed = (model(x, cond=z) != model(x, cond=other)).any(dim=1).any(dim=0)
    assert changed[-1]
    assert not changed[: 7 if align == "linear" else 9].any()
    model(x, cond=z).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.film.parameters())


def test_it_is_saved_and_loaded_and_looked_at(tmp_path):
    model, x, z = strided("nearest"), torch.randn(2, 2, 7), torch.randn(2, 7, 13)
    base = tf.remove(copy.deepcopy(model))
    expected = model(x, cond=z)
    tf.save(model, tmp_path)
    assert torch.equal(tf.load(copy.deepcopy(base), tmp_path)(x, cond=z), expected)
    assert set(tf.doctor(model, x, cond=z).pulses) == {"up", "same", "down"}


def test_one_condition_without_steps_folds_and_steps_stay_as_a_constant():
    model, x, z = strided(), torch.randn(2, 2, 7), torch.randn(1, 7, 13)
    plain, _ = tf.fold(model, cond=z[:, 0], inputs=x)
    torch.testing.assert_close(plain(x), model(x, cond=z[:, 0]))
    with pytest.raises(ValueError, match="each of 7 positions is modulated differently"):
        tf.fold(model, cond=z)
    kept, report = tf.fold(model, cond=z, leftover="constant")
    assert {site.target for site in report} == {"constant"}
    torch.testing.assert_close(kept(x), model(x, cond=z))


@pytest.mark.plain
def test_it_compiles_as_one_graph():
    model, x, z = strided(), torch.randn(2, 2, 7), torch.randn(2, 7, 13)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, cond=z), model(x, cond=z))


@pytest.mark.plain
def test_another_rate_or_axis_is_refused_with_what_to_do():
    model, z = tf.condition(Strided(), SITES, tf.Vector(13)), torch.randn(2, 7, 13)
    with pytest.raises(ValueError, match=r"size 7 where x has size 28[\s\S]*another rate .* align='linear'"):
        model(torch.randn(2, 2, 7), cond=z)
    image = tf.condition(nn.Sequential(nn.Conv2d(2, 3, 1)), "0", tf.Vector(13))
    x = torch.randn(2, 2, 5, 7)
    with pytest.raises(ValueError, match=r"Where these are axis 3 of x, give the condition\[:, None\]"):
        image(x, cond=z)
    assert image(x, cond=z[:, None]).shape == (2, 3, 5, 7)
    gamma = torch.rand(2, 11, 3)
    with pytest.raises(ValueError, match=r"Where these are axis 4 of x, give gamma\[:, None, None\]"):
        tf.functional.film(torch.rand(2, 3, 5, 7, 11), gamma, gamma)
    with pytest.raises(ValueError, match=r"align expected one of .*, got 'cubic'"):
        tf.condition(Strided(), SITES, tf.Vector(13), align="cubic")


@pytest.mark.plain
def test_only_a_condition_with_an_axis_for_each_of_the_features_is_resized():
    z = torch.randn(2, 11, 13)
    rows = tf.condition(nn.Sequential(nn.Conv1d(3, 5, 3)), "0", tf.Vector(13), repeat="any", align="linear")
    randomise(rows.film)
    x = torch.randn(6, 3, 7)
    with pytest.raises(ValueError, match=r"size 11 where x has size 3[\s\S]*an axis for each of x's"):
        rows(x, cond=z)
    torch.testing.assert_close(rows(x, cond=z[:, None]), rows(x, cond=z.repeat_interleave(3, 0)[:, None]))
    image = tf.condition(nn.Sequential(nn.Conv2d(2, 3, 1)), "0", tf.Vector(13), align="linear")
    with pytest.raises(ValueError, match=r"size 11 where x has size 5[\s\S]*an axis for each of x's"):
        image(torch.randn(2, 2, 5, 7), cond=z)
    pooled = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(13), align="linear")
    with pytest.raises(ValueError, match=r"gamma has 3 axes, expected at most the 2 of x"):
        pooled(torch.randn(2, 3), cond=z)


def test_the_nearest_step_is_the_same_in_chunks_of_a_stream_and_a_step_between_is_not():
    x, m = torch.randn(2, 3, 24), tf.Modulation(torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    halves = [tf.Modulation(m.gamma[:, part], m.beta[:, part]) for part in (slice(3), slice(3, 6))]
    for align, same in (("nearest", True), ("linear", False)):
        fusion = Film(align=align)
        y = [fusion.apply(part, half, 1, "here") for part, half in zip(x.split(12, 2), halves, strict=True)]
        assert torch.equal(torch.cat(y, dim=2), fusion.apply(x, m, 1, "here")) is same
    cut = tf.Modulation(m.gamma[:, :2], m.beta[:, :2])  # six of the eight numbers that two steps cover
    y = Film(align="nearest").apply(x[..., :6], cut, 1, "here")
    assert not torch.equal(y, Film(align="nearest").apply(x, m, 1, "here")[..., :6])


def test_the_last_real_step_reads_the_padding_behind_it_unless_that_repeats_it():
    x, m = torch.randn(2, 3, 24), tf.Modulation(torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    last = tf.Modulation(*(torch.cat([f[:, :3], f[:, 2:3].expand(-1, 3, -1)], 1) for f in m.present()))
    real = tf.Modulation(m.gamma[:, :3], m.beta[:, :3])
    for align, padded, same in (("linear", m, False), ("linear", last, True), ("nearest", m, True)):
        fusion = Film(align=align)
        y, expected = fusion.apply(x, padded, 1, "here")[..., :12], fusion.apply(x[..., :12], real, 1, "here")
        assert torch.allclose(y, expected) is same
