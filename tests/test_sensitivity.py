"""Gradients by gamma and beta against differences of outputs."""

import threading

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.doctor import Diagnosis
from torchfilm.injection import condition
from torchfilm.modulations import modulations
from torchfilm.sensitivity import probe, sensitivity


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7))
    return randomise(condition(net, "0|2", tf.Vector(11))).double()


def test_a_measure_is_as_sensitive_as_a_small_step_of_each_channel_shows():
    model, x, z = network(), torch.randn(2, 3).double(), torch.randn(2, 11).double()
    found = sensitivity(model, x, cond=z, measure=lambda y: y.square().sum(1))
    made, step = {name: m.detach() for name, m in modulations(model, z).items()}, 1e-6
    for name, m in made.items():
        for channel in range(m.gamma.shape[1]):
            for field in ("gamma", "beta"):
                moved = getattr(m, field).clone()
                moved[:, channel] += step
                scores = [
                    model(x, modulation={**made, name: value}).square().sum(1).detach()
                    for value in (m, m.replace(**{field: moved}))
                ]
                slope = ((scores[1] - scores[0]) / step).square().mean().sqrt()
                torch.testing.assert_close(getattr(found[name], field)[channel], slope, rtol=1e-4, atol=1e-4)


def test_without_a_measure_it_is_the_norm_of_the_jacobian_in_units_of_the_output():
    model, x, z = network(), torch.randn(2, 3).double(), torch.randn(2, 11).double()
    found = sensitivity(model, x, cond=z, draws=2000)
    made = {name: m.detach() for name, m in modulations(model, z).items()}
    y = model(x, modulation=made)

    def output(gamma: torch.Tensor) -> torch.Tensor:
        return model(x, modulation={**made, "0": made["0"].replace(gamma=gamma)})

    jacobian = torch.autograd.functional.jacobian(output, made["0"].gamma)
    exact = (jacobian.square().sum((0, 1, 2)) / (y - y.mean(0)).square().sum()).sqrt()
    torch.testing.assert_close(found["0"].gamma, exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("rows", [1, 5])
def test_where_samples_do_not_differ_the_unit_is_the_output(rows: int):
    model, x, z = network(), torch.randn(1, 3).double(), torch.randn(1, 11).double()
    found = sensitivity(model, x.expand(rows, 3), cond=z.expand(rows, 11), draws=2000)["2"]
    y = model(x, cond=z)
    torch.testing.assert_close(found.beta, (1 / y.square().sum()).sqrt().expand(7), rtol=0.1, atol=0)


def test_what_is_masked_in_some_samples_alone_is_no_deviation():
    y = torch.tensor([[1.0, 5.0], [3.0, -torch.inf], [5.0, 5.0]], requires_grad=True)
    assert probe(y, None, 0)[1] == 4 + 4


@pytest.mark.parametrize("rows", [1, 5])
def test_a_loss_beside_the_output_does_not_count(rows: int):
    y = torch.randn(rows, 7, requires_grad=True)
    loss = 1e6 * y.square().sum()
    for expected, found in zip(probe(y, None, 0), probe({"loss": loss, "y": y}, None, 0), strict=True):
        assert expected == found
    assert probe(loss, None, 0)[1] == loss.double().square(), "alone it is the output"


@pytest.mark.parametrize("samples", [1, 6, 64])
def test_one_draw_is_as_noisy_as_is_said(samples: int):
    model = network()
    x, z = torch.randn(samples, 3).double(), torch.randn(samples, 11).double()
    means = [sensitivity(model, x, cond=z, draws=n)["0"].gamma.square() for n in (*range(1, 31), 1000)]
    sums = torch.stack([n * mean for n, mean in enumerate(means[:-1], start=1)])
    draws = sums.diff(dim=0, prepend=torch.zeros(1, 5)).sqrt()  # each of them by itself
    off = (draws / means[-1].sqrt() - 1).square().mean().sqrt()
    assert 0.5 * samples**-0.5 < off < 0.75


def test_it_is_the_same_in_inference_mode():
    model, x, z = network(), torch.randn(2, 3).double(), torch.randn(2, 11).double()
    expected = sensitivity(model, x, cond=z)["0"].gamma
    with torch.inference_mode():
        assert torch.equal(sensitivity(model, x.clone(), cond=z.clone())["0"].gamma, expected)


def test_what_all_samples_share_and_what_has_a_time_axis_is_measured_too():
    model, x = network(), torch.randn(2, 13, 3).double()
    shared = {"0": tf.Modulation.identity(5), "2": tf.Modulation.identity(7)}
    assert sensitivity(model, x[:, 0], modulation=shared)["2"].beta.shape == (7,)
    steps = {"0": tf.Modulation.identity(2, 13, 5), "2": tf.Modulation.identity(2, 13, 7)}
    found = sensitivity(model, x, modulation=steps)
    assert found["0"].gamma.shape == (5,)
    assert found["0"].gamma.min() > 0


def test_a_channel_that_does_not_matter_has_none():
    model = condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), "0", tf.Vector(11))
    with torch.no_grad():
        model[1].weight[:, 2] = 0
    found = sensitivity(model, torch.randn(4, 3), cond=torch.randn(4, 11))["0"]
    assert found.gamma[2] == found.beta[2] == 0
    assert (found.beta > 0).sum() == 4


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_modulation_for_all_samples_counts_as_one_for_each(shape: tuple):
    model = condition(nn.Sequential(nn.Linear(3, 1)), "0", tf.Vector(11))
    x = torch.randn(1, 3).expand(100, 3)
    for measure, expected in ((lambda y: y[:, 0], 1.0), (lambda y: y.mean(), 0.1)):
        rows = {"0": tf.Modulation.identity(100, 1)}
        found = sensitivity(model, x, modulation=rows, measure=measure)["0"]
        assert found.beta.item() == pytest.approx(expected)
    found = sensitivity(model, x, modulation={"0": tf.Modulation.identity(*shape)}, measure=lambda y: y[:, 0])
    assert found["0"].beta.item() == pytest.approx(1)
    assert sensitivity(model, x, cond=torch.randn(11), measure=lambda y: y)["0"].beta.item() == pytest.approx(
        1
    )


