"""Record, edit, sweep: at the root, eager and compiled."""

import re
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.injection import condition, using
from torchfilm.inspection import edit, record, strength, sweep
from torchfilm.modulations import matching, modulations, save_modulations


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3)
        self.head = nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def network(sites: str = "first|second", **options: object) -> nn.Module:
    return randomise(condition(Net(), sites, tf.Vector(11), **options))


X = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


def z(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 11)


def closed(m: tf.Modulation) -> tf.Modulation:
    return m.replace(gamma=0 * m.gamma)


def equal(a: tf.Modulation, b: tf.Modulation) -> bool:
    return torch.equal(a.gamma, b.gamma) and torch.equal(a.beta, b.beta)


def test_a_recording_holds_the_modulations_of_all_calls_and_changes_nothing():
    model, first, second = network(), z(), z()
    plain = model(X, cond=first)
    with record(model) as rec:
        assert torch.equal(model(X, cond=first), plain)
        model(X, cond=second)
    model(X, cond=first)
    assert list(rec) == ["first", "second"]
    assert rec["first"].gamma.shape == (4, 5)
    assert rec["second"].beta.shape == (4, 7)
    for name, m in modulations(model, torch.cat([first, second])).items():
        torch.testing.assert_close(rec[name].gamma, m.gamma)
        torch.testing.assert_close(rec[name].beta, m.beta)
    assert len(rec.calls) == 2
    assert not rec["first"].gamma.requires_grad


def test_a_recording_inside_of_another_ends_alone():
    model = network()
    with record(model) as outer:
        with record(model) as inner:
            pass
        model(X, cond=z())
    assert (len(outer.calls), len(inner.calls)) == (1, 0)
    assert not model.film.transforms
    assert outer != inner
    assert len({outer, inner}) == 2


def test_a_recording_feeds_the_network_as_its_condition_did():
    model, condition_ = network(), z()
    with record(model) as rec:
        y = model(X, cond=condition_)
    assert torch.equal(model(X, modulation=rec), y)
    assert torch.equal(model(X, modulation=rec.modulations), y)


def test_calls_that_others_make_are_recorded():
    model, condition_ = network(), z()
    with using(model, cond=condition_), record(model) as rec:
        model(X)
        model(X)
    assert [call["first"].gamma.shape for call in rec.calls] == [(2, 5)] * 2
    assert torch.equal(rec["first"].gamma[:2], modulations(model, condition_)["first"].gamma)
    with record(model) as around, using(model, cond=condition_):
        model(X)
        model(X)
    assert len(around.calls) == 2


def test_edits_follow_one_another_and_a_recording_sees_those_outside_of_it():
    model, condition_ = network(), z()
    before = modulations(model, condition_)
    with (
        record(model) as outer,
        edit(model, {".*": lambda m: 2.0 * m, "second": closed}),
        record(model) as inner,
    ):
        model(X, cond=condition_)
    assert equal(outer["first"], before["first"])
    assert equal(inner["first"], 2.0 * before["first"])
    assert equal(inner["second"], closed(2.0 * before["second"]))


def test_an_edit_reaches_the_output_and_ends_with_its_block_also_by_an_exception():
    model, condition_ = network(), z()
    plain = model(X, cond=condition_)
    made = modulations(model, condition_)
    with edit(model, {"second": closed}):
        y = model(X, cond=condition_)
    torch.testing.assert_close(y, model(X, modulation={**made, "second": closed(made["second"])}))
    assert not torch.allclose(y, plain)
    with pytest.raises(RuntimeError, match="stop"), edit(model, {"second": closed}):
        raise RuntimeError("stop")
    assert torch.equal(model(X, cond=condition_), plain)


def test_a_modulation_may_take_the_place_of_the_networks_own():
    model = network()
    constant = tf.Modulation.identity(1, 5)
    with edit(model, {"first": constant}), record(model) as rec:
        model(X, cond=z())
    assert equal(rec["first"], constant)


@pytest.mark.parametrize("change", ["edit", "sweep"])
def test_a_change_that_writes_into_its_modulation_ends_with_its_block(change: str):
    model, given = network(), z()

    def zeroed(m: tf.Modulation, by: object = None) -> tf.Modulation:
        m.gamma[:, 2] = 0
        return m

    with torch.no_grad(), using(model, cond=given), record(model) as outer:
        plain = model(X)
        if change == "edit":
            with edit(model, {"first": zeroed}):
                changed = model(X)
        else:
            (changed,) = sweep(model, "first", [1.0], lambda: model(X), change=zeroed)
        assert torch.equal(model(X), plain)
        assert not torch.allclose(changed, plain)
    assert all(call["first"].gamma[:, 2].all() for call in outer.calls)


