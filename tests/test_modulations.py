"""The modulations of all sites as one value: arithmetic, a long table, presets on disk."""

import copy
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

import torchfilm as tf
from catalogue import randomise
from torchfilm.inspection import record
from torchfilm.modulations import Modulations, load_modulations, modulations, save_modulations
from torchfilm.version import from_entries

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def network(sites: str = "first|second") -> nn.Module:
    layers = OrderedDict(first=nn.Linear(3, 5), second=nn.Linear(5, 7))
    return randomise(tf.condition(nn.Sequential(layers), sites, tf.Vector(11)))


def z(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 11)


def equal(a: tf.Modulation, b: tf.Modulation) -> bool:
    return torch.equal(a.gamma, b.gamma) and torch.equal(a.beta, b.beta)


def test_arithmetic_acts_site_by_site():
    model = network()
    a, b, c = (modulations(model, z()) for _ in range(3))
    total = a + (b - c) * 0.5
    for name in a:
        assert equal(total[name], a[name] + (b[name] - c[name]) * 0.5)
    assert equal((2.0 * a)["first"], a["first"] * 2)


def test_interpolation_goes_from_one_to_the_other_in_steps():
    model = network()
    a, b = modulations(model, z(1)), modulations(model, z(1))
    path = a.interpolate(b, torch.linspace(0, 1, 5)[:, None])
    assert path["second"].gamma.shape == (5, 7)
    torch.testing.assert_close(path["second"].gamma[0], a["second"].gamma[0])
    torch.testing.assert_close(path["second"].beta[4], b["second"].beta[0])
    assert model(X[:1].expand(5, -1), modulation=path).shape == (5, 7)


def test_a_swap_takes_the_matching_sites_of_the_other_and_rows_change_places():
    model = network()
    a, b = modulations(model, z()), modulations(model, z())
    mixed = a.swap(b, "sec.*")
    assert mixed["first"] is a["first"]
    assert mixed["second"] is b["second"]
    assert torch.equal(a.rows([1, 0])["first"].gamma, a["first"].gamma[[1, 0]])


def test_joined_and_copied_modulations_are_modulations():
    a, b = (Modulations({name: tf.Modulation.identity(2, 3)}) for name in "ab")
    both = a | b
    assert (type(both), type(both.copy())) == (Modulations, Modulations)
    assert list(both) == list(both.copy()) == ["a", "b"]
    assert both["b"] is b["b"]


def test_a_swap_with_something_without_the_site_is_refused():
    a = Modulations({"here": tf.Modulation.identity(2, 3)})
    with pytest.raises(ValueError, match=r"of the other: expected one of 1 names, got 'here'.\n.*'there'"):
        a.swap(Modulations({"there": tf.Modulation.identity(2, 3)}), "here")


def test_sites_that_are_on_one_side_only_are_refused():
    a = Modulations({"here": tf.Modulation.identity(2, 3)})
    with pytest.raises(ValueError, match=r"same sites on both sides, got \['here', 'there'\] on one"):
        a + Modulations({"there": tf.Modulation.identity(2, 3)})


def test_a_frame_has_a_line_for_each_site_row_and_channel():
    m = Modulations(
        {
            "a": tf.Modulation(torch.arange(6.0).reshape(2, 3), torch.zeros(3)),
            "b": tf.Modulation(torch.rand(2, 5, 7), torch.rand(2, 5, 7), torch.rand(2, 1, 7)),
        }
    )
    frame = m.frame()
    assert list(frame) == ["site", "row", "step", "channel", "gamma", "beta", "gate"]
    assert {len(column) for column in frame.values()} == {6 + 70}
    line = np.flatnonzero((frame["site"] == "a") & (frame["row"] == 1) & (frame["channel"] == 2)).item()
    assert frame["gamma"][line] == 5
    assert np.isnan(frame["gate"][line])
    line = np.flatnonzero(
        (frame["site"] == "b") & (frame["row"] == 1) & (frame["step"] == 4) & (frame["channel"] == 6)
    )
    assert frame["beta"][line.item()] == m["b"].beta[1, 4, 6].item()
    assert frame["gate"][line.item()] == m["b"].gate[1, 0, 6].item()


