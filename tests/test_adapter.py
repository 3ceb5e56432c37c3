"""Train and ship the conditioning apart from the network."""

import copy
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from networks import SITES, Net, conditioned, inputs
from torchfilm import adapter
from torchfilm.fusion import Film
from torchfilm.injection import conditioning
from torchfilm.version import from_entries

ENCODERS = {
    "vector": (lambda: tf.Vector(13), lambda: torch.randn(2, 13)),
    "classes": (lambda: tf.Classes(5, 13), lambda: torch.tensor([3, 1])),
    "scalars": (lambda: tf.Scalars(1, 4, learned=True, min_period=0.5), lambda: torch.rand(2, 1)),
    "tokens": (lambda: tf.Tokens(6, "attention", heads=3), lambda: torch.randn(2, 7, 6)),
    "several": (
        lambda: tf.Several({"t": tf.Scalars(1, 4), "c": tf.Maybe(tf.Classes(5, 4), dropout=0.5)}, "sum"),
        lambda: {"t": torch.rand(2, 1)},
    ),
    "composed": (
        lambda: tf.Several({"v": tf.Vector(13), "c": tf.Maybe(tf.Classes(5, 4), null="zero")}, "compose"),
        lambda: {"v": torch.randn(2, 13), "c": torch.tensor([3, 1])},
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_conditioning_works_on_a_fresh_base(name: str, tmp_path: Path):
    (make, draw), base, (x, _) = ENCODERS[name], Net().eval(), inputs()
    model = tf.condition(copy.deepcopy(base), SITES, make(), bound="exp", init="identity", gamma_offset=0)
    randomise(model.film)
    z = draw()
    tf.save(model, tmp_path / "adapter")
    assert tf.load(base, tmp_path / "adapter") is base
    assert torch.equal(base(x, cond=z), model(x, cond=z))
    assert base.film.sites == model.film.sites
    assert repr(base) == repr(model)


@pytest.mark.parametrize("fusion", ["film", "concat", "low_rank", "gate"])
def test_every_fusion_is_saved_by_its_name(fusion: str, tmp_path: Path):
    base, (x, z) = Net().eval(), inputs()
    model = tf.condition(copy.deepcopy(base), SITES, tf.Vector(13), fusion=fusion)
    randomise(model.film)
    tf.save(model, tmp_path)
    assert torch.equal(tf.load(base, tmp_path)(x, cond=z), model(x, cond=z))


@pytest.mark.parametrize("name", ENCODERS)
def test_what_was_saved_in_double_precision_is_loaded_so(name: str, tmp_path: Path):
    (make, draw), base, (x, _) = ENCODERS[name], Net().double().eval(), inputs()
    model = tf.condition(copy.deepcopy(base), SITES, make()).double()
    randomise(model.film)
    x, z = x.double(), draw()
    tf.save(model, tmp_path)
    assert torch.equal(tf.load(base, tmp_path)(x, cond=z), model(x, cond=z))
    assert {key: t.dtype for key, t in base.state_dict().items()} == {
        key: t.dtype for key, t in model.state_dict().items()
    }


class Own(nn.Module):
    """An encoder of one's own."""

    dim = 3

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(13, 3)

    def forward(self, z):
        return self.linear(z)


def test_encoders_and_generators_of_ones_own_are_given_again(tmp_path: Path):
    base, (x, z) = Net().eval(), inputs()
    model = tf.condition(copy.deepcopy(base), SITES, Own(), generator=tf.Generator)
    randomise(model.film)
    tf.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"expected cond=, .* an encoder of a class of its own"):
        tf.load(base, tmp_path)
    with pytest.raises(ValueError, match=r"expected fusion= or generator="):
        tf.load(base, tmp_path, cond=Own())
    with pytest.raises(ValueError, match=r"(?s)expected the tensors of this conditioning.*13.*3"):
        tf.load(base, tmp_path, cond=tf.Vector(13), generator=tf.Generator)
    assert type(base) is Net
    tf.load(base, tmp_path, cond=Own(), generator=tf.Generator)
    assert torch.equal(base(x, cond=z), model(x, cond=z))


@pytest.mark.plain
def test_another_base_is_refused(tmp_path: Path):
    model = conditioned()
    tf.save(model, tmp_path)
    pattern, other = r"has other weights than the one behind it, the first in 'stem", Net()
    with torch.device("meta"), pytest.raises(ValueError, match=pattern):
        tf.load(other, tmp_path)
    with pytest.raises(ValueError, match=r"has modules or sizes that the one behind it did not have"):
        tf.load(Net(3), tmp_path)
    other = tf.load(Net(3), tmp_path, any_base=True)
    assert list(conditioning(other).sites) == list(conditioning(model).sites)


@pytest.mark.plain
def test_a_folder_whose_base_is_described_by_the_names_of_wrappers_is_loaded(tmp_path: Path):
    base = Net().eval()
    base.stem = torch.compile(base.stem, backend="eager")
    model = tf.condition(copy.deepcopy(base), r"blocks\.0\.bn", tf.Vector(13))
    described = tf.save(model, tmp_path) / "film.json"
    description, state, weight = json.loads(described.read_text()), base.state_dict(), "stem._orig_mod.weight"
    names = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    description["base"] = {
        "names": hashlib.sha256(names.encode()).hexdigest(),
        "values": {weight: state[weight].flatten()[:8].tolist()},
    }
    described.write_text(json.dumps(description))
    tensors = tmp_path / "film.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(tensors), tensors)
    tf.load(copy.deepcopy(base), tmp_path)
    other = copy.deepcopy(base)
    nn.init.zeros_(other.stem._orig_mod.weight)
    with pytest.raises(ValueError, match=r"has other weights than the one behind it, .* 'stem\._orig_mod"):
        tf.load(other, tmp_path)


def test_a_base_in_half_precision_is_the_same_base(tmp_path: Path):
    model = conditioned()
    tf.save(model, tmp_path)
    base = Net().eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("film.")})
    tf.load(base.bfloat16(), tmp_path)


