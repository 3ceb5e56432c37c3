"""The numbers of a pass against those of the whole Jacobian, and in units of what a site modulates."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

import torchfilm as tf
from torchfilm.doctor import doctor
from torchfilm.injection import condition


@pytest.mark.parametrize("batch", [1, 2])
def test_the_norm_of_a_weight_is_its_own_also_where_all_samples_have_one_condition(batch: int):
    model = condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)), "0", tf.Vector(11), fusion="concat")
    x, cond = torch.randn(1, 3).expand(batch, 3), torch.randn(1, 11).expand(batch, 11)
    value = model.film.modulations(cond)["0"]

    def output(weight: torch.Tensor) -> torch.Tensor:
        return model(x, modulation={"0": dataclasses.replace(value, weight=weight)})

    y = output(value.weight)
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))  # as the doctor draws
    (gradient,) = torch.autograd.grad((drawn * y).sum(), value.weight)
    found = doctor(model, x, cond=cond).pulses["0"].fields["weight"]
    assert found == pytest.approx((gradient.norm() / y.norm()).item(), rel=1e-4)


def test_the_share_of_a_last_site_is_exactly_that_of_its_features():
    model = condition(nn.Sequential(nn.Linear(3, 5, bias=False)), "0", tf.Vector(11))
    x = torch.randn(1000, 3)
    pulse = doctor(model, x, cond=torch.randn(1000, 11)).pulses["0"]
    assert pulse.fields["gamma"] == pytest.approx(1, rel=0.1)
    assert pulse.fields["beta"] == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("where", ["output", "input"])
def test_the_share_of_a_shift_is_in_units_of_what_is_modulated(gamma: float, where: str):
    net = nn.Sequential(nn.Linear(3, 5), nn.Identity())
    model = condition(net, "0" if where == "output" else "1", tf.Vector(11), where=where, features=5, dim=-1)
    x = torch.randn(1000, 3)
    features = net[0]._film_base.forward(net[0], x) if where == "output" else net[0](x)
    (name,) = model.film.slots
    rows = {name: tf.Modulation(torch.full((1000, 5), gamma), torch.randn(1000, 5))}
    y = model(x, modulation=rows)
    exact = (features.square().mean() * y.numel() / (y - y.mean(0)).square().sum()).sqrt().item()
    (pulse,) = doctor(model, x, modulation=rows).pulses.values()
    assert pulse.fields["beta"] == pytest.approx(exact, rel=0.1)


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor, scale: float = 1e-5) -> tuple:
        return scale * self.inner(x).detach(), self.inner(x)


class Reads(nn.Module):
    """What reads the second of two features, or scales them up again behind a layer of small weights."""

    def __init__(self, inner: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.last, self.scale = inner, nn.Linear(5, 2), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return self.last(self.scale * (y[1] if isinstance(y, tuple) else y))


@pytest.mark.parametrize("kind", ["a small layer's input", "the second output"])
def test_a_site_is_as_strong_as_the_features_that_it_modulates(kind: str):
    if kind == "the second output":
        net, options = Reads(Second()), {"field": 1, "features": 5, "dim": -1}
    else:
        small = nn.Linear(3, 5)
        with torch.no_grad():
            small.weight.mul_(1e-5)
            small.bias.zero_()
        net, options = Reads(small, 1e5), {"where": "input", "fusion": "bias"}
    model = condition(net, "inner", tf.Vector(11), **options)
    found = doctor(model, torch.randn(50, 3), cond=torch.randn(50, 11))
    assert found.findings == ()
    assert 0.1 < found.pulses["inner"].fields["beta"] < 3


class Branch(nn.Module):
    """A residual branch whose last layer starts at zero, or nearly, in front of layers in other units."""

    def __init__(self, start: float, units: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.first, self.branch, self.start = nn.Linear(3, 5), nn.Linear(5, 5), start
        self.others, self.units = nn.ModuleList(nn.Linear(5, 5) for _ in units), units
        with torch.no_grad():
            for layer, scale in zip((self.branch, *self.others), (start, *units), strict=True):
                layer.weight.mul_(scale)
                layer.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = h + self.branch(h)
        for layer, unit in zip(self.others, self.units, strict=True):
            h = h + layer(h) / unit
        return h


@pytest.mark.parametrize("start", [0.0, 1e-8, 1e-5])
def test_a_site_is_heard_through_beta_where_its_features_are_zero_or_tiny(start: float):
    model, x, cond = (
        condition(Branch(start), "branch", tf.Vector(11)),
        torch.randn(50, 3),
        torch.randn(50, 11),
    )
    found = doctor(model, x, cond=cond)
    assert found.findings == ()
    beta = torch.linalg.vector_norm(tf.sensitivity(model, x, cond=cond)["branch"].beta).item()
    assert found.pulses["branch"].fields["beta"] == pytest.approx(0.1 * beta, rel=1e-4)
    optimiser = torch.optim.SGD(model.film.parameters(), 1.0)
    model(x, cond=cond).square().mean().backward()
    optimiser.step()
    y = model(x, cond=cond)
    assert (model(x, cond=-cond) - y).norm() > 0.01 * y.norm()


def test_without_beta_a_site_of_zeros_is_dead_by_what_it_modulates():
    found = doctor(
        condition(Branch(0.0), "branch", tf.Vector(11), emit=("gamma",)),
        torch.randn(50, 3),
        cond=torch.randn(50, 11),
    )
    assert found.of("branch") == ["dead"]
    assert "What it modulates, or something behind it, is zero" in str(found)


@pytest.mark.parametrize("unit", [1e-15, 1e15])
def test_features_in_other_units_make_no_site_weak_beside_them(unit: float):
    model = condition(Branch(1.0, (unit, unit)), r"branch|others\.\d", tf.Vector(11))
    found = doctor(model, torch.randn(50, 3), cond=torch.randn(50, 11))
    assert found.findings == ()
    assert all(0.05 < pulse.relative < 3 for pulse in found.pulses.values())


class FrozenBatchNorm(nn.Module):
    """A fixed affine, as torchvision's and DETR's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.running_mean[:, None, None]


