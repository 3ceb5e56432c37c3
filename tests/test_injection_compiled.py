"""A conditioned network compiled, exported, in ONNX and quantised."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net, conditioned, inputs

# Dynamo reads `.grad` of every tensor that enters a compiled region, and torch warns where it is no leaf.
pytestmark = [pytest.mark.plain, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def test_the_whole_network_compiles_into_one_graph_for_all_conditions():
    model, (x, z), counter = conditioned(), inputs(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for condition in (z, -z, z + 1):
        torch.testing.assert_close(compiled(x, cond=condition), model(x, cond=condition))
    assert counter.frame_count == 1


def test_twelve_blocks_compile_into_one_graph():
    model, (x, z), counter = tf.condition(Net(12), SITES, tf.Vector(13)), inputs(), CompileCounter()
    randomise(model.film)
    regional = copy.deepcopy(model.eval())
    for block in regional.blocks:
        block.compile(fullgraph=True, backend=counter)
    for condition in (z, -z):
        torch.testing.assert_close(regional(x, cond=condition), model(x, cond=condition))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_blocks_compile_into_one_more_graph_for_all_sizes_of_batches(dynamic: bool | None):
    model, counter = conditioned(), CompileCounter()
    regional = copy.deepcopy(model)
    for block in regional.blocks:
        block.compile(fullgraph=True, backend=counter, dynamic=dynamic)
    for batch in range(2, 7):
        x, z = inputs(batch)
        torch.testing.assert_close(regional(x, cond=z), model(x, cond=z))
    assert counter.frame_count == (1 if dynamic else 2)


def test_a_root_of_torchs_own_compiles_into_one_more_graph_for_all_sizes_of_batches():
    layer, counter = nn.TransformerEncoderLayer(12, 2, 5, batch_first=True), CompileCounter()
    model = tf.condition(nn.TransformerEncoder(layer, 2), r".*norm2", tf.Vector(13)).eval()
    randomise(model.film)
    compiled = torch.compile(model, backend=counter)
    for batch in range(2, 5):
        x, z = torch.randn(batch, 7, 12), torch.randn(batch, 13)
        with tf.using(model, cond=z):
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 2


def test_a_site_is_a_leaf_to_fx_and_hears_each_condition():
    model, (x, z) = conditioned(), inputs()
    traced, features = torch.fx.symbolic_trace(model.blocks[0]), model.stem(x)
    for condition in (z, -z):
        with tf.using(model, cond=condition):
            assert torch.equal(traced(features), model.blocks[0](features))


@pytest.mark.parametrize("regional", [False, True])
def test_a_network_that_was_compiled_before_listens_afterwards(regional: bool):
    model, (x, z), counter = Net().eval(), inputs(), CompileCounter()
    if regional:
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
    run = model if regional else torch.compile(model, fullgraph=True, backend=counter)
    plain = run(x)
    tf.condition(model, SITES, tf.Vector(13))
    torch.testing.assert_close(run(x, cond=z), plain)
    randomise(model.film)
    with torch.compiler.set_stance("force_eager"):
        expected = model(x, cond=z)
    torch.testing.assert_close(run(x, cond=z), expected)
    assert not torch.allclose(expected, plain)
    tf.remove(model)
    torch.testing.assert_close(run(x), plain)


def test_contexts_and_transforms_act_on_a_compiled_network():
    model, (x, z), counter = conditioned(), inputs(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    values = tf.conditioning(model).modulations(z)
    expected = model(x, cond=z)
    with tf.unconditioned(model):
        torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad(), tf.using(compiled, cond=z):
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x, modulation=values), expected)

    def closed(values):
        return {name: m * 0 for name, m in values.items()}

    with tf.conditioning(model).transformed(closed):
        torch.testing.assert_close(compiled(x, cond=z), model(x, cond=z))
    torch.testing.assert_close(compiled(x, cond=z), expected)
    with pytest.raises(ValueError, match="expected an active condition"):
        torch.compile(model, backend=counter)(x)


def test_each_class_of_networks_has_as_many_graphs_as_torch_allows_one():
    x, z, counter = torch.randn(2, 3), torch.randn(2, 13), CompileCounter()
    for i in range(torch._dynamo.config.recompile_limit + 1):
        kind = type(f"Net{i}", (nn.Sequential,), {})
        model = tf.condition(kind(nn.Linear(3, 5 + i), nn.ReLU()), "0", tf.Vector(13))
        randomise(model.film)
        for one in (model, copy.deepcopy(model)):
            compiled = torch.compile(one, fullgraph=True, backend=counter)
            torch.testing.assert_close(compiled(x, cond=z), model(x, cond=z))
        assert counter.frame_count == i + 1  # a copy has that of the first


def test_each_class_of_sites_has_as_many_graphs_as_torch_allows_one():
    x, z, counter = torch.randn(2, 3), torch.randn(2, 13), CompileCounter()
    kinds = [type(f"Layer{i}", (nn.Linear,), {}) for i in range(torch._dynamo.config.recompile_limit + 1)]
    model = tf.condition(nn.Sequential(*[kind(3, 3) for kind in kinds]), ".*", tf.Vector(13)).eval()
    randomise(model.film)
    expected = model(x, cond=z)
    for layer in model:
        layer.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(model(x, cond=z), expected)
    assert counter.frame_count == len(kinds)


def test_a_traceback_names_the_class_of_a_network():
    model = tf.condition(Net(), SITES, tf.Vector(13))
    with pytest.raises(ValueError, match="expected an active condition") as caught:
        model(inputs()[0])
    assert "root_forward of networks.Net" in [entry.name for entry in caught.traceback]


def test_a_network_has_the_graphs_that_torch_allows_one_and_keeps_them():
    model, (x, z), counter = conditioned(), inputs(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def half(m: tf.Modulation) -> tf.Modulation:
        return m.replace(gamma=0.5 * m.gamma)

    def variants() -> Iterator[None]:
        yield compiled(x, cond=z)
        with torch.no_grad():
            yield compiled(x, cond=z)
            with tf.record(model):
                yield compiled(x, cond=z)
            with tf.edit(model, {".*": half}):
                yield compiled(x, cond=z)
                with tf.record(model):
                    yield compiled(x, cond=z)
            yield tf.sweep(model, ".*", [0, 0.5, 1], lambda: compiled(x, cond=z))
            yield compiled(x, modulation=tf.modulations(model, z))
            with tf.using(model, cond=z):
                yield compiled(x)
            with tf.folded(model, cond=z[:1]):
                yield compiled(x)
            with tf.unconditioned(model):
                yield compiled(x)

    with pytest.raises(FailOnRecompileLimitHit):
        list(variants())
    assert counter.frame_count == 8 == torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=32):
        assert len(list(variants())) == len(list(variants())) == counter.frame_count == 10


def test_two_threads_of_a_compiled_network_hear_their_own_conditions():
    model, (x, _) = conditioned(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    conditions = [torch.randn(2, 13) for _ in range(2)]
    expected = [compiled(x, cond=z).detach() for z in conditions]
    wrong: list[int] = []

    def run(i: int) -> None:
        for call in range(50):
            wrong.extend([call] * (not torch.allclose(compiled(x, cond=conditions[i]), expected[i])))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_gradients_of_a_compiled_network_are_those_of_the_plain_one():
    model, (x, z) = conditioned(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(x, cond=z).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(x, cond=z).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_inductor_computes_the_same():
    model, x, z = nn.Sequential(nn.Linear(3, 5), nn.ReLU()), torch.randn(2, 3), torch.randn(2, 13)
    randomise(tf.condition(model, "0", tf.Vector(13)).film)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x, cond=z), model(x, cond=z))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_takes_other_batches_and_conditions(strict: bool):
    model, (x, z), batch = conditioned(), inputs(), torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "cond": {0: batch}}
    with warnings.catch_warnings():
        # The slots are filled and emptied again while the strict exporter watches, which it says.
        warnings.filterwarnings("ignore", "While (compiling|exporting), we found certain side effects")
        program = torch.export.export(model, (x,), {"cond": z}, strict=strict, dynamic_shapes=shapes)
    other, condition = inputs(5)
    module = program.module(check_guards=not strict)  # torch 2.9 fails to check *args of the strict exporter
    torch.testing.assert_close(
        module(other, cond=condition), model(other, cond=condition), rtol=1e-4, atol=1e-4
    )
    film = tf.conditioning(model)
    assert film.local.values is None
    assert all(slot.value is None for slot in film.slots.values())


class Step(nn.Module):
    """Calls a part of a conditioned network, as a step of a policy does its encoder."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        with tf.using(self.part, cond=z):
            return self.part.features(x)


