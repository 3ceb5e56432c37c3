"""What holds for a whole network with FiLM holds with the fusions whose weights travel in their values."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net, conditioned, inputs
from torchfilm.fusion import FUSIONS

pytestmark = [pytest.mark.plain, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")]
over_fusions = pytest.mark.parametrize("fusion", ["concat", "low_rank", "cross_attention"])


@over_fusions
def test_it_compiles_into_one_graph(fusion: str):
    torch._dynamo.reset()
    model, (x, z) = conditioned(fusion=fusion), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for condition in (z, -z):
        torch.testing.assert_close(
            compiled(x, cond=condition), model(x, cond=condition), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_in_a_network_in_double_precision_its_gradients_are_those_of_finite_differences(fusion: str):
    model, (x, z) = tf.condition(Net().double(), SITES, tf.Vector(13), fusion=fusion).eval(), inputs()
    randomise(model.film)
    assert all(p.dtype == torch.float64 for p in model.film.parameters())
    torch.autograd.gradcheck(lambda z: model(x.double(), cond=z), z.double().requires_grad_())


@pytest.mark.parametrize(
    ("sites", "convert", "expected"),
    [
        ("stem|head", lambda net: net.bfloat16(), torch.float32),
        ("stem|head", lambda net: net.head.double(), torch.float64),
        ("stem", lambda net: net.head.double(), torch.float32),
        ("idle", lambda net: net.double(), torch.float64),
    ],
    ids=["half", "one of the sites", "none of the sites", "sites without weights"],
)
def test_its_generator_is_as_precise_as_the_most_precise_of_its_sites(sites, convert, expected):
    net = Net()
    net.idle = nn.BatchNorm2d(3, affine=False)
    convert(net)
    tf.condition(net, sites, tf.Classes(4, 13))
    assert {p.dtype for p in net.film.generator.parameters()} == {expected}
    assert net.film.cond.table.weight.dtype == torch.float32


def test_a_network_in_double_precision_may_be_made_of_fake_tensors():
    with FakeTensorMode():
        net = tf.condition(nn.Sequential(nn.Linear(3, 5, dtype=torch.float64)), "0", tf.Vector(7))
    assert net.film.generator.head.weight.dtype == torch.float64


def test_what_is_given_keeps_its_precision():
    class Own:
        def build(self, cond_dim, sites):
            return nn.Linear(cond_dim, sum(sites.values()))

        def apply(self, x, value, dim, site):
            return x

    for how in ({"fusion": Own()}, {"generator": tf.Generator}):
        net = tf.condition(Net().double(), SITES, tf.Vector(13), **how)
        assert all(p.dtype == torch.float32 for p in net.film.parameters())


@over_fusions
def test_exported_it_takes_other_batches_and_conditions(fusion: str):
    model, (x, z), batch = conditioned(fusion=fusion), inputs(), torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "cond": {0: batch}}
    program = torch.export.export(model, (x,), {"cond": z}, strict=False, dynamic_shapes=shapes)
    other, condition = inputs(5)
    expected = model(other, cond=condition)
    torch.testing.assert_close(program.module()(other, cond=condition), expected, rtol=1e-4, atol=1e-4)


@over_fusions
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_runtime_hears_a_second_condition(fusion: str, tmp_path: Path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 5, 1)
    model, (x, z) = tf.condition(nn.Sequential(*layers), "0", tf.Vector(13), fusion=fusion), inputs()
    randomise(model.film)
    names = {"input_names": ["x", "cond"], "dynamo": True, "verbose": False}
    torch.onnx.export(model.eval(), (x,), kwargs={"cond": z}, **names).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for condition in (z, -z):
        (y,) = session.run(None, {"x": x.numpy(), "cond": condition.numpy()})
        numpy.testing.assert_allclose(y, model(x, cond=condition).detach(), rtol=1e-4, atol=1e-4)


class Checkpointed(Net):
    """The network with its blocks under activation checkpointing."""

    options: dict | None = None

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.options is None else checkpoint(block, x, **self.options)
        return self.head(x.mean(dim=(2, 3)))


@over_fusions
def test_checkpointed_it_has_the_same_gradients(fusion: str):
    model, (x, z) = tf.condition(Checkpointed(), SITES, tf.Vector(13), fusion=fusion).eval(), inputs()
    randomise(model.film)
    found = []
    for options in (None, {"use_reentrant": False, "context_fn": tf.checkpoint_context(model)}):
        model.options = options
        model.zero_grad()
        model(x, cond=z).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