class ConvNormActivation(nn.Sequential):
    """A block named after the norm inside, as those of torchvision and timm."""


class Tail(nn.Module):
    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.stem, self.branch, self.tail = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1), tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        return self.tail(h + 0.005 * self.branch(h))


TAILS = {
    "block": (lambda: ConvNormActivation(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)), False),
    "frozen": (lambda: FrozenBatchNorm(5), True),
    "instance norm in evaluation": (lambda: nn.InstanceNorm2d(5, track_running_stats=True), False),
}


@pytest.mark.parametrize(("tail", "training"), TAILS.values(), ids=TAILS)
def test_only_what_normalises_by_these_features_is_a_norm(tail, training: bool):
    model = condition(Tail(tail()).train(training), "branch", tf.Vector(11))
    found = doctor(model, torch.randn(4, 3, 8, 8), cond=torch.randn(4, 11))
    assert found.findings == ()
    assert 1e-3 < found.pulses["branch"].strength < 1e-2


def test_the_norm_inside_of_a_block_is_named():
    model = condition(Tail(ConvNormActivation(nn.InstanceNorm2d(5), nn.ReLU())), "branch", tf.Vector(11))
    found = doctor(model, torch.randn(4, 3, 8, 8), cond=torch.randn(4, 11))
    assert "InstanceNorm2d 'tail.0' reads it and normalises again" in str(found)


def test_the_work_is_linear_in_the_number_of_sites():
    def events(sites: int) -> int:
        net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(sites)))
        model, count = condition(net, ".*", tf.Vector(11)), [0]

        def note(*event: object) -> None:
            count[0] += 1

        sys.setprofile(note)
        try:
            doctor(model, torch.randn(2, 3), cond=torch.randn(2, 11))
        finally:
            sys.setprofile(None)
        return count[0]

    events(5)  # what is imported the first time
    assert events(200) < 2.2 * events(100)


