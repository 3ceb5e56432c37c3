"""FiLM and DenseFiLM against loops over single numbers; their gates, rows and names."""

import pytest
import torch
from torch import nn

import oracles
import torchfilm as tf
from catalogue import randomise


def arrays(layer: nn.Module) -> tuple:
    head = layer.head if isinstance(layer, tf.FiLM) else layer.film.head
    return head.weight.detach().numpy(), head.bias.detach().numpy()


def test_film_is_gamma_times_x_plus_beta_with_gamma_one_plus_the_head():
    layer = randomise(tf.FiLM(3, 7)).double()
    x, z = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 7).double()
    ((gamma, beta),) = oracles.paper_generator(z.numpy(), *arrays(layer), channels=[3])
    torch.testing.assert_close(layer(x, z), torch.from_numpy(oracles.film(x.numpy(), gamma, beta, 1)))


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3), -1), ((2, 3, 5), 1), ((2, 3, 5, 7), 1)], ids=str)
def test_a_condition_per_step_modulates_each_step_by_its_own(shape: tuple, dim: int):
    layer = randomise(tf.FiLM(3, 7, dim=dim)).double()
    x, z = torch.randn(shape).double(), torch.randn(2, 5, 7).double()
    ((gamma, beta),) = oracles.paper_generator(z.reshape(10, 7).numpy(), *arrays(layer), channels=[3])
    expected = oracles.film(x.numpy(), gamma.reshape(2, 5, 3), beta.reshape(2, 5, 3), dim)
    torch.testing.assert_close(layer(x, z), torch.from_numpy(expected))


def test_steps_and_channels_of_equal_number_are_not_confused():
    layer = randomise(tf.FiLM(5, 7)).double()
    x, z = torch.randn(2, 5, 5).double(), torch.randn(2, 5, 7).double()
    columns = [layer(x[:, :, t], z[:, t]) for t in range(5)]
    torch.testing.assert_close(layer(x, z), torch.stack(columns, dim=2))


def test_dense_film_scales_and_shifts_by_a_linear_map_of_mish():
    layer = randomise(tf.DenseFiLM(3, 7)).double()
    x, z = torch.randn(2, 5, 3).double(), torch.randn(2, 7).double()
    ((gamma, beta),) = oracles.paper_generator(oracles.mish(z.numpy()), *arrays(layer), channels=[3])
    torch.testing.assert_close(layer(x, z), torch.from_numpy(oracles.film(x.numpy(), gamma, beta, -1)))


def test_the_child_of_a_dense_film_is_called_so_that_its_hooks_run():
    layer, seen = tf.DenseFiLM(3, 7), []
    layer.film.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer(torch.randn(2, 5, 3), torch.randn(2, 7))
    assert seen == [(2, 5, 3)]


@pytest.mark.parametrize("make", [tf.DenseFiLM, tf.AdaLNZero])
def test_a_condition_in_bfloat16_is_activated_in_the_precision_of_the_parameters(make: type):
    layer, z = randomise(make(3, 7)), torch.randn(2, 7).bfloat16()
    assert torch.equal(layer.modulation(z).gamma, layer.modulation(z.float()).gamma)


def test_the_layers_keep_a_plain_layout_of_names_in_the_state_dict():
    assert set(tf.FiLM(3, 7).state_dict()) == {"head.weight", "head.bias"}
    assert set(tf.DenseFiLM(3, 7).state_dict()) == {"film.head.weight", "film.head.bias"}


def test_a_gate_scales_what_film_gives():
    layer = randomise(tf.FiLM(3, 7, gate="one")).double()
    x, z = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 7).double()
    raw = torch.from_numpy(oracles.linear(z.numpy(), *arrays(layer)))
    gamma, beta, gate = 1 + raw[:, :3], raw[:, 3:6], 1 + raw[:, 6:]
    expected = torch.from_numpy(oracles.film(x.numpy(), gamma.numpy(), beta.numpy(), 1))
    torch.testing.assert_close(layer(x, z), gate[..., None, None] * expected)
    assert layer.gate == "one"
    assert "gate='one'" in repr(layer)