def test_a_recording_keeps_its_values_when_they_are_written_over():
    model = network("first")
    values = tf.Modulation.identity(2, 5)
    with record(model) as rec:
        model(X, modulation={"first": values})
    values.gamma.zero_()
    assert rec["first"].gamma.all()


def test_gradients_pass_through_an_edit_to_the_generator():
    model = network()
    with edit(model, {".*": lambda m: 2.0 * m}):
        model(X, cond=z()).sum().backward()
    assert model.get_submodule("film.generator.head").weight.grad.abs().max() > 0


def test_two_threads_record_and_edit_without_meeting():
    model, found = network(), {}

    def work(name: str, factor: float) -> None:
        with edit(model, {".*": lambda m: factor * m}), record(model) as rec:
            for _ in range(20):
                model(X, cond=torch.ones(2, 11))
        found[name] = rec

    threads = [threading.Thread(target=work, args=(str(f), f)) for f in (1.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found["3.0"]["first"].gamma, 3 * found["1.0"]["first"].gamma)
    assert len(found["1.0"].calls) == len(found["3.0"].calls) == 20


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    torch._dynamo.reset()
    model = network()
    return model, torch.compile(model, fullgraph=True, backend=request.param)


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_network_is_recorded_call_by_call_by_one_more_graph(compiled: tuple):
    model, fast = compiled
    fast(X, cond=z())
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            conditions = [z() for _ in range(5)]
            with record(fast) as rec:
                for one in conditions:
                    fast(X, cond=one).sum().backward()
            assert len(rec.calls) == 5
            expected = modulations(model, torch.cat(conditions))
            torch.testing.assert_close(rec["second"].beta, expected["second"].beta)


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_calls_of_a_compiled_network_may_have_different_fields(compiled: tuple):
    model, fast = compiled
    with torch.no_grad():
        a = modulations(model, z())
    gated = {name: m.replace(gate=torch.randn_like(m.gamma)) for name, m in a.items()}
    given = [a, {**a, "first": gated["first"]}, {**a, "second": gated["second"]}, gated] * 2
    with torch.no_grad(), record(model) as expected, record(fast) as rec:
        for values in given:
            fast(X, modulation=values)
    assert len(rec.calls) == len(expected.calls) == 8
    for values, call in zip(given, rec.calls, strict=True):
        for name, m in values.items():
            torch.testing.assert_close(vars(call[name]), vars(m), rtol=0, atol=0)


@pytest.mark.parametrize("first", [0, 1])
def test_where_only_some_calls_have_a_gate_that_of_the_others_is_one(first: int):
    model, plain = network("first"), tf.Modulation(torch.randn(2, 5), torch.randn(2, 5))
    gates = [None, torch.randn(2, 5)]
    with record(model) as rec:
        for i in (first, 1 - first):
            model(X, modulation={"first": plain.replace(gate=gates[i])})
    expected = [torch.ones(2, 5), gates[1]]
    assert torch.equal(rec["first"].gate, torch.cat([expected[first], expected[1 - first]]))
    assert torch.equal(rec["first"].gamma, torch.cat([plain.gamma] * 2))


@dataclass(frozen=True)
class Named:
    """A value of a fusion of one's own, which is no tensor throughout."""

    shift: torch.Tensor
    word: str
    times: int


torch.export.register_dataclass(Named, serialized_type_name="tests.Named")


class Shift:
    def build(self, cond_dim: int, sites: dict) -> nn.Module:
        class Values(nn.Module):
            def forward(self, condition: torch.Tensor) -> dict:
                return {name: Named(condition[:, :size], "twice", 2) for name, size in sites.items()}

        return Values()

    def apply(self, x: torch.Tensor, value: Named, dim: int, site: str) -> torch.Tensor:
        return x + value.times * value.shift[:, :, None, None]


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_value_that_holds_words_and_numbers_is_recorded():
    torch._dynamo.reset()
    model = condition(Net(), "first", tf.Vector(11), fusion=Shift())
    for net in (model, torch.compile(model, backend="eager", fullgraph=True)):
        with record(net) as rec, torch.no_grad():
            net(X, cond=torch.ones(2, 11))
        (call,) = rec.calls
        assert (call["first"].word, call["first"].times) == ("twice", 2)
        assert torch.equal(call["first"].shift, torch.ones(2, 5))


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_network_is_edited_swept_and_given_modulations(compiled: tuple):
    model, fast = compiled
    a, b, c = (z() for _ in range(3))
    with edit(fast, {"first": closed}), record(fast) as rec:
        y = fast(X, cond=a)
    assert not rec["first"].gamma.any()
    with edit(model, {"first": closed}):
        torch.testing.assert_close(y, model(X, cond=a))
    steps = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0]
    turned = sweep(fast, "second", steps, lambda: fast(X, cond=a))
    torch.testing.assert_close(turned, sweep(model, "second", steps, lambda: model(X, cond=a)))
    with torch.no_grad():
        mixed = modulations(model, a) + (modulations(model, b) - modulations(model, c))
    torch.testing.assert_close(fast(X, modulation=mixed), model(X, modulation=mixed))
    torch.testing.assert_close(fast(X, modulation=rec), y)