@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects")
@pytest.mark.parametrize("way", ["compiled", "strict", "not strict"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_block_of_using_is_traced_with_the_step_that_holds_it(way: str, grad: bool):
    step, (x, z) = Step(conditioned()), inputs()
    with torch.set_grad_enabled(grad):
        if way == "compiled":
            traced = torch.compile(step, fullgraph=True, backend="eager")
        else:
            traced = torch.export.export(step, (x, z), strict=way == "strict").module()
        for condition in (z, -z):
            torch.testing.assert_close(traced(x, condition), step(x, condition), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects")
@pytest.mark.parametrize("way", ["compiled", "whole", "exported", "strict"])
def test_a_loop_in_a_graph_hears_what_it_writes_into_its_condition(way: str):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conditioned()

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
            z, found = z.clone(), []
            with tf.using(self.net, cond=z):
                for _ in range(3):
                    found.append(self.net(x))
                    z += 1
            return found

    loop, (x, z) = Loop().eval(), inputs()
    if way in ("compiled", "whole"):
        called = torch.compile(loop, backend="eager", fullgraph=way == "whole")
    else:
        called = torch.export.export(loop, (x, z), strict=way == "strict").module()
    torch.testing.assert_close(called(x, z), loop(x, z))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own, up to 2.9
@pytest.mark.parametrize("kind", ["modulations", "masked"])
def test_an_exported_network_is_read_back_without_a_word(kind: str, tmp_path: Path, capfd):
    model, (x, z) = tf.condition(Net(), SITES, tf.Maybe(tf.Vector(13))).eval(), inputs()
    randomise(model.film)
    masked = {"cond": tf.Masked(z, torch.tensor([True, False]))}
    given = masked if kind == "masked" else {"modulation": tf.modulations(model, z)}
    torch.export.save(torch.export.export(model, (x,), given), tmp_path / "model.pt2")
    capfd.readouterr()
    program = torch.export.load(tmp_path / "model.pt2")
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(program.module()(x, **given), model(x, **given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_runtime_hears_a_second_condition(tmp_path: Path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, (x, z) = conditioned(), inputs()
    program = torch.onnx.export(
        model, (x,), kwargs={"cond": z}, dynamo=True, verbose=False, input_names=["x", "cond"]
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for condition in (z, -z):
        (y,) = session.run(None, {"x": x.numpy(), "cond": condition.numpy()})
        numpy.testing.assert_allclose(y, model(x, cond=condition).detach(), rtol=1e-4, atol=1e-5)


FRESH = """
import pickle, sys, torch
x, z, expected, model = pickle.load(open(sys.argv[1], "rb"))
assert torch.equal(model(x, cond=z), expected)
assert type(model).__name__ == "Net" and "film" in dict(model.named_children())
try:
    model(x)
except ValueError as error:
    assert "expected an active condition" in str(error)
else:
    raise AssertionError("silent")
"""


def test_a_pickle_listens_in_a_fresh_process(tmp_path: Path):
    model, (x, z) = conditioned(), inputs()
    model(x, cond=z)
    with (tmp_path / "model.pickle").open("wb") as file:
        pickle.dump((x, z, model(x, cond=z), model), file)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model.pickle")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)


def test_torch_save_keeps_a_conditioned_network(tmp_path: Path):
    model, (x, z) = conditioned(), inputs()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x, cond=z), model(x, cond=z))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = tf.condition(Net(), SITES, tf.Vector(13)).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x, cond=z), model(x, cond=z))


@pytest.mark.parametrize("order", ["before", "after"])
def test_int8_weights_may_come_before_or_after(order: str):
    quantization = pytest.importorskip("torchao.quantization")
    model, x, z = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)), torch.randn(2, 32), None
    int8 = quantization.Int8WeightOnlyConfig()

    def base(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "film" not in name

    if order == "before":
        quantization.quantize_(model, int8, filter_fn=base)
    tf.condition(model, "[02]", tf.Vector(13))
    z = torch.randn(2, 13)
    randomise(model.film)
    before = model(x, cond=z)
    if order == "after":
        quantization.quantize_(model, int8, filter_fn=base)
    values = tf.conditioning(model).modulations(z)
    hidden = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    hidden = torch.relu(values["0"].gamma * hidden + values["0"].beta)
    last = torch.nn.functional.linear(hidden, model[2].weight, model[2].bias)
    torch.testing.assert_close(model(x, cond=z), values["2"].gamma * last + values["2"].beta)
    assert type(model[0].weight.data) is not torch.Tensor
    assert torch.allclose(model(x, cond=z), before, rtol=0.1, atol=1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_copies_a_network_that_still_listens():
    model, (x, z) = conditioned(), inputs()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantised.head) is not nn.Linear
    assert not torch.equal(quantised(x, cond=z), quantised(x, cond=-z))
    torch.testing.assert_close(quantised(x, cond=z), model(x, cond=z), rtol=0.1, atol=1.0)