def test_a_gate_of_zero_starts_closed_and_one_starts_open():
    x, z = torch.randn(2, 3, 5), torch.randn(2, 7)
    assert torch.equal(tf.FiLM(3, 7, gate="zero")(x, z), torch.zeros_like(x))
    assert torch.equal(tf.FiLM(3, 7, gate="one")(x, z), x)
    dense = tf.DenseFiLM(5, 7, gate="zero")
    assert torch.equal(dense(x, z), torch.zeros_like(x))
    assert torch.equal(tf.FiLM(3, 7, gate="zero").modulation(z).gate, torch.zeros(2, 3))


def test_a_gate_that_starts_at_zero_is_what_the_head_gives():
    gates = {start: tf.FiLM(3, 7, gate=start).modulation(torch.randn(2, 7)).gate for start in ("zero", "one")}
    assert {start: gate.grad_fn.name() for start, gate in gates.items()} == {
        "zero": "SplitBackward0",
        "one": "AddBackward0",
    }


def test_a_gate_of_a_ready_modulation_is_not_lost():
    m = tf.Modulation(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3))
    x, layer = torch.randn(2, 3, 5), tf.FiLM(3, 7)
    expected = m.gate[..., None] * layer(x, modulation=m.replace(gate=None))
    torch.testing.assert_close(layer(x, modulation=m), expected)


@pytest.mark.plain
def test_another_start_of_the_gate_is_refused():
    with pytest.raises(
        ValueError, match=r"gate expected one of \[None, 'zero', 'one'\], got 'half'[\s\S]*pretrained"
    ):
        tf.FiLM(3, 7, gate="half")


def test_each_node_of_a_graph_listens_to_its_graph():
    layer = randomise(tf.FiLM(3, 7))
    nodes, z, graph = torch.randn(5, 3), torch.randn(2, 7), torch.tensor([1, 0, 0, 1, 1])
    each = torch.stack([layer(nodes[i : i + 1], z[graph[i] : graph[i] + 1])[0] for i in range(5)])
    torch.testing.assert_close(layer(nodes, z, rows=graph), each)
    torch.testing.assert_close(layer(nodes, z, rows=graph.int()), each)
    assert torch.equal(layer(nodes, modulation=layer.modulation(z), rows=graph), layer(nodes, z, rows=graph))
    gated = randomise(tf.FiLM(3, 7, gate="one"))
    torch.testing.assert_close(gated(nodes, z, rows=graph), gated(nodes, z[graph]))


def test_nodes_in_another_order_listen_to_the_same_graphs():
    layer, order = randomise(tf.FiLM(3, 7)), torch.tensor([4, 2, 0, 1, 3])
    nodes, z, graph = torch.randn(5, 3), torch.randn(2, 7), torch.tensor([1, 0, 0, 1, 1])
    moved = layer(nodes[order], z, rows=graph[order])
    torch.testing.assert_close(moved, layer(nodes, z, rows=graph)[order])


@pytest.mark.plain
@pytest.mark.parametrize(
    "rows", [torch.tensor([0, 1]), torch.zeros(5), torch.zeros(5, 1, dtype=torch.int64)], ids=str
)
def test_rows_that_do_not_fit_are_refused(rows: torch.Tensor):
    with pytest.raises(ValueError, match=r"rows as int64 or int32 numbers, one for each of the 5 rows of x"):
        tf.FiLM(3, 7)(torch.randn(5, 3), torch.randn(2, 7), rows=rows)


def test_a_modulation_without_rows_has_none_to_pick():
    m, rows = tf.Modulation.identity(3), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a batch axis in front of the channels"):
        tf.FiLM(3, 7)(torch.randn(5, 3), modulation=m, rows=rows)


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_the_condition_does_not_have_is_refused(row: int):
    with pytest.raises(IndexError, match="out of"):
        tf.FiLM(3, 7)(torch.randn(1, 3), torch.randn(2, 7), rows=torch.tensor([row]))