@pytest.mark.plain
@pytest.mark.parametrize("fusion", ["concat", "low_rank"])
def test_a_change_of_gamma_where_there_is_none_is_named(fusion: str):
    model = network("second", fusion=fusion)
    with (
        pytest.raises(
            ValueError, match=r"edit: expected a change of what site 'second' hears.* no attribute"
        ),
        edit(model, {".*": closed}),
    ):
        model(X, cond=z())
    with pytest.raises(ValueError, match=r"sweep: expected a change of what site 'second' hears, a "):
        tf.sweep(model, ".*", [0.5], lambda: model(X, cond=z()), change=lambda m, by: m.replace(beta=by))


def test_a_sweep_in_double_precision_takes_its_values_in_it():
    model = network("first").double()
    (y,) = sweep(model, "first", [0.1], lambda: model(X.double(), cond=torch.ones(2, 11).double()))
    made = modulations(model, torch.ones(2, 11).double())["first"]
    torch.testing.assert_close(
        y, model(X.double(), modulation={"first": strength(made, 0.1)}), rtol=1e-12, atol=0
    )


@pytest.mark.plain
def test_values_of_other_fusions_are_recorded_as_they_are():
    torch._dynamo.reset()
    model = network("second", fusion="low_rank")
    fast = torch.compile(model, fullgraph=True, backend="eager")
    for network_ in (model, fast):
        with record(network_) as rec:
            network_(X, cond=torch.ones(2, 11))
        torch.testing.assert_close(
            rec.calls[0]["second"].factor, model.film.modulations(torch.ones(2, 11))["second"].factor
        )
        with pytest.raises(ValueError, match=r"got Bilinear at site 'second'.\n.*rec.calls"):
            rec["second"]


def test_strength_zero_is_the_identity_and_one_changes_nothing():
    m = tf.Modulation(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3))
    none, same, twice = (strength(m, by) for by in (0.0, 1.0, 2.0))
    assert torch.equal(none.gamma, torch.ones(2, 3))
    assert torch.equal(none.gate, torch.ones(2, 3))
    assert not none.beta.any()
    torch.testing.assert_close(vars(same), vars(m))
    torch.testing.assert_close(twice.gamma, 2 * m.gamma - 1)
    torch.testing.assert_close(twice.beta, 2 * m.beta)


def test_a_sweep_goes_from_the_unconditioned_network_to_the_conditioned_one():
    model, condition_ = network(), z()
    none, full = sweep(model, ".*", [0.0, 1.0], lambda: model(X, cond=condition_))
    with tf.unconditioned(model):
        torch.testing.assert_close(none, model(X, cond=condition_))
    torch.testing.assert_close(full, model(X, cond=condition_))
    shifted = sweep(
        model,
        "first",
        [3.0],
        lambda: model(X, cond=condition_),
        change=lambda m, by: m.replace(beta=m.beta + by),
    )
    with edit(model, {"first": lambda m: m.replace(beta=m.beta + 3.0)}):
        torch.testing.assert_close(shifted[0], model(X, cond=condition_))


def test_modulations_without_a_batch_become_rows_of_a_recording():
    model = network("first")
    with record(model) as rec:
        for value in (1.0, 2.0):
            model(X, modulation={"first": tf.Modulation(torch.full((5,), value), torch.zeros(5))})
    assert rec["first"].gamma[:, 0].tolist() == [1, 2]


def test_what_was_not_recorded_is_said_in_words():
    model = network()
    with record(model) as rec:
        pass
    assert len(rec) == 0
    with pytest.raises(ValueError, match=r"calls of the network, got none\.[\s\S]*alone, under `using`, are"):
        rec["first"]
    assert "first" not in rec
    assert rec.get("first") is None
    with record(model) as rec:
        model(X, cond=z())
    assert "first" in rec
    assert "frist" not in rec
    assert rec.get("frist") is None
    assert equal(rec.get("first"), rec["first"])
    with pytest.raises(ValueError, match=r"one of 2 names, got 'frist'.\nThe nearest are 'first'"):
        rec["frist"]