@pytest.mark.plain
def test_a_folder_without_a_conditioning_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected a folder with film.safetensors and film.json, got"):
        tf.load(Net(), tmp_path)
    model = conditioned()
    tf.save(model, tmp_path)
    description = json.loads((tmp_path / "film.json").read_text())
    (tmp_path / "film.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(
        ValueError, match=r"expected format 1, which torchfilm .* reads, got 99 .* which torchfilm \d.* wrote"
    ):
        tf.load(Net(), tmp_path)


@pytest.mark.plain
def test_both_files_say_which_version_wrote_them_and_earlier_ones_are_read(tmp_path: Path):
    model = conditioned()
    described, tensors = tf.save(model, tmp_path) / "film.json", tmp_path / "film.safetensors"
    description = json.loads(described.read_text())
    assert description.pop("torchfilm") == tf.__version__
    with safetensors.safe_open(tensors, "pt") as file:
        assert from_entries(file.metadata())["torchfilm"] == tf.__version__
    described.write_text(json.dumps(description))
    safetensors.torch.save_file(safetensors.torch.load_file(tensors), tensors)
    base = copy.deepcopy(tf.remove(model))
    tf.load(base, tmp_path)
    described.write_text(json.dumps(description | {"format": 2}))
    with pytest.raises(
        ValueError, match=r"got 2 in .*film.json, which an unknown version of torchfilm wrote"
    ):
        tf.load(tf.remove(base), tmp_path)


def test_a_device_among_the_options_as_earlier_versions_wrote_it_is_not_looked_for(tmp_path: Path):
    model = conditioned(bound="tanh:0.5")
    conditioning(model).recipe["options"]["device"] = "cuda:7"
    folder = tf.save(model, tmp_path)
    model = tf.load(tf.remove(model), folder)
    assert conditioning(model).recipe["options"] == {"bound": "tanh:0.5"}