def layers(*norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), *norm, nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Conv2d(7, 2, 3)
    )


def test_what_the_weight_of_a_batch_norm_hides_is_weak_and_not_cancelled():
    norm = nn.BatchNorm2d(5)
    nn.init.constant_(norm.weight, 1e-5)
    found = doctor(
        condition(layers(norm), "0|3", tf.Vector(11)), torch.randn(4, 3, 8, 8), cond=torch.randn(4, 11)
    )
    assert found.of("0") == ["weak"]
    assert "its share in the output is less than a thousandth of the other sites' median" in str(found)


class Offset(nn.Sequential):
    offset = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.offset


@pytest.mark.parametrize("offset", [20.0, 1e3, -3e4])
def test_an_offset_of_the_output_makes_no_site_faint(offset: float):
    model = condition(Offset(*layers()), "0|2", tf.Vector(11)).double()
    x, z = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 11).double()
    well, model.offset = doctor(model, x, cond=z), offset
    found, faint = doctor(model, x, cond=z), doctor(model, x[:1], cond=z[:1])
    assert well.findings == found.findings == ()
    for site, pulse in well.pulses.items():
        assert found.pulses[site].fields == pytest.approx(pulse.fields)
    assert "|y|: without the mean over samples, where these differ." in str(found)
    assert bool(faint) == (abs(offset) < 1e3), "of a single sample there is the whole output alone"
    assert ("less than a thousandth of how far samples are from their mean" in str(faint)) != bool(faint)


def pooled(outputs: int, *norm: nn.Module) -> nn.Module:
    net = Offset(*layers(*norm)[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, outputs))
    return condition(net, "0", tf.Vector(11))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(5), nn.GroupNorm(5, 5)], ids=["instance", "group"])
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("apart", [0, 0.003, 0.01, 0.03, 0.1, 1, "video"])
def test_a_norm_cancels_a_site_however_alike_samples_are(norm: nn.Module, outputs: int, apart):
    x = torch.rand(1, 3, 16, 16).repeat(8, 1, 1, 1)
    if apart == "video":  # a patch moves over a background
        for frame, image in enumerate(x):
            image[:, frame : frame + 2, frame : frame + 2] = 1
    else:
        x += apart * torch.randn(x.shape)
    model = pooled(outputs, norm)
    for model.offset in (0.0, 1e3):
        assert doctor(model.double(), x.double(), cond=torch.randn(8, 11).double()).of("0") == ["cancelled"]


@pytest.mark.parametrize("norm", [[], [nn.BatchNorm2d(5)]], ids=["none", "batch"])
@pytest.mark.parametrize("apart", [0.003, 0.1, 1])
@pytest.mark.parametrize("offset", [0.0, 300.0, 1e3])
def test_a_site_is_heard_however_alike_samples_are(norm: list, apart: float, offset: float):
    model = pooled(4, *norm).double()
    model.offset = offset
    x = torch.rand(1, 3, 16, 16).double() + apart * torch.randn(8, 3, 16, 16).double()
    assert doctor(model, x, cond=torch.randn(8, 11).double())


@pytest.mark.parametrize("apart", [0, 0.003, 0.1, 1])
def test_a_faint_site_is_weak_however_alike_samples_are(apart: float):
    class Sum(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1e-5 * super().forward(x)

    net = Sum(nn.Linear(3, 3))
    x = torch.randn(1, 3) + apart * torch.randn(8, 3)
    assert doctor(condition(net, "0", tf.Vector(11)), x, cond=torch.randn(8, 11)).of("0") == ["weak"]


def test_a_site_that_reads_the_same_for_all_samples_does_not_say_that_these_are_alike():
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.query = nn.Linear(3, 5), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.image(x) + self.query(torch.ones_like(x[:, :1]).expand(-1, 5)) + 1e4

    model = condition(Queries(), "query", tf.Vector(11)).double()
    assert doctor(model, torch.randn(8, 3).double(), cond=torch.randn(8, 11).double())