def test_a_modulation_that_all_share_is_measured_also_where_a_site_has_other_rows_than_the_measure():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frames, self.words = nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.frames(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1) + self.words(x[0, :1])

    net = Pooled()
    sites = tf.find(net, "frames", repeat=7) + tf.find(net, "words")
    model = condition(net, sites, tf.Vector(11))
    found = sensitivity(model, torch.randn(2, 7, 3), cond=torch.ones(11), measure=lambda y: y)
    torch.testing.assert_close(found["frames"].beta, torch.full((5,), 7.0))
    torch.testing.assert_close(found["words"].beta, torch.ones(5))


@pytest.mark.parametrize("ask", [sensitivity, tf.doctor])
@pytest.mark.parametrize("training", [True, False])
def test_a_graph_that_waits_for_its_backward_pass_is_left_as_it_was(ask, training: bool):
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.register_buffer("mean", torch.zeros(5))
            self.register_buffer("last", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
            self.last = x.detach()
            return self.norm(x) + self.mean

    net = nn.Sequential(nn.Linear(3, 5), Counted().train(training))
    model = condition(net, "0", tf.Vector(11)).train(training)
    x, z = torch.randn(2, 3), torch.randn(2, 11)
    y = model(x, cond=z)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    ask(model, x, cond=z)
    after = dict(model.named_buffers())
    assert {name: id(buffer) for name, buffer in after.items()} == {n: id(b) for n, (b, _) in before.items()}
    assert all(torch.equal(after[name], values) for name, (_, values) in before.items())
    y.sum().backward()


def test_two_threads_that_ask_at_once_leave_the_compiler_as_it_was():
    torch._dynamo.reset()
    inside, out = threading.Barrier(2, timeout=20), threading.Event()

    class Waiting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside.wait()
            if threading.current_thread() is not threads[0]:
                out.wait(20)
            return super().forward(x)

    def work(model: nn.Module) -> None:
        sensitivity(model, torch.ones(2, 3), cond=torch.ones(2, 11))
        out.set()

    models = [condition(nn.Sequential(Waiting(3, 5)), "0", tf.Vector(11)) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = []
    torch.compile(lambda x: x + 1, backend=lambda graph, inputs: calls.append(graph) or graph)(torch.ones(2))
    assert calls, "it is compiled as before"


@pytest.mark.parametrize("conjugated", [False, True])
def test_complex_outputs_are_measured_as_pairs_of_real_ones(conjugated: bool):
    class Spectrum(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = torch.fft.rfft(super().forward(x))
            return found.conj() if conjugated else found

    def real(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(Spectrum.forward(self, x).resolve_conj())

    x, z, layer = torch.randn(2, 3), torch.randn(2, 11), Spectrum(3, 5)
    models = []
    for kind in (Spectrum, type("Real", (Spectrum,), {"forward": real})):
        inner = kind(3, 5)
        inner.load_state_dict(layer.state_dict())
        models.append(condition(nn.Sequential(nn.Linear(3, 3), inner), "0", tf.Vector(11)))
    models[1][0].load_state_dict(models[0][0].state_dict())
    found, expected = (sensitivity(model, x, cond=z)["0"].gamma for model in models)
    torch.testing.assert_close(found, expected)
    assert tf.doctor(models[0], x, cond=z).of("0") == []
    with pytest.raises(ValueError, match=r"measure: expected a tensor with a gradient, got torch.complex64"):
        sensitivity(models[0], x, cond=z, measure=lambda y: y)


class Scored(nn.Module):
    """A policy whose logits have a unit, and a mask on the last."""

    def __init__(self, unit: float = 1.0, mask: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7))
        self.unit, self.mask = unit, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x) * self.unit
        return y if self.mask is None else y.masked_fill(torch.arange(7) == 6, self.mask)


def asked(net: nn.Module, **options: object) -> tuple[tf.Modulation, Diagnosis]:
    model = condition(net, r"body\.[02]", tf.Vector(11), init="default")
    x, z = (torch.linspace(-2, 2, 2 * n).sin().reshape(2, n) for n in (3, 11))
    return sensitivity(model, x, cond=z, **options)["body.0"], tf.doctor(model, x, cond=z, **options)


@pytest.mark.parametrize("unit", [1e-30, 1e-24, 1e24, 1e30])
def test_the_numbers_are_the_same_in_every_unit_of_the_output(unit: float):
    (expected, well), (found, report) = asked(Scored()), asked(Scored(unit))
    torch.testing.assert_close(found.gamma, expected.gamma)
    torch.testing.assert_close(found.beta, expected.beta)
    assert well.findings == report.findings == ()
    for site, pulse in well.pulses.items():
        assert report.pulses[site].fields == pytest.approx(pulse.fields)
    found, _ = asked(Scored(unit), measure=lambda y: y[:, 0])
    torch.testing.assert_close(found.gamma / unit, asked(Scored(), measure=lambda y: y[:, 0])[0].gamma)


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min])
def test_what_is_masked_counts_for_nothing(mask: float):
    (expected, well), (found, report) = asked(Scored(mask=0.0)), asked(Scored(mask=mask))
    torch.testing.assert_close(found.gamma, expected.gamma)
    assert well.findings == report.findings == ()
    assert report.pulses["body.2"].fields == pytest.approx(well.pulses["body.2"].fields)
    assert asked(Scored(mask=torch.nan))[1].of("body.0") == ["nonfinite"]


