"""The laws: what holds for every public module, over the catalogue."""

import copy
import doctest
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchfilm as tf
from catalogue import CASES, LAYERS, Case, double, randomise, refilled_by_name, refilled_by_type
from torchfilm.layers import Listening

over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_layers = pytest.mark.parametrize("case", LAYERS, ids=str)


def tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same(actual: object, expected: object) -> None:
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def rows(values: tuple[Tensor, ...], index: object) -> tuple[Tensor, ...]:
    return tuple(value[index] for value in values)


def test_every_public_module_is_in_the_catalogue():
    public = {
        name
        for name, value in vars(tf).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value is not tf.Conditioning
    }
    assert public == {case.name.split("/")[0] for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


SOURCES = sorted(Path(tf.__file__).parent.glob("*.py"))
EXAMPLES = [path.stem for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_the_docstrings_run(name: str):
    result = doctest.testmod(importlib.import_module(f"torchfilm.{name}".removesuffix(".__init__")))
    assert result.attempted > 0
    assert result.failed == 0


@over_layers
def test_a_fresh_layer_is_the_identity_to_the_bit(case: Case):
    x, z = case.inputs(2)
    assert torch.equal(case.build()(x, z), case.plain(x))


@over_layers
@pytest.mark.parametrize("refill", [refilled_by_type, refilled_by_name])
def test_the_identity_survives_the_init_hooks_of_others(case: Case, refill: Callable[[nn.Module], None]):
    x, z = case.inputs(2)
    assert torch.equal(case.build().apply(refill)(x, z), case.plain(x))


@over_layers
def test_a_trained_layer_hears_its_condition(case: Case):
    x, z = case.inputs(2)
    layer = randomise(case.build())
    assert not torch.allclose(layer(x, z), layer(x, z + 1))


@over_cases
def test_row_i_depends_on_condition_i_only(case: Case):
    module, inputs = randomise(case.build()), case.inputs(5)
    with_mask = case.name.split("/")[0] == "Tokens"
    *others, condition = inputs[:1] if with_mask else inputs
    after = inputs[1:] if with_mask else ()
    changed = condition.clone()
    changed[3] = condition[3] + 1 if condition.is_floating_point() else (condition[3] + 1) % 13
    before, now = tensors(module(*inputs)), tensors(module(*others, changed, *after))
    for one, other in zip(before, now, strict=True):
        same = (one == other).flatten(1).all(dim=1)
        assert same.tolist() == [True, True, True, False, True]


@over_cases
def test_samples_in_another_order_give_outputs_in_that_order(case: Case):
    module, inputs, order = randomise(case.build()), case.inputs(5), torch.tensor([3, 0, 4, 1, 2])
    expected = pytree.tree_map(lambda leaf: leaf[order], module(*inputs))
    assert_same(module(*rows(inputs, order)), expected)


@over_layers
def test_channels_in_another_order_give_outputs_in_that_order(case: Case):
    layer, (x, _), order = randomise(case.build()), case.inputs(2), torch.tensor([2, 0, 1])
    m = tf.Modulation(torch.randn(2, 3), torch.randn(2, 3))
    moved = m.replace(gamma=m.gamma[:, order], beta=m.beta[:, order])
    expected = layer(x, modulation=m).index_select(case.dim, order)
    assert_same(layer(x.index_select(case.dim, order), modulation=moved), expected)


@over_layers
def test_positions_in_another_order_give_outputs_in_that_order(case: Case):
    layer, (x, z), axis = randomise(case.build()), case.inputs(2), 2 if case.dim == 1 else 1
    moved = z.flip(1) if z.ndim == 3 else z
    assert_same(layer(x.flip(axis), moved), layer(x, z).flip(axis))


@over_layers
def test_a_ready_modulation_does_what_its_condition_does(case: Case):
    layer, (x, z) = randomise(case.build()), case.inputs(2)
    assert torch.equal(layer(x, modulation=layer.modulation(z)), layer(x, z))


@pytest.mark.plain
@over_layers
@pytest.mark.parametrize("given", ["neither", "both"])
def test_a_layer_takes_exactly_one_of_condition_and_modulation(case: Case, given: str):
    x, z = case.inputs(2)
    m = tf.Modulation.identity(2, 3)
    with pytest.raises(ValueError, match=f"expected a condition or a modulation, got {given}"):
        case.build()(x, z, modulation=m) if given == "both" else case.build()(x)


@over_cases
def test_gradients_are_those_of_finite_differences(case: Case):
    module, inputs = randomise(case.build().double()), double(case.inputs(2))
    wanted = [value for value in inputs if value.is_floating_point()]
    rest = [value for value in inputs if not value.is_floating_point()]
    names = [name for name, _ in module.named_parameters()]
    parameters = [parameter.detach() for parameter in module.parameters()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(names, values[len(wanted) :], strict=True))
        output = torch.func.functional_call(module, state, (*values[: len(wanted)], *rest))
        return tuple(tensor for tensor in tensors(output) if tensor.requires_grad)

    variables = [value.requires_grad_() for value in (*wanted, *parameters)]
    assert torch.autograd.gradcheck(run, variables, fast_mode=len(parameters) > 0)


@over_layers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_features_keep_their_precision_and_are_rounded_once(case: Case, dtype: torch.dtype):
    layer, x = case.build(), case.inputs(2)[0].to(dtype)
    layer = layer.double() if dtype == torch.float64 else layer
    m = tf.Modulation(1 + 0.01 * torch.randn(2, 3), torch.randn(2, 3))
    y = layer(x, modulation=m)
    first = case.plain(x).double().movedim(case.dim, -1)  # [2, ..., 3]
    each = (2, *[1] * (first.ndim - 2), 3)
    expected = m.gamma.double().view(each) * first + m.beta.double().view(each)
    torch.testing.assert_close(y, expected.movedim(-1, case.dim).to(dtype))


@over_layers
def test_autocast_leaves_gamma_and_beta_in_float32(case: Case):
    layer, (x, z) = randomise(case.build()), case.inputs(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, z)
        m = layer.modulation(z)
    assert y.dtype == x.dtype
    assert m.gamma.dtype == m.beta.dtype == torch.float32


@over_layers
def test_memory_format_is_that_of_torch(case: Case):
    x, z = case.inputs(2)
    permuted = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert randomise(case.build())(permuted, z).stride() == case.plain(permuted).stride()


@pytest.mark.plain
@over_cases
def test_compiled_in_one_graph_it_computes_the_same(case: Case):
    module, inputs = randomise(case.build()), case.inputs(2)
    torch.compiler.reset()  # classes that share a forward share its limit of recompilations
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs), module(*inputs))


