"""The public names as users meet them: `make check` reads this file too, so each use is typed and run."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import assert_type, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchfilm as tf
from torchfilm.fusion import FUSIONS, Film, resolve, takes
from torchfilm.generator_options import Options
from torchfilm.injection import ConditionOptions
from torchfilm.mixing import CrossAttention


class Net(nn.Module):
    """A network with a method of its own, which is known where the network is conditioned too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.first(x)


def conditioned() -> Net:
    return tf.condition(Net().eval(), "first", tf.Vector(7), init="default")


def x() -> Tensor:
    return torch.rand(2, 3)


def z() -> Tensor:
    return torch.rand(2, 7)


def test_a_network_keeps_its_type_where_it_is_conditioned_saved_folded_and_freed(tmp_path: Path):
    model = assert_type(conditioned(), Net)
    assert_type(tf.unfreeze_base(tf.freeze_base(model)), Net)
    assert_type(tf.conditioning(model), tf.Conditioning)
    with tf.using(model, cond=z()):
        assert_type(model.encode(x()), Tensor)
    with tf.unconditioned(model):
        model(x())
    with tf.folded(model, cond=z()[0]) as same:
        assert_type(same, Net)
    with tf.record(model) as recording:
        model(x(), cond=z()[:1])
    with tf.folded(model, modulation=recording) as same:
        assert_type(same, Net)
    assert_type(tf.fold(model, modulation=recording)[0], Net)
    plain, report = tf.fold(model, cond=z()[0])
    assert_type(plain, Net)
    assert_type(report, tf.FoldReport)
    context = tf.checkpoint_context(model)
    checkpoint(model, x(), cond=z(), use_reentrant=False, context_fn=context)
    folder = tf.save(model, tmp_path)
    base = assert_type(tf.remove(model), Net)
    assert assert_type(tf.load(base, folder), Net) is model
    assert_type(tf.tabulate(model, z()), Net)


def test_sites_conditions_fusions_and_generators_are_typed():
    sites = tf.find(Net(), "first") + tf.find(Net(), "norm")
    assert_type(sites, tf.Sites)
    assert_type(sites[0], tf.Site)
    assert_type(sites[1:], tf.Sites)
    some = [site for site in sites if site.features > 3]
    assert [len(tf.find(Net(), chosen)) for chosen in (sites[0], sites[:1], some)] == [1, 1, 2]
    assert tf.preset("vit").dim == -1
    parts = {"time": tf.Scalars(1, 8), "kind": tf.Maybe(tf.Classes(3, 4)), "text": tf.Tokens(5)}
    several = tf.Several(parts)
    cond = {"time": torch.rand(2, 1), "kind": tf.Masked(None), "text": (torch.rand(2, 4, 5), None)}
    generators: list[tf.Generator | tf.ComposedGenerator] = [
        tf.Generator(several.dim, {"a": 3}, trunk=(8, "silu")),
        tf.ComposedGenerator((8, 9), {"a": 3}),
        tf.build_generator(several.dim, {"a": 3}),
    ]
    assert all(generator(several(cond))["a"].gamma.shape == (2, 3) for generator in generators)
    both = tf.Several({"time": tf.Scalars(1, 8), "seen": tf.Vector(7)}).eval()
    tf.SeparableTable(both, tf.Generator(both.dim, {"a": 3}), "time", torch.arange(4)[:, None])
    assert tf.GeneratorOptions(trunk=("mish",), emit=("gamma",)).head == "linear"
    assert isinstance(tf.conditioning(conditioned()).fusion, tf.Fusion)


def test_the_options_that_are_typed_are_those_that_there_are():
    typed = get_type_hints(ConditionOptions)
    assert get_type_hints(Options) == get_type_hints(tf.GeneratorOptions)
    assert typed.items() >= get_type_hints(Options).items()
    searched = {"field", "repeat", "batch"}
    assert typed.keys() == searched.union(*map(takes, FUSIONS))
    known = get_type_hints(tf.find) | get_type_hints(resolve) | get_type_hints(Film.__init__)
    known |= get_type_hints(CrossAttention.__init__)
    rest = typed.keys() - get_type_hints(Options).keys()
    assert {name: typed[name] for name in rest} == {name: known[name] for name in rest}


def test_modulations_recordings_and_edits_are_typed(tmp_path: Path):
    model = conditioned()
    a, b = tf.modulations(model, cond=z()), tf.modulations(model, z())
    assert_type(a.interpolate(b, 0.5) + 0.5 * (a - b).rows(0), tf.Modulations)
    assert_type(a["first"], tf.Modulation)
    assert_type(a | b, tf.Modulations)
    changes: dict[str, Callable[[tf.Modulation], tf.Modulation]] = {"first": lambda m: 0.5 * m}
    of_patterns = {re.compile("f.*"): b["first"]}
    with tf.edit(model, {"first": b["first"], re.compile("f.*"): lambda m: 0.5 * m}):
        model(x(), cond=z())
    with tf.edit(model, changes), tf.edit(model, of_patterns), tf.record(model) as recording:
        model(x(), cond=z())
    assert_type(recording, tf.Recording)
    assert repr(recording) == "Recording(calls=1, sites=1)"
    for values in ([0, 1], torch.linspace(0, 1, 2)):
        assert_type(tf.sweep(model, "first", values, lambda: len(model(x(), cond=z()))), list[int])
    tf.save_modulations(a, tmp_path / "a.safetensors")
    assert_type(tf.load_modulations(tmp_path / "a.safetensors"), tf.Modulations)
    assert_type(tf.summarise(recording), tf.Summary)