def test_calls_of_different_lengths_stay_apart():
    with record(network("first")) as rec:
        for steps in (2, 3):
            rec({"first": tf.Modulation.identity(1, steps, 5)})
    with pytest.raises(
        ValueError, match=r"calls of one shape at site 'first', got \[\(1, 2, 5\), \(1, 3, 5\)\]"
    ):
        rec["first"]
    assert len(rec.calls) == 2


def test_a_pattern_without_a_site_names_the_nearest():
    model = network()
    with (
        pytest.raises(ValueError, match=r"'frist' matches .*\nThe nearest names are 'first'"),
        edit(model, {"frist": closed}),
    ):
        pass
    with pytest.raises(ValueError, match="'thrid' matches"):
        sweep(model, "thrid", [1.0], lambda: None)
    assert matching(["a.b", "axb"], "a.b") == ["a.b"]
    assert matching(["a.b", "axb"], re.compile("a.b")) == ["a.b", "axb"]
    assert matching(["a[0]", "b"], "a[0]") == ["a[0]"]
    assert matching(["a", "b", "c"], ["c", "a"]) == ["a", "c"]
    assert matching(["a", "b"], lambda name: name > "a") == ["b"]
    assert matching(["a", "b"], re.compile("A|C", re.IGNORECASE)) == ["a"]
    assert matching(["a", "b"], [re.compile("a"), "b"]) == ["a", "b"]
    assert matching(["a[", "b"], "a[") == ["a["]
    with edit(model, {re.compile("FIRST", re.IGNORECASE): closed}), record(model) as rec:
        model(X, cond=z())
    assert not rec["first"].gamma.any()
    with pytest.raises(
        ValueError, match=r"expected a name, or a regular expression, got 'a\[': unterminated"
    ):
        matching(["a", "b"], "a[")
    for none in (lambda name: False, []):
        with pytest.raises(
            ValueError, match=r"at least one of 2 to be chosen, got none by .*\nThere are 'a'"
        ):
            matching(["a", "b"], none)


@pytest.mark.plain
def test_thousands_of_sites_are_edited_by_their_names_in_a_moment():
    names = [f"layers.{i}" for i in range(3000)]
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 3) for _ in names)})
    tf.condition(model, r"layers\.\d+", tf.Vector(7))
    start = time.process_time()
    assert matching(names, names) == names
    with edit(model, dict.fromkeys(names, closed)):
        assert time.process_time() - start < 1


@pytest.mark.plain
def test_an_edit_that_returns_something_else_is_refused():
    model = network()
    with (
        pytest.raises(
            ValueError, match=r"or a Modulation, for 'first', got float.\nFor a factor: lambda m: "
        ),
        edit(model, {"first": 0.5}),
    ):
        pass
    with (
        edit(model, {"first": lambda m: m.gamma}),
        pytest.raises(ValueError, match="expected a Modulation for site 'first', got Tensor"),
    ):
        model(X, cond=z())
    for change in (lambda m, by: m.gamma, lambda m, by: None):
        with pytest.raises(
            ValueError, match=r"sweep: expected a Modulation for site 'first', got (Tensor|None)"
        ):
            sweep(model, "first", [1.0], lambda: model(X, cond=z()), change=change)
    assert model(X, cond=z()).shape == (2, 2)


@pytest.mark.plain
def test_values_of_another_fusion_are_refused_where_they_enter(tmp_path):
    model = network(fusion="concat")
    values = tf.conditioning(model).modulations(z())
    for who, enter in {
        "Modulations": lambda: tf.modulations(model, z()),
        "save_modulations": lambda: save_modulations(values, tmp_path / "preset.safetensors"),
        "sweep": lambda: sweep(model, "first", [0.5], lambda: model(X, cond=z())),
        "sensitivity": lambda: tf.sensitivity(model, X, cond=z()),
        "summarise": lambda: tf.summarise(values),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{who}: expected a Modulation for each site, got Mixing at 'first'"
        ):
            enter()
    assert not list(tmp_path.iterdir())


def test_looking_at_modulations_draws_no_dropout():
    model = randomise(condition(Net(), "first", tf.Maybe(tf.Vector(11), dropout=0.9))).train()
    given = z(7)
    expected = modulations(model.eval(), given)["first"]
    assert equal(modulations(model.train(), given)["first"], expected)
    assert equal(model.film.modulations(given)["first"], expected)
    assert model.film.cond.training


def test_a_network_is_recorded_and_swept_under_another_default_device():
    model, cond = network(), z()
    with torch.device("meta"):
        with record(model) as rec:
            model(X, cond=cond)
        outputs = sweep(model, ".*", [0, 1], lambda: model(X, cond=cond))
    assert equal(rec["first"], modulations(model, cond)["first"])
    torch.testing.assert_close(outputs[1], model(X, cond=cond))