def test_the_start_returns_on_request():
    layers = [tf.FiLM(3, 7, gate="zero"), tf.DenseFiLM(3, 7)]
    for layer in layers:
        randomise(layer).reset_parameters()
        assert all(not parameter.any() for parameter in layer.parameters())


@pytest.mark.plain
@pytest.mark.parametrize("shape", [(2, 5), ()], ids=str)
def test_a_condition_of_another_size_is_refused(shape: tuple):
    with pytest.raises(
        ValueError, match=r"condition: expected 7 numbers on the last axis \(cond_dim\), got shape"
    ):
        tf.FiLM(3, 7)(torch.randn(2, 3, 5), torch.randn(shape))


def test_both_halves_of_the_head_receive_gradients_at_the_identity():
    layer = tf.FiLM(3, 7)
    layer(torch.randn(2, 3, 5), torch.randn(2, 7)).square().sum().backward()
    assert layer.head.weight.grad.abs().min() > 0
    assert layer.head.bias.grad.abs().min() > 0


def test_rows_pick_gates_also_where_gamma_and_beta_are_one_for_all():
    m = tf.Modulation(torch.rand(3), torch.rand(3), gate=torch.rand(2, 3))
    x, rows = torch.randn(5, 3), torch.tensor([0, 0, 1, 1, 1])
    y = tf.FiLM(3, 7)(x, modulation=m, rows=rows)
    torch.testing.assert_close(y, m.gate[rows] * (m.gamma * x + m.beta))


LISTENING = {
    "DenseFiLM": lambda: tf.DenseFiLM(3, 13),
    "batch norm": lambda: tf.ConditionalBatchNorm1d(3, 13),
    "group norm": lambda: tf.ConditionalGroupNorm(1, 3, 13),
    "layer norm": lambda: tf.ConditionalLayerNorm(3, 13),
    "RMS norm": lambda: tf.ConditionalRMSNorm(3, 13),
}


@pytest.mark.parametrize("name", LISTENING)
def test_nodes_listen_to_their_graph_at_all_layers_and_norms(name: str):
    layer = randomise(LISTENING[name]())
    rows, x, z = torch.tensor([1, 0, 0, 1, 1]), torch.randn(5, 3), torch.randn(2, 13)
    expected = layer(x, z[rows])
    torch.testing.assert_close(layer(x, z, rows=rows), expected)
    torch.testing.assert_close(layer(x, modulation=layer.modulation(z), rows=rows), expected)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: expected rows .* of the 5 rows of x"):
        layer(x, z, rows=rows[:3])


NORMS = [tf.AdaLNZero, tf.AdaRMSNorm, tf.ConditionalLayerNorm, tf.ConditionalRMSNorm]


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_lives_where_and_as_it_is_told(kind):
    layer = kind(3, 7, elementwise_affine=True, device="meta", dtype=torch.float64)
    assert {(p.dtype, p.is_meta) for p in layer.parameters()} == {(torch.float64, True)}


@pytest.mark.plain
@pytest.mark.parametrize("steps", [12, 7])
def test_a_batch_behind_time_is_said_to_be_there(steps: int):
    layer, x, z = tf.FiLM(3, 7, dim=-1), torch.randn(steps, 4, 3), torch.randn(4, 7)
    with pytest.raises(ValueError, match=r"time comes first .*axis 1 \(4\), .* a layer condition\[None\].$"):
        layer(x, z)
    assert torch.equal(layer(x, z[None]), x)


@pytest.mark.plain
@pytest.mark.parametrize(
    "layer", [tf.FiLM(3, 7), tf.ConditionalBatchNorm1d(3, 7)], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("index", [2, -1])
def test_a_row_that_the_condition_has_not_is_named(layer: nn.Module, index: int):
    rows = torch.tensor([0, 1, index, 1])
    name = type(layer).__name__
    with pytest.raises(
        IndexError, match=rf"{name}: rows: expected an index from 0 to 1, got {index}: out of range"
    ):
        layer(torch.randn(4, 3), torch.randn(2, 7), rows=rows)