@pytest.mark.plain
def test_the_same_conditioning_is_the_same_files(tmp_path: Path):
    model, found = conditioned(), set()
    for _ in range(12):  # entries of metadata come in an order by chance
        tf.save(model, tmp_path)
        found.add(tuple((tmp_path / name).read_bytes() for name in ("film.json", "film.safetensors")))
    assert len(found) == 1


@pytest.mark.plain
@pytest.mark.parametrize(
    ("name", "text"), [("film.json", None), ("film.json", "[1]"), ("film.safetensors", None)]
)
def test_a_file_that_is_broken_is_refused(name: str, text: str | None, tmp_path: Path):
    path = tf.save(conditioned(), str(tmp_path)) / name
    path.write_bytes(path.read_bytes()[:-3] if text is None else text.encode())
    with pytest.raises(ValueError, match=r"load: expected film.saf.* got a broken one in .*\nSave again, or"):
        tf.load(Net(), tmp_path)


def test_what_was_saved_is_built_again_also_where_the_fusion_is_named(tmp_path: Path):
    model, (x, z) = conditioned(bound="tanh:0.5"), inputs()
    base = tf.remove(copy.deepcopy(model))
    tf.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"expected fusion='film', with which .* got 'low_rank'"):
        tf.load(base, tmp_path, fusion="low_rank")
    with pytest.raises(
        ValueError, match=r"condition that .* was trained with(.|\n)*Vector\(13\)(.|\n)*Maybe"
    ):
        tf.load(base, tmp_path, cond=tf.Maybe(tf.Vector(13)))
    assert type(base) is Net
    loaded = tf.load(base, tmp_path, fusion="film", cond=tf.Vector(13))
    assert torch.equal(loaded(x, cond=z), model(x, cond=z))


@pytest.mark.plain
def test_a_fusion_by_name_alone_does_not_stand_for_a_generator_of_ones_own(tmp_path: Path):
    model = tf.condition(Net(), SITES, tf.Vector(13), generator=lambda *a: tf.Generator(*a, bound="tanh:0.5"))
    base = tf.remove(copy.deepcopy(model))
    tf.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"fusion= or generator= with an object, .* got 'film'"):
        tf.load(base, tmp_path, fusion="film")


def test_what_is_asked_for_is_asked_for_after_loading(tmp_path: Path):
    make = lambda: tf.Several({"time": tf.Scalars(1, 4), "text": tf.Maybe(tf.Vector(13))})  # noqa: E731
    model, x = tf.condition(Net(), SITES, make()).eval(), inputs()[0]
    base = tf.remove(copy.deepcopy(model))
    tf.save(model, tmp_path / "new")
    loaded = tf.load(copy.deepcopy(base), tmp_path / "new")
    assert loaded.film.cond.required == ("time",)
    with pytest.raises(ValueError, match=r"expected all of \['time'\]"):
        loaded(x, cond={"text": torch.randn(2, 13)})
    tf.save(tf.condition(copy.deepcopy(base), SITES, several_as_before()), tmp_path / "old")
    assert tf.load(copy.deepcopy(base), tmp_path / "old").film.cond.required == ()
    assert tf.load(base, tmp_path / "old", cond=make()).film.cond.required == ("time",)


def test_what_is_lost_together_is_lost_together_after_loading(tmp_path: Path):
    parts = {"time": tf.Scalars(1, 4), "text": tf.Maybe(tf.Vector(13)), "goal": tf.Maybe(tf.Vector(2))}
    model = tf.condition(Net(), SITES, tf.Several(parts, joint_dropout=0.3, joint=["goal"])).eval()
    base = tf.remove(copy.deepcopy(model))
    tf.save(model, tmp_path)
    loaded = tf.load(copy.deepcopy(base), tmp_path).film.cond
    assert (loaded.joint, loaded.required, loaded.joint_dropout) == (("goal",), ("time",), 0.3)
    tf.load(copy.deepcopy(base), tmp_path, cond=tf.Several(copy.deepcopy(parts), joint_dropout=0.1))
    description = json.loads((tmp_path / "film.json").read_text())
    del description["cond"]["options"]["joint"]  # as it was before there were names
    assert adapter._build(description["cond"]).joint == ("text", "goal")