def test_a_frame_is_no_larger_for_a_long_name():
    sizes = [
        sum(column.nbytes for column in Modulations({name: tf.Modulation.identity(2, 3)}).frame().values())
        for name in ("a", "model.layers.31.post_attention_layernorm")
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("steps", [2, 5])
def test_in_a_frame_a_field_without_steps_is_that_of_its_sample(steps: int):
    m = tf.Modulation(torch.rand(2, steps, 3), torch.rand(2, 3))
    frame = Modulations({"a": m}).frame()
    assert frame["beta"].reshape(2, steps, 3).tolist() == m.beta[:, None].expand(2, steps, 3).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_frame_has_the_numbers_of_any_precision_with_a_graph_or_without(dtype: torch.dtype):
    gamma = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    frame = Modulations({"a": tf.Modulation(gamma, torch.zeros(2, 3, dtype=dtype))}).frame()
    assert frame["gamma"].tolist() == gamma.flatten().tolist()
    assert len(modulations(network(), z()).frame()["gamma"]) == 2 * (5 + 7)


def test_a_preset_is_read_as_it_was_written(tmp_path):
    model = network()
    a = modulations(model, z())
    a["second"] = a["second"].replace(gate=torch.randn(2, 7))
    path = a.save(tmp_path / "new" / "calm.safetensors")
    back = load_modulations(path)
    assert list(back) == list(a)
    for name, m in a.items():
        torch.testing.assert_close(vars(back[name]), vars(m.detach()), rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["calm.safetensors"]
    with record(model) as rec:
        y = model(X, cond=z())
    torch.testing.assert_close(model(X, modulation=load_modulations(rec.save(path))), y)
    assert load_modulations(path, device="meta")["first"].beta.device.type == "meta"
    with pytest.raises(RuntimeError, match="device string: nowhere"):
        load_modulations(path, device="nowhere")


def test_a_preset_says_its_format_and_version_and_one_without_is_read(tmp_path):
    a, path = modulations(network(), z()), tmp_path / "a.safetensors"
    with safe_open(a.save(path), "pt") as file:
        about = from_entries(file.metadata())
    assert about["torchfilm"] == tf.__version__
    tensors = load_file(path)
    save_file(tensors, path, about | {"format_number": "2", "torchfilm": "9.8"})
    with pytest.raises(
        ValueError, match=r"expected format 1, which torchfilm 0.* got '2' .* torchfilm 9.8 wrote"
    ):
        load_modulations(path)
    save_file(tensors, path, {key: about[key] for key in ("format", "sites")})
    assert equal(load_modulations(path)["second"], a["second"])


def test_the_same_preset_is_the_same_file(tmp_path):
    a = modulations(network(), z())
    assert len({a.save(tmp_path / "a").read_bytes() for _ in range(12)}) == 1  # no order of entries by chance


def test_they_are_shown_by_names_and_shapes():
    plain, gated = tf.Modulation.identity(2, 3), tf.Modulation(*[torch.ones(5)] * 3)
    assert repr(Modulations({"a": plain, "bc": gated})) == (
        "site  gamma   beta    gate\na     (2, 3)  (2, 3)\nbc    (5,)    (5,)    (5,)"
    )
    assert str(Modulations({"a": plain})) == "site  gamma   beta\na     (2, 3)  (2, 3)"
    stands_in = Modulations()
    stands_in.update({"a": 5})  # type: ignore[dict-item]
    assert repr(stands_in).splitlines()[1].split() == ["a", "5", "5"]


def test_a_preset_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: expected a file, or none yet, got .*, a folder"):
        Modulations({"a": tf.Modulation.identity(2, 3)}).save(tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_preset_stays_when_its_file_is_overwritten(tmp_path):
    path, large = tmp_path / "a.safetensors", tf.Modulation.identity(2, 3000)
    loaded = load_modulations(Modulations({"a": large}).save(path))
    path.write_bytes(Modulations({"a": large * 2}).save(tmp_path / "b.safetensors").read_bytes())  # in place
    assert equal(loaded["a"], large)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("sites", "fields", "said"),
    [
        (None, ("a.gamma", "a.beta"), r"got KeyError\('sites'\)"),
        ('["a"', ("a.gamma", "a.beta"), "got JSONDecodeError"),
        ("[" * 100_000, ("a.gamma", "a.beta"), "got RecursionError"),
        ("3", ("a.gamma", "a.beta"), "got TypeError"),
        ('["a"]', ("a.gamma",), "got TypeError.*'beta'"),
        ('["a", "b"]', ("a.gamma", "a.beta"), "got TypeError.*'gamma' and 'beta'"),
        ('["a"]', ("a.gamma", "a.beta", "b.gamma"), r"the fields of the sites .*got \['b.gamma'\] beside"),
    ],
)
def test_a_damaged_preset_is_named(sites, fields, said, tmp_path):
    path = tmp_path / "preset"
    about = {"format": "torchfilm.modulations"} | ({} if sites is None else {"sites": sites})
    save_file({field: torch.ones(2, 3) for field in fields}, path, about)
    with pytest.raises(ValueError, match=said) as caught:
        load_modulations(path)
    assert str(path) in str(caught.value)


@pytest.mark.plain
def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="expected a file of modulations"):
        load_modulations(tmp_path / "w.safetensors")
    (tmp_path / "words").write_text("not numbers", encoding="utf-8")
    with pytest.raises(ValueError, match=r"got .*words, no safetensors: "):
        load_modulations(tmp_path / "words")
    with pytest.raises(ValueError, match="at least one site, got none"):
        save_modulations({}, tmp_path / "none.safetensors")
    presets = {name: modulations(network("first"), z()) for name in ("red", "green")}
    with pytest.raises(ValueError, match=r"several presets: \['red', 'green'\]\.\nOne file per preset"):
        save_modulations(presets, tmp_path / "presets.safetensors")
    assert not (tmp_path / "presets.safetensors").exists()


@pytest.mark.plain
def test_a_table_of_no_rows_has_none():
    frame = Modulations({"a": tf.Modulation(torch.zeros(0, 3), torch.zeros(0, 3))}).frame()
    assert {len(column) for column in frame.values()} == {0}


@pytest.mark.plain
def test_a_table_of_nothing_is_refused():
    with record(network()) as rec:
        pass
    with pytest.raises(ValueError, match=r"frame: expected at least one site, got none.\nRecord a call"):
        rec.frame()


def test_the_mean_is_one_row_for_any_batch():
    a = tf.Modulations(
        {
            "here": tf.Modulation(torch.randn(5, 3), torch.randn(3)),
            "there": tf.Modulation(*torch.randn(3, 5, 7)),
        }
    )
    mean = a.mean()
    for name, m in a.items():
        torch.testing.assert_close(mean[name].gamma, sum(m.gamma[i] for i in range(5))[None] / 5)
    assert mean["there"].gate.shape == (1, 7)
    torch.testing.assert_close(mean["here"].beta, a["here"].beta[None])
    of_any = tf.Modulations({"here": tf.Modulation(torch.randn(3), torch.randn(3))})
    assert equal(of_any.mean()["here"], of_any["here"])


@pytest.mark.plain
@torch.no_grad()
def test_modulations_are_a_pytree_and_survive_copies():
    model = network()
    a, b, c = (modulations(model, z()) for _ in range(3))
    stacked = pytree.tree_map(lambda *fields: torch.stack(fields), a, b, c)
    assert type(stacked) is Modulations
    found = torch.vmap(lambda values: model(X, modulation=values))(stacked)
    torch.testing.assert_close(found, torch.stack([model(X, modulation=one) for one in (a, b, c)]))
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(a)[0]]
    assert paths == [f"['{site}'].{field}" for site in ("first", "second") for field in ("gamma", "beta")]
    for twin in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert type(twin) is Modulations
        assert list(twin) == list(a)
        assert all(equal(twin[name], a[name]) for name in a)


