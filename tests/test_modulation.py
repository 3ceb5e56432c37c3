"""Modulation: a monoid of affine maps, and the paper's arithmetic."""

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

import torchfilm.functional as F
from torchfilm import Modulation

X = (2, 3, 5, 7)


def modulation(*shape: int, gate: bool = False) -> Modulation:
    shape = shape or (2, 3)
    fields = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    return Modulation(fields[0], fields[1], fields[2] if gate else None)


def apply(m: Modulation, x: torch.Tensor) -> torch.Tensor:
    return F.film(x, m.gamma, m.beta, gate=m.gate)


def assert_equal_fields(one: Modulation, other: Modulation) -> None:
    torch.testing.assert_close(one.gamma, other.gamma)
    torch.testing.assert_close(one.beta, other.beta)
    assert (one.gate is None) == (other.gate is None)
    if one.gate is not None:
        torch.testing.assert_close(one.gate, other.gate)


def test_the_identity_changes_nothing_and_is_float32():
    m, x = Modulation.identity(2, 3), torch.randn(X)
    assert m.gamma.shape == m.beta.shape == (2, 3)
    assert m.gamma.dtype == m.beta.dtype == torch.float32
    assert torch.equal(apply(m, x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_identity_is_float32_under_any_default(dtype: torch.dtype):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        m = Modulation.identity(3)
    finally:
        torch.set_default_dtype(before)
    assert m.gamma.dtype == m.beta.dtype == torch.float32


@pytest.mark.parametrize("gates", [(False, False), (True, False), (False, True), (True, True)])
def test_two_modulations_compose_into_one(gates: tuple):
    (first, second), x = (modulation(gate=gate) for gate in gates), torch.randn(X, dtype=torch.float64)
    torch.testing.assert_close(apply(second.compose(first), x), apply(second, apply(first, x)))


def test_composition_is_associative_and_has_the_identity_as_its_unit():
    a, b, c = modulation(gate=True), modulation(gate=True), modulation(gate=True)
    assert_equal_fields(a.compose(b).compose(c), a.compose(b.compose(c)))
    unit = Modulation.identity(2, 3).to(torch.float64)
    assert_equal_fields(a.compose(unit), a)
    x = torch.randn(X, dtype=torch.float64)
    torch.testing.assert_close(apply(unit.compose(a), x), apply(a, x))


def test_composition_does_not_commute():
    a, b = modulation(), modulation()
    assert not torch.allclose(a.compose(b).beta, b.compose(a).beta)


@pytest.mark.parametrize("gate", [False, True])
def test_the_inverse_restores_the_features(gate: bool):
    m, x = modulation(gate=gate), torch.randn(X, dtype=torch.float64)
    torch.testing.assert_close(apply(m.inverse(), apply(m, x)), x)
    torch.testing.assert_close(apply(m.inverse().compose(m), x), x)
    torch.testing.assert_close(apply(m.compose(m.inverse()), x), x)


@pytest.mark.parametrize("name", ["gamma", "gate"])
def test_a_closed_channel_has_no_inverse(name: str):
    m = modulation(gate=True)
    with pytest.raises(ValueError, match=f"expected a {name} without zeros, got 6 among 6"):
        m.replace(**{name: torch.zeros(2, 3)}).inverse()


def test_zero_shot_arithmetic_acts_on_the_final_values():
    a, b, c = modulation(), modulation(), modulation()
    moved = a + (b - c)
    torch.testing.assert_close(moved.gamma, a.gamma + b.gamma - c.gamma)
    torch.testing.assert_close(moved.beta, a.beta + b.beta - c.beta)
    assert_equal_fields(moved, (a - c) + b)


def test_an_affine_combination_is_the_same_on_gamma_and_on_its_offset():
    a, b = modulation(), modulation()
    mixed = 0.25 * a + b * 0.75
    offset = 0.25 * (a.gamma - 1) + 0.75 * (b.gamma - 1)
    torch.testing.assert_close(mixed.gamma, 1 + offset)


def test_interpolation_starts_at_one_and_ends_at_the_other():
    a, b = modulation(gate=True), modulation(gate=True)
    assert_equal_fields(a.interpolate(b, 0.0), a)
    assert_equal_fields(a.interpolate(b, 1.0), b)
    assert_equal_fields(a.interpolate(b, 0.25), b.interpolate(a, 0.75))


def test_a_column_of_weights_gives_every_step_between_two():
    a, b = modulation(3), modulation(3)
    steps = a.interpolate(b, torch.linspace(0, 1, 5, dtype=torch.float64)[:, None])
    assert steps.gamma.shape == (5, 3)
    assert_equal_fields(steps[0], a)
    assert_equal_fields(steps[4], b)


def test_arithmetic_wants_a_gate_on_both_sides_or_on_none():
    with pytest.raises(
        ValueError, match="both sides with a gate or both without, got gamma, beta, gate and gamma, beta"
    ):
        modulation(gate=True) + modulation()


@pytest.mark.plain
def test_the_product_of_two_modulations_is_refused():
    with pytest.raises(ValueError, match=r"use second\.compose\(first\)"):
        modulation() * modulation()


def test_rows_of_the_batch_are_picked_from_every_field():
    m = modulation(5, 3, gate=True)
    for rows in (3, slice(1, 4), [4, 0], torch.tensor([2, 2, 1])):
        picked = m[rows]
        assert torch.equal(picked.gamma, m.gamma[rows])
        assert torch.equal(picked.beta, m.beta[rows])
        assert picked.gate is not None
        assert torch.equal(picked.gate, m.gate[rows])


SHARED_FIELDS = {
    "gamma of all": ((3,), (5, 3), None),
    "gamma of one row": ((1, 3), (5, 3), None),
    "gate of all": ((5, 3), (5, 3), (3,)),
    "beta of all steps": ((5, 7, 3), (5, 3), (3,)),
}


@pytest.mark.parametrize("shapes", SHARED_FIELDS.values(), ids=SHARED_FIELDS)
@pytest.mark.parametrize("rows", [3, slice(1, 4), [4, 0]], ids=str)
def test_rows_of_what_samples_share_are_what_they_share(shapes: tuple, rows: object):
    m = Modulation(*(None if shape is None else torch.randn(shape, dtype=torch.float64) for shape in shapes))
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    y = F.film(x, m.gamma, m.beta, dim=-1, gate=m.gate)
    own = [rows] if isinstance(rows, int) else rows
    picked = m[own]
    torch.testing.assert_close(F.film(x[own], picked.gamma, picked.beta, dim=-1, gate=picked.gate), y[own])
    assert torch.equal(m[rows].gamma, picked.gamma.reshape(m[rows].gamma.shape))
    assert m[rows].beta.shape == m[rows].gamma.shape


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_field_without_steps_counts_for_every_step(steps: int, swapped: bool):
    long, short = modulation(2, steps, 3, gate=True), modulation(2, 3, gate=True)
    first, second = (long, short) if swapped else (short, long)
    mixed = Modulation(long.gamma + 1, short.beta)
    x = torch.randn(2, steps, 3, dtype=torch.float64)

    def on_steps(m: Modulation, x: torch.Tensor) -> torch.Tensor:
        return F.film(x, m.gamma, m.beta, dim=-1, gate=m.gate)

    both = on_steps(second, on_steps(first, x))
    torch.testing.assert_close(on_steps(second.compose(first), x), both)
    torch.testing.assert_close(on_steps(mixed.inverse(), on_steps(mixed, x)), x)
    torch.testing.assert_close(on_steps(first.interpolate(second, 1.0), x), on_steps(second, x))
    plain = [m.replace(gate=None) for m in (first, second)]
    torch.testing.assert_close(on_steps(plain[0] + plain[1], x), sum(on_steps(m, x) for m in plain))
    weight = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
    torch.testing.assert_close(on_steps(mixed * weight, x), on_steps(mixed, x) * weight)
    torch.testing.assert_close((first - second).gate, -(second - first).gate)


def test_a_modulation_without_a_batch_has_no_rows():
    with pytest.raises(ValueError, match=r"expected a batch axis .* got gamma \(3,\) and beta \(3,\)"):
        modulation(3)[0]


def test_a_modulation_does_not_unpack_into_rows():
    with pytest.raises(TypeError, match="not iterable"):
        _gamma, _beta = modulation()


def test_replace_changes_the_named_field_alone():
    m = modulation(gate=True)
    closed = m.replace(gamma=0 * m.gamma)
    assert not closed.gamma.any()
    assert closed.beta is m.beta
    assert closed.gate is m.gate


def test_fields_cannot_be_reassigned():
    with pytest.raises(AttributeError, match="cannot assign to field"):
        modulation().gamma = torch.ones(2, 3)


def test_detach_cuts_every_field_off_the_graph():
    fields = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    m = Modulation(*fields).detach()
    assert not any(field.requires_grad for field in (m.gamma, m.beta, m.gate))
    assert torch.equal(m.gamma, fields[0])


def test_to_converts_every_field():
    m = modulation(gate=True).to(torch.float32)
    assert m.gamma.dtype == m.beta.dtype == m.gate.dtype == torch.float32


@pytest.mark.parametrize("gate", [True, False])
def test_a_modulation_is_a_pytree_and_pickles(gate: bool):
    m = modulation(gate=gate)
    values, spec = pytree.tree_flatten(m)
    assert_equal_fields(pytree.tree_unflatten(values, spec), m)
    assert_equal_fields(pickle.loads(pickle.dumps(m)), m)


@pytest.mark.plain
def test_vmap_goes_over_the_rows_of_a_modulation():
    m, x = modulation(5, 3), torch.randn(3, 7, dtype=torch.float64)
    y = torch.vmap(lambda row: F.film(x, row.gamma, row.beta, dim=0))(m)
    torch.testing.assert_close(y, F.film(x.expand(5, 3, 7), m.gamma, m.beta))


@pytest.mark.plain
def test_a_compiled_function_takes_makes_and_returns_modulations():
    def moved(a: Modulation, b: Modulation, c: Modulation) -> Modulation:
        return a + (b - c) * 0.5

    a, b, c = modulation(), modulation(), modulation()
    assert_equal_fields(torch.compile(moved, fullgraph=True, backend="eager")(a, b, c), moved(a, b, c))


def test_a_batch_of_gates_alone_has_rows_too():
    m = Modulation(torch.rand(3), torch.rand(3), gate=torch.rand(2, 3))
    picked = m[1]
    assert torch.equal(picked.gamma, m.gamma)
    assert torch.equal(picked.gate, m.gate[1])


@pytest.mark.parametrize("field", ["gamma", "beta", "gate"])
def test_a_number_takes_the_place_of_a_field_for_all_samples_and_channels(field: str):
    m = modulation()
    changed = m.replace(**{field: 2})
    assert torch.equal(getattr(changed, field), torch.full_like(m.gamma, 2.0))
    assert m.replace(gate=None).gate is None


def test_one_axis_of_weights_is_of_channels_also_where_there_are_as_many_samples():
    rows, single, three = modulation(3, 3), modulation(3), torch.rand(3, dtype=torch.float64)
    torch.testing.assert_close((rows * three).gamma, rows.gamma * three[None])
    torch.testing.assert_close(
        single.interpolate(rows, three).beta[2], (rows.beta[2] - single.beta) * three + single.beta
    )
    assert_equal_fields((rows * three[:, None])[1], rows[1] * three[1])
    assert (modulation(1, 1) * three[:1]).gamma.shape == (1, 1)


@pytest.mark.parametrize("shape", [(2,), (5, 2)], ids=str)
def test_weights_that_fit_nothing_are_refused_with_what_would(shape):
    with pytest.raises(
        ValueError, match=r"gamma \(2, 3\) from the right, got \(.*2,?\).\nOne for each sample is \[2, 1\], "
    ):
        modulation(2, 3) * torch.rand(shape)
    whole, steps = modulation(3), Modulation(torch.rand(3), torch.rand(2, 4, 3))
    with pytest.raises(
        ValueError,
        match=r"fit beta \(2, 4, 3\) [\s\S]*is \[2, 1, 1\], one for each along the last axis \[3\]",
    ):
        steps * torch.rand(2, 1)
    assert (steps * torch.rand(2, 1, 1)).beta.shape == (2, 4, 3)
    assert (whole * torch.rand(2, 1)).gamma.shape == (2, 3)