def several_as_before() -> tf.Several:
    """Return what is described as folders were in which every part was one that may be missing."""
    return tf.Several({"time": tf.Maybe(tf.Scalars(1, 4)), "text": tf.Maybe(tf.Vector(13))})


@pytest.mark.plain
def test_the_two_files_of_different_saves_are_refused(tmp_path: Path):
    model, other = conditioned(), conditioned(bound="tanh:0.5")
    tf.save(model, tmp_path / "one")
    tf.save(other, tmp_path / "two")
    (tmp_path / "one" / "film.json").replace(tmp_path / "two" / "film.json")
    with pytest.raises(ValueError, match=r"expected the film.json that was saved with film.safetensors"):
        tf.load(tf.remove(model), tmp_path / "two")


def test_a_folder_that_does_not_say_what_belongs_together_is_loaded(tmp_path: Path):
    model, (x, z) = conditioned(), inputs()
    tf.save(model, tmp_path)
    safetensors.torch.save_file(model.film.state_dict(), tmp_path / "film.safetensors")
    expected = model(x, cond=z)
    assert torch.equal(tf.load(tf.remove(model), tmp_path)(x, cond=z), expected)


def rewritten(folder: Path, change) -> None:
    """Change a saved description, and say that it belongs to the tensors."""
    description = json.loads((folder / "film.json").read_text())
    change(description)
    text = json.dumps(description)
    (folder / "film.json").write_text(text)
    tensors = safetensors.torch.load_file(folder / "film.safetensors")
    about = {
        "sha256 of the description": hashlib.sha256(
            json.dumps(description, sort_keys=True).encode()
        ).hexdigest()
    }
    safetensors.torch.save_file(tensors, folder / "film.safetensors", about)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("sites"), "KeyError.'sites'"),
        (lambda d: d.pop("base"), "KeyError.'base'"),
        (lambda d: d.pop("fusion"), "KeyError.'fusion'"),
        (lambda d: d.update(cond={}), "KeyError.'options'"),
        (lambda d: d.update(cond={"type": "Own", "options": {}}), "KeyError.'Own'"),
        (lambda d: d.update(sites=3), "TypeError"),
        (lambda d: d["sites"][0].update(later=1), "TypeError.*unexpected keyword argument 'later'"),
        (lambda d: d["sites"][0].update(features=-1), "channels expected a whole number from 1 on, got -1"),
        (lambda d: d["fusion"].update(options=[]), "AttributeError"),
        (lambda d: d["base"]["values"].update({"conv.weight": "x"}), ""),
    ],
)
def test_a_description_of_another_kind_is_named_and_changes_nothing(change, said: str, tmp_path: Path):
    base = Net()
    before = copy.deepcopy(base.state_dict())
    tf.save(tf.condition(copy.deepcopy(base), SITES, tf.Vector(13)), tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}(.|\n)*{said}"):
        tf.load(base, tmp_path)
    assert [*base.state_dict()] == [*before]
    (tmp_path / "film.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"got a broken one in .*{tmp_path.name}: "):
        tf.load(base, tmp_path)


@pytest.mark.plain
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["fusion"]["options"].update(trunk=[2**20, 2**20]),
        lambda d: d["cond"]["options"].update(num_classes=2**40),
        lambda d: d["cond"]["options"].update(dim=2**40),
    ],
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_they_cost_memory(change, tmp_path: Path):
    base = Net()
    tf.save(tf.condition(copy.deepcopy(base), SITES, tf.Classes(5, 3), trunk=(2,)), tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(
        ValueError, match=r"expected (the tensors of this conditioning|sizes that tensors can)"
    ):
        tf.load(base, tmp_path)
    assert type(base) is Net


def test_an_error_of_ones_own_encoder_is_none_of_the_folder(tmp_path: Path):
    class Broken(Own):
        @property
        def dim(self):
            return len(None)

    tf.save(tf.condition(Net(), SITES, Own()), tmp_path)
    with pytest.raises(TypeError, match=r"object of type 'NoneType' has no len\(\)$"):
        tf.load(Net(), tmp_path, cond=Broken())


@pytest.mark.plain
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.complex64, "complex"), (torch.int64, "integer"), (torch.bool, "bool")]
)
def test_tensors_that_are_no_fractions_or_too_many_are_refused(dtype, kind: str, tmp_path: Path):
    base, path = Net(), tmp_path / "film.safetensors"
    tf.save(tf.condition(copy.deepcopy(base), SITES, tf.Vector(13)), tmp_path)
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({key: value.to(dtype) for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=rf"expected the tensors of this conditioning.*\n  .*\) {kind}"):
        tf.load(base, tmp_path)
    safetensors.torch.save_file({**tensors, "other": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"\n  other  none  \(2,\)\n"):
        tf.load(base, tmp_path)
    safetensors.torch.save_file({key: value.bfloat16() for key, value in tensors.items()}, path)
    assert tf.load(base, tmp_path).film.generator.head.weight.dtype == torch.float32


class Versioned(Own):
    """An encoder whose state is more than tensors."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        """Take it, as torch asks for."""


@pytest.mark.plain
def test_what_cannot_be_written_or_filled_is_refused_in_words(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a state of tensors, got 'cond._extra_state' dict"):
        tf.save(tf.condition(Net(), SITES, Versioned()), tmp_path)
    with pytest.raises(ValueError, match=r"save: expected a state with numbers, .* on the meta device"):
        tf.save(conditioned().to("meta"), tmp_path)
    tf.save(conditioned(), tmp_path)
    with torch.device("meta"):
        base = Net()
    with pytest.raises(ValueError, match=r"expected a base with numbers, got one on the meta device"):
        tf.load(base, tmp_path, any_base=True)
    assert type(base) is Net


@pytest.mark.plain
def test_a_table_of_a_generator_of_ones_own_is_loaded_as_any_where_the_fusion_is_film(tmp_path: Path):
    model, x = tf.condition(Net(), SITES, tf.Vector(13), generator=tf.Generator).eval(), inputs()[0]
    randomise(model.film)
    base = tf.remove(copy.deepcopy(model))
    tf.save(tf.tabulate(model, conds=torch.randn(11, 13)), tmp_path)
    assert torch.equal(tf.load(base, tmp_path)(x, cond=2), model(x, cond=2))


@pytest.mark.plain
@pytest.mark.parametrize("given", [None, "film"])
@pytest.mark.parametrize("made", [{"fusion": Film(align="linear")}, {"align": "linear"}])
def test_a_table_resizes_modulations_as_the_film_of_which_it_was_made(made, given, tmp_path: Path):
    model = tf.condition(nn.Sequential(nn.Conv1d(3, 5, 1)), "0", tf.Classes(7, 11), **made).eval()
    randomise(model.film)
    base = tf.remove(copy.deepcopy(model))
    tf.save(tf.tabulate(model, conds=torch.arange(7)), tmp_path)
    x, steps = torch.randn(2, 3, 8), torch.tensor([[0, 3, 5], [6, 1, 2]])
    assert torch.equal(tf.load(base, tmp_path, fusion=given)(x, cond=steps), model(x, cond=steps))


class OwnFilm(Film):
    """A fusion of one's own, of which nothing is known."""


@pytest.mark.plain
def test_a_table_of_a_fusion_of_ones_own_asks_for_it(tmp_path: Path):
    model, x = tf.condition(Net(), SITES, tf.Vector(13), fusion=OwnFilm()).eval(), inputs()[0]
    base = tf.remove(copy.deepcopy(model))
    tf.save(tf.tabulate(model, conds=torch.randn(11, 13)), tmp_path)
    with pytest.raises(ValueError, match=r"expected fusion=, for the table in (.|\n)*fusion='film'"):
        tf.load(base, tmp_path)
    with pytest.raises(ValueError, match=r"expected no generator=, (.|\n)*Leave it out"):
        tf.load(base, tmp_path, fusion=OwnFilm(), generator=tf.Generator)
    assert torch.equal(tf.load(base, tmp_path, fusion=OwnFilm())(x, cond=2), model(x, cond=2))


def test_a_tabulated_network_is_saved_and_loaded(tmp_path: Path):
    model, x = conditioned(emit=("gamma", "beta", "gate")), inputs()[0]
    base = tf.remove(copy.deepcopy(model))
    tf.tabulate(model, conds=torch.randn(11, 13))
    loaded, again = model, copy.deepcopy(base)
    for copied in (base, again):  # what was loaded is saved and loaded too
        loaded = tf.load(copied, tf.save(loaded, tmp_path))
    index = torch.tensor([10, 3])
    assert torch.equal(again(x, cond=index), model(x, cond=index))
    assert torch.equal(again(x, cond=2), model(x, cond=2))


def test_a_conditioning_that_was_sized_by_another_is_saved_with_its_number(tmp_path: Path):
    model, (x, z) = conditioned(fusion="concat", match_params=conditioned()), inputs()
    base = copy.deepcopy(model)
    tf.save(model, tmp_path)
    assert json.loads((tmp_path / "film.json").read_text())["fusion"]["options"] == {"match_params": 168}
    assert torch.equal(tf.load(tf.remove(base), tmp_path)(x, cond=z), model(x, cond=z))


class Special(tf.Vector):
    """A subclass, of which nothing is known."""


@pytest.mark.parametrize(
    ("saved", "given"),
    [
        (lambda: tf.Maybe(tf.Classes(5, 13), dropout=0.1), lambda: tf.Maybe(tf.Classes(5, 13), dropout=0.3)),
        (
            lambda: tf.Several({"a": tf.Vector(13)}, joint_dropout=0.1),
            lambda: tf.Several({"a": tf.Vector(13)}),
        ),
        (lambda: tf.Vector(13), lambda: Special(13)),
    ],
    ids=["dropout", "joint dropout", "a subclass"],
)
def test_an_encoder_may_train_in_another_way_than_the_one_that_was_saved(saved, given, tmp_path):
    model = tf.condition(Net(), SITES, saved())
    base = copy.deepcopy(model)
    tf.save(model, tmp_path)
    said = tmp_path / "film.json"
    said.write_text(json.dumps(json.loads(said.read_text()), indent=3))
    cond = given()
    assert tf.conditioning(tf.load(tf.remove(base), tmp_path, cond=cond)).cond is cond


def test_parts_that_hear_conditions_of_their_own_are_saved_and_loaded_one_by_one(tmp_path: Path):
    eye = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    net = nn.Sequential(OrderedDict(eye=eye, head=nn.Linear(5, 2)))
    base, x, text, time = copy.deepcopy(net), torch.randn(2, 3), torch.randn(2, 7), torch.randn(2, 4)
    tf.condition(net.eye, "1", tf.Vector(7))
    tf.condition(net, "head", tf.Vector(4))
    randomise(net.eye.film)
    randomise(net.film)
    first, second = tf.modulations(net.eye, text)["1"], tf.modulations(net, time)["head"]
    expected = tf.functional.film(base.eye(x), first.gamma, first.beta)
    expected = tf.functional.film(base.head(expected), second.gamma, second.beta)
    tf.load(base.eye, tf.save(net.eye, tmp_path / "eye"))
    tf.load(base, tf.save(net, tmp_path / "all"))
    for model in (net, base):
        with tf.using(model.eye, cond=text):
            torch.testing.assert_close(model(x, cond=time), expected)
            assert list(tf.doctor(model, x, cond=time).pulses) == ["head"]
        with pytest.raises(ValueError, match="expected an active condition, got none"):
            model(x, cond=time)
