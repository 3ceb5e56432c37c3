"""film_ computes what film computes, in x's own memory where that is possible."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import torchfilm.functional as F

LAYOUTS = [
    ((2, 3, 5, 7), 1, (2, 3)),
    ((2, 3, 5, 7), -3, (1, 3)),
    ((2, 3, 5), -1, (2, 5)),
    ((2, 3, 5), 1, (3,)),
    ((2, 7, 5), -1, (2, 7, 5)),
    ((2, 3), 1, (2, 3)),
    ((2, 3, 1, 1), 1, (2, 3)),
]


@pytest.mark.parametrize(("shape", "dim", "sizes"), LAYOUTS, ids=str)
def test_x_becomes_the_result(shape, dim, sizes):
    x, gamma, beta = torch.randn(shape), torch.randn(sizes), torch.randn(sizes)
    expected = F.film(x.double(), gamma.double(), beta.double(), dim, modulation_dim=-1)
    y = F.film_(x, gamma, beta, dim)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, expected.float())


def test_channels_last_memory_is_written_into_as_it_lies():
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    gamma, beta = torch.randn(2, 3), torch.randn(2, 3)
    expected, strides = F.film(x, gamma, beta), x.stride()
    y = F.film_(x, gamma, beta)
    assert y.data_ptr() == x.data_ptr()
    assert y.stride() == strides
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("needs", ["x", "gamma", "beta"])
def test_with_a_graph_x_stays_as_it_is(needs):
    given = {"x": torch.randn(2, 3, 5), "gamma": torch.randn(2, 3), "beta": torch.randn(2, 3)}
    given[needs].requires_grad_()
    before = given["x"].detach().clone()
    F.film_(**given).sum().backward()
    assert given[needs].grad is not None
    assert torch.equal(given["x"], before)


def test_in_another_precision_x_stays_as_it_is():
    x, gamma, beta = torch.randn(2, 3, 5).bfloat16(), torch.randn(2, 3), torch.randn(2, 3)
    before = x.clone()
    torch.testing.assert_close(F.film_(x, gamma, beta), F.film(before, gamma, beta))
    assert torch.equal(x, before)


def test_memory_that_cannot_be_written_into_stays_as_it_is():
    base, gamma, beta = torch.randn(2, 3, 1), torch.randn(2, 3), torch.randn(2, 3)
    with torch.inference_mode():
        frozen = torch.randn(2, 3, 5)
    for x in (base.expand(2, 3, 5), frozen):
        before = x.clone()
        torch.testing.assert_close(F.film_(x, gamma, beta), F.film(before, gamma, beta))
        assert torch.equal(x, before)


@pytest.mark.parametrize("mapped", [(None, 0, None), (None, None, 0), (0, 0, 0), (0, None, None)], ids=str)
def test_vmap_over_any_argument_gives_what_film_gives(mapped):
    sizes = [(2, 3, 5), (2, 3), (2, 3)]
    given = [torch.randn(*([4] if m == 0 else []), *size) for m, size in zip(mapped, sizes, strict=True)]

    def all_of(function) -> Tensor:
        copies = [value.clone() for value in given]
        return torch.vmap(lambda *values: function(*values), in_dims=mapped)(*copies)

    torch.testing.assert_close(all_of(F.film_), all_of(F.film))


def test_what_does_not_fit_is_refused_and_x_is_as_it_was():
    x = torch.randn(2, 3, 5)
    before = x.clone()
    with pytest.raises(ValueError, match="gamma has 5 channels, but x has size 3"):
        F.film_(x, torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(ValueError, match="FiLM site 'here': beta has 4 channels"):
        F.film_(x, torch.randn(2, 3), torch.randn(2, 4), site="here")
    assert torch.equal(x, before)


def test_a_gate_multiplies_the_sum():
    x, gamma, beta, gate = torch.randn(2, 3, 5), *torch.randn(3, 2, 3)
    expected = F.film(x, gamma, beta, gate=gate)
    y = F.film_(x, gamma, beta, gate=gate)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shape", [(8, 128, 14, 14), (1, 197, 768)], ids=str)
def test_large_features_agree_too(shape):
    dim = 1 if len(shape) == 4 else -1
    x, gamma, beta = torch.randn(shape), torch.randn(shape[0], shape[dim]), torch.randn(shape[0], shape[dim])
    expected = F.film(x.double(), gamma.double(), beta.double(), dim).float()
    torch.testing.assert_close(F.film(x, gamma, beta, dim), expected)
    torch.testing.assert_close(F.film_(x, gamma, beta, dim), expected)


WAYS = {
    "film": F.film,
    "film and ReLU": lambda x, gamma, beta: F.film(x, gamma, beta, activation="relu"),
    "film and SiLU": lambda x, gamma, beta: F.film(x, gamma, beta, activation="silu"),
    "film_": lambda x, gamma, beta: torch.tanh(F.film_(2 * x, gamma, beta)),
}


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 20_000)], ids=str)
def test_a_trace_passes_torchs_check_which_runs_again_without_gradients(
    way: str, shape: tuple, tmp_path: Path
):
    x = torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2)  # channels innermost
    gamma, beta = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    traced = torch.jit.trace(lambda *given: WAYS[way](*given), (x, gamma, beta))
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    torch.testing.assert_close(traced(x + 1, gamma, beta), WAYS[way](x + 1, gamma, beta))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node", "ignore:.torch.jit.script")
@pytest.mark.parametrize("leaf", ["x", "gamma", "beta", None])
@pytest.mark.parametrize("way", WAYS)
def test_a_linearised_film_is_the_derivative_at_each_call(way: str, leaf: str | None):
    """torch.func.linearize runs what it recorded again, on constants that have to stay as they are."""
    given = {"x": torch.randn(2, 3, 5), "gamma": torch.randn(2, 3), "beta": torch.randn(2, 3)}
    if leaf is not None:
        given[leaf].requires_grad_()
    steps = {name: torch.randn_like(value) for name, value in given.items()}
    for names in (["x"], ["gamma"], ["beta"], ["gamma", "beta"]):

        def of(*values: Tensor, names: list[str] = names) -> Tensor:
            return WAYS[way](**{**given, **dict(zip(names, values, strict=True))})

        at, step = (tuple(values[name] for name in names) for values in (given, steps))
        _, expected = torch.func.jvp(of, at, step)
        _, derivative = torch.func.linearize(of, *at)
        for _ in range(3):
            torch.testing.assert_close(derivative(*step), expected)


@pytest.mark.parametrize("again", [True, False])
def test_what_is_exactly_zero_in_front_of_a_relu_has_no_gradient_as_in_torch(again: bool):
    beta = torch.zeros(3, requires_grad=True)
    y = F.film(torch.randn(2, 3, 5), torch.zeros(3), beta, activation="relu")
    (gradient,) = torch.autograd.grad(y.sum(), beta, create_graph=again)
    assert not gradient.any()


def test_parameters_modulate_in_place_too():
    for sizes in ((2, 5), (2, 3, 5)):
        x, gamma, beta = torch.randn(2, 3, 5), *(torch.nn.Parameter(torch.randn(sizes)) for _ in range(2))
        with torch.no_grad():
            assert F.film_(x, gamma, beta, -1) is x


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["gamma", "beta", "gate"])
@pytest.mark.parametrize("function", [F.film, F.film_])
def test_two_tensors_in_one_both_count_and_the_result_is_two(function, name: str, grad: bool):
    given = {"gamma": torch.randn(2, 5), "beta": torch.randn(2, 5), "gate": torch.randn(2, 5)}
    x, one, other = torch.randn(2, 3, 5), given.pop(name), torch.randn(2, 5)
    with torch.set_grad_enabled(grad):
        y = function(x.clone(), **given, **{name: TwoTensor(one, other)}, dim=-1)
    assert type(y) is TwoTensor
    for half, value in ((y.a, one), (y.b, other)):
        torch.testing.assert_close(half, F.film(x, **given, **{name: value}, dim=-1))