def test_measurements_are_typed():
    model = conditioned()
    assert_type(tf.doctor(model, x(), cond=z()), tf.Diagnosis)
    assert_type(tf.heard(model, [(x(), z())]), tf.Hearing)
    assert_type(tf.sensitivity(model, x(), cond=z()), dict[str, tf.Modulation])
    assert_type(tf.compare({"film": model}, (x(), z()), rounds=1), tf.Comparison)


def test_a_notebook_shows_the_tables_of_the_reports():
    model = conditioned()
    reports = [
        tf.doctor(model, x(), cond=z()),
        tf.heard(model, [(x(), z())]),
        tf.compare({"film": model}, (x(), z()), rounds=1),
        tf.summarise(tf.modulations(model, z())),
        tf.fold(model, cond=z()[0])[1],
        tf.find(Net(), "first"),
        tf.modulations(model, z()),
    ]
    for report in reports:
        assert repr(report) == str(report)
        assert re.search(r"^ *\w* +\w+.*\n *\w+", str(report), re.MULTILINE), report


def test_guidance_is_typed():
    other = tf.condition(Net().eval(), "first", tf.Maybe(tf.Vector(7)))
    assert tf.guide(other, x(), cond=z(), scale=2.0).shape == (2, 5)

    def called(x: Tensor, *, cond: object) -> Tensor:
        return other(x, cond=cond)

    assert_type(tf.guide(called, x(), cond=z(), scale=2.0, null=0 * z()), Tensor)


def test_layers_are_typed():
    layers = [
        tf.FiLM(3, 7),
        tf.DenseFiLM(3, 7),
        tf.ConditionalBatchNorm1d(3, 7),
        tf.ConditionalLayerNorm(3, 7),
        tf.ConditionalLayerNorm((3,), 7),
        tf.ConditionalRMSNorm([3], 7),
    ]
    assert all(layer(x(), z()).shape == (2, 3) for layer in layers)
    of_maps = [tf.ConditionalBatchNorm2d(3, 7), tf.ConditionalInstanceNorm2d(3, 7)]
    assert all(layer(torch.rand(2, 3, 5, 4), z()).shape == (2, 3, 5, 4) for layer in of_maps)
    of_steps = [tf.ConditionalInstanceNorm1d(3, 7), tf.ConditionalGroupNorm(1, 3, 7)]
    assert all(layer(torch.rand(2, 3, 5), z()).shape == (2, 3, 5) for layer in of_steps)
    of_volumes = [tf.ConditionalBatchNorm3d(3, 7), tf.ConditionalInstanceNorm3d(3, 7)]
    assert all(layer(torch.rand(2, 3, 5, 4, 2), z()).shape == (2, 3, 5, 4, 2) for layer in of_volumes)
    shifted = tf.concat_as_shift(nn.Linear(10, 5), features=3)
    assert shifted(x(), z()).shape == (2, 5)
    for norm in (tf.AdaLNZero((3,), 7), tf.AdaRMSNorm(3, 7)):
        h, gate = norm(x(), z())
        assert_type(tf.functional.gated_residual(x(), h, gate), Tensor)


def test_figures_take_tensors():
    rows, names = {"a": torch.rand(4, 3)}, list("pqrs")
    styles = tf.plot.marks(names)
    tf.plot.histograms(rows, rows)
    tf.plot.heat(rows, names, neutral=1, unit="factor")
    tf.plot.planes(rows["a"], rows["a"], names, styles, ["x", "y", "z"])
    tf.plot.embeddings({"a": torch.rand(4, 2)}, names, styles)
    assert tf.plot.by_depth(rows, rows, method="pca")["a"].shape == (4, 2)
    tf.plot.curves(torch.arange(4), {"a": torch.rand(4), "b": [1, 2, 3, 4]}, xlabel="x", ylabel="y")
    tf.plot.table(torch.rand(2, 3), ["r", "s"], list("abc"), xlabel="x", ylabel="y", unit="share")


def test_modules_beside_the_names_are_there_at_once():
    assert_type(tf.functional.film(x(), torch.ones(3), torch.zeros(3)), Tensor)
    assert isinstance(tf.native.enabled(), bool)
    assert tf.converters.read(torch.rand(2, 6), "dit/final")[0].gamma.shape == (2, 3)
    norms = {f"layers.{i}.norm": nn.Linear(7, 3 * 3) for i in range(2)}
    blocks = {(f"{i}.attention", f"{i}.mlp"): nn.Linear(7, 6 * 3) for i in range(2)}
    assert len(tf.converters.as_generator(norms, "openpi").sites) == 2
    assert len(tf.converters.as_generator(blocks, "dit").sites) == 4
    lazy = "import sys, torchfilm; assert 'matplotlib' not in sys.modules; torchfilm.plot.histograms"
    subprocess.run([sys.executable, "-c", lazy], check=True)
    with pytest.raises(AttributeError, match=r"^module 'torchfilm' has no attribute 'plto'$"):
        getattr(tf, "plto")  # noqa: B009


def test_every_name_is_used_in_this_file_and_told_by_the_package():
    used = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tf"
    }
    assert set(tf.__all__) <= used
    words = set(re.findall(r"\w+", tf.__doc__ or ""))
    assert set(tf.__all__) <= words
    everything: dict[str, object] = {}
    exec("from torchfilm import *", everything)
    assert not everything.keys() & {"sites", "layers", "heads", "norms", "plot", "functional"}


def test_help_starts_with_what_it_is_for():
    assert (tf.__doc__ or "").startswith("Condition any PyTorch network on anything")


def test_the_version_is_the_one_that_was_installed():
    assert tf.__version__ == importlib.metadata.version("torchfilm")