def test_what_has_overflowed_and_what_is_merely_large_in_half_precision_is_no_mask():
    class Half(Scored):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (4e4 + super().forward(x)).half()

    assert asked(Scored(torch.inf))[1].of("body.0") == ["nonfinite"]
    found, report = asked(Half(100.0))
    assert found.gamma.min() > 0
    assert report.findings == ()


def test_a_network_is_asked_under_another_default_device():
    model, x, z = network(), torch.randn(2, 3).double(), torch.randn(2, 11).double()
    expected, well = sensitivity(model, x, cond=z)["0"].gamma, tf.doctor(model, x, cond=z)
    with torch.device("meta"):
        assert torch.equal(sensitivity(model, x, cond=z)["0"].gamma, expected)
        assert tf.doctor(model, x, cond=z) == well


@pytest.mark.parametrize("error", [RecursionError, torch.OutOfMemoryError])
def test_memory_that_runs_out_is_no_finding(error, monkeypatch: pytest.MonkeyPatch):
    def fails(*args, **kwargs) -> None:
        raise error

    monkeypatch.setattr(torch, "randn_like", fails)
    with pytest.raises(error):
        tf.doctor(network(), torch.randn(2, 3).double(), cond=torch.randn(2, 11).double())


@pytest.mark.plain
@pytest.mark.parametrize("ask", [tf.doctor, sensitivity])
@pytest.mark.parametrize("measure", [None, torch.mean])
def test_a_batch_of_none_is_refused(ask, measure):
    with pytest.raises(ValueError, match=r"Output: expected at least one sample, got shape \(0, 7\)"):
        ask(network(), torch.zeros(0, 3).double(), cond=torch.zeros(0, 11).double(), measure=measure)


class Detects(nn.Module):
    """Gives a loss, and boxes, of which it found none."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.site(x).square().sum(), "boxes": torch.zeros(0, 4)}


@pytest.mark.plain
@pytest.mark.parametrize("measure", [None, lambda output: output["loss"]], ids=["all", "loss"])
def test_parts_of_no_sample_beside_others_are_no_batch_of_none(measure):
    model = tf.condition(Detects(), "site", tf.Vector(11))
    given = torch.randn(2, 3), torch.randn(2, 11)
    assert sensitivity(model, given[0], cond=given[1], measure=measure)["site"].gamma.all()
    assert tf.doctor(model, given[0], cond=given[1], measure=measure)


@pytest.mark.plain
def test_no_draws_are_refused():
    with pytest.raises(ValueError, match=r"draws expected a whole number from 1 on, got 0"):
        sensitivity(network(), torch.randn(2, 3).double(), cond=torch.randn(2, 11).double(), draws=0)


@pytest.mark.plain
def test_other_fusions_are_refused():
    model = condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(11), fusion="low_rank")
    with pytest.raises(ValueError, match="expected a Modulation for each site, got Bilinear"):
        sensitivity(model, torch.randn(2, 3), cond=torch.randn(2, 11))
    assert model.get_submodule("film").transforms == []