def test_an_exported_program_that_is_given_modulations_is_saved(tmp_path):
    net = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7)).eval()
    with torch.no_grad():
        x, given = torch.randn(2, 3), modulations(randomise(net), torch.randn(2, 7))
    program = torch.export.export(net, (x,), {"modulation": given})
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(loaded(x, modulation=given), net(x, modulation=given))


def test_they_are_cut_off_moved_and_copied_as_one():
    a = modulations(network(), z())
    assert a["first"].gamma.requires_grad
    moved = a.detach().to(torch.float64)
    assert type(moved) is Modulations
    assert all(m.gamma.dtype == m.beta.dtype == torch.float64 for m in moved.values())
    assert equal(copy.deepcopy(moved)["first"], moved["first"])


def test_a_site_that_there_is_not_is_asked_for_with_the_nearest_names():
    a = modulations(network(), z())
    with pytest.raises(
        KeyError, match=r"Modulations: expected one of 2 names, got 'frist'.\nThe nearest are 'first'"
    ):
        a["frist"]
    assert (a.get("frist"), "frist" in a) == (None, False)


@pytest.mark.plain
def test_the_product_of_all_sites_is_refused():
    a = modulations(network(), z())
    for product in (lambda: a * a, lambda: a["first"] * a, lambda: a * dict(a)):
        with pytest.raises(ValueError, match=r"got modulations.\n.*second\.compose\(first\)"):
            product()


@pytest.mark.plain
def test_what_is_no_file_of_modulations_is_refused(tmp_path):
    a = modulations(network(), z())
    with pytest.raises(ValueError, match=r"by name, got a PosixPath.\nThey come first, then the path"):
        tf.save_modulations(tmp_path / "a.safetensors", a)
    with pytest.raises(ValueError, match=r"got the folder [\s\S]*load\(base, folder\)"):
        tf.load_modulations(tmp_path)
    a.save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"a.safetensors: expected a folder .* is a file"):
        a.save(tmp_path / "file" / "a.safetensors")