@pytest.mark.plain
@over_cases
def test_exported_with_a_dynamic_batch_it_computes_the_same(case: Case):
    module, inputs, others = randomise(case.build()).eval(), case.inputs(2), case.inputs(5)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, inputs, dynamic_shapes=[{0: batch}] * len(inputs), strict=False)
    assert_same(program.module()(*others), module(*others))


@over_cases
def test_state_dict_pickle_and_deepcopy_carry_everything(case: Case):
    module, inputs = randomise(case.build()).eval(), case.inputs(2)
    expected = module(*inputs)
    loaded = case.build().eval()
    loaded.load_state_dict(module.state_dict())
    assert_same(loaded(*inputs), expected)
    assert_same(copy.deepcopy(module)(*inputs), expected)
    assert_same(pickle.loads(pickle.dumps(module))(*inputs), expected)


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.build(), Listening)], ids=str)
def test_a_layer_that_was_trained_returns_to_its_start(case: Case):
    layer = case.build()
    layer(*case.inputs(2))
    randomise(layer).reset_parameters()
    assert_same(layer.state_dict(), case.build().state_dict())


@over_cases
def test_a_module_on_the_meta_device_materialises_with_its_start(case: Case):
    with torch.device("meta"):
        module = case.build()
    module.to_empty(device="cpu")
    torch.manual_seed(1)
    for part in module.modules():
        if list(part.parameters(recurse=False)) or list(part.buffers(recurse=False)):
            part.reset_parameters()
    torch.manual_seed(1)
    fresh = case.build()
    assert_same(module.eval()(*(inputs := case.inputs(2))), fresh.eval()(*inputs))


@over_cases
def test_repr_names_the_module(case: Case):
    assert case.name.split("/")[0] in repr(case.build())
