"""What a comparison reports: numbers that can be counted by hand, and orders that cannot be otherwise."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.comparison import Comparison, Row, compare
from torchfilm.conditions import Vector
from torchfilm.injection import condition
from torchfilm.scoring import Scored

COND = 7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))


def models(*fusions: str) -> dict[str, nn.Module]:
    return {name: condition(network(), "1", Vector(COND), fusion=name) for name in fusions}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 11, 11), torch.randn(2, COND)


class TwoInputs(nn.Module):
    """A network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.seen: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(float(t.sum()))
        return self.layer(x)


def test_several_inputs_come_one_by_one_or_as_a_tuple():
    model = condition(TwoInputs(), "layer", Vector(COND))
    x, t, z = torch.randn(2, 3), torch.ones(2), torch.randn(2, COND)
    for given in ((x, t, z), ((x, t), z), [(x, t), z]):
        model.seen.clear()
        assert compare({"film": model}, given, rounds=1)["film"].milliseconds > 0
        assert set(model.seen) == {2.0}


def test_parameters_are_those_of_the_base_and_those_that_condition():
    rows = compare(models("film", "bias", "concat"), batch(), rounds=1).rows
    base = 3 * 5 * 9 + 2 * 5 + 5 * 2 + 2
    added = {"unconditioned": 0, "film": 2 * 5 * 8, "bias": 5 * 8, "concat": 5 * 5 + 5 * 8}
    assert [(row.name, row.parameters, row.added) for row in rows] == [
        (name, base + extra, extra) for name, extra in added.items()
    ]


def test_a_layer_that_base_and_encoder_share_is_the_base_s():
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    encoder = Vector(5)
    encoder.shared = net[0]
    found = compare({"film": condition(net, "1", encoder)}, (torch.randn(2, 5), torch.randn(2, 5)), rounds=1)
    counts = [(row.parameters, row.added) for row in found.rows]
    assert counts == [(30 + 18, 0), (30 + 18 + 36, 36)]


def test_a_network_that_was_compared_is_freed_with_its_last_name():
    given = models("film")
    weight = weakref.ref(given["film"][0].weight)
    compare(given, batch(), rounds=1)
    del given
    gc.collect()
    assert weight() is None


def test_a_network_without_parameters_is_compared():
    found = compare({"relu": Plain(nn.ReLU())}, (torch.randn(2, 3), torch.randn(2, COND)), rounds=1)
    assert found["relu"].parameters == 0


def test_flops_are_two_for_each_product():
    found = compare(models("film", "concat", "cross_attention"), batch(), rounds=1)
    plain = 2 * 2 * (9 * 9) * (3 * 9 * 5 + 5 * 2)
    assert found["unconditioned"].flops == plain
    assert found["film"].flops == plain + 2 * 2 * COND * 10
    assert found["concat"].flops == plain + 2 * 2 * COND * 5 + 2 * 2 * 81 * 5 * 5
    attention = 2 * (81 * 5 * 5 + 81 * 5 + 81 * 5 + 81 * 5 * 5)  # queries, scores, sums, output; one token
    assert found["cross_attention"].flops == plain + 2 * (2 * COND * 10 + attention)


class Plain(nn.Module):
    """A network that is given a condition and does not listen."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.net(x)


class Timed(nn.Linear):
    """A layer whose passes take as long as it is told, on a clock of their own."""

    now, order = 0.0, ""

    def __init__(self, name: str, seconds: list[int]) -> None:
        super().__init__(3, 5)
        self.name, self.left = name, iter(seconds)

    def forward(self, x: Tensor) -> Tensor:
        Timed.now += next(self.left, 0)
        Timed.order += self.name
        return super().forward(x)


def test_latency_is_a_median_and_ratios_are_to_the_plain_network_in_the_same_round():
    seconds = {"a": [9, 2, 1, 6], "b": [9, 2, 10, 6], "c": [9, 3, 2, 18]}  # of which the first does not count
    nets = {name: Plain(Timed(name, told)) for name, told in seconds.items()}
    given = (torch.randn(2, 3), torch.randn(2, COND))
    found = compare(nets, given, rounds=3, clock=lambda: Timed.now)
    assert [row.milliseconds for row in found.rows] == [2000, 6000, 3000]
    assert [row.ratio for row in found.rows] == [1, 1, 2]
    assert found["a"].quartiles == (1500, 4000)
    assert found.added_time("b", "c") == 0


def test_each_round_has_an_order_of_its_own_which_the_seed_tells():
    given, orders = (torch.randn(2, 3), torch.randn(2, COND)), []
    for seed in (0, 0, 1):
        Timed.order = ""
        compare({name: Plain(Timed(name, [])) for name in "abc"}, given, rounds=9, seed=seed)
        rounds = [Timed.order[i : i + 3] for i in range(0, 30, 3)]
        assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
        orders.append(rounds)
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) > 2


def test_what_is_kept_for_the_backward_pass_is_counted_once_and_without_weights():
    net = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.ReLU())
    x = torch.randn(2, 3, 7, 7)
    model = condition(net, "0", Vector(COND), fusion="bias")
    found = compare({"bias": model}, (x, torch.randn(2, COND)), rounds=1)
    # The convolution keeps its input, the ReLU its output, which it shares with nobody else.
    assert found["unconditioned"].kept == 4 * (x.numel() + 2 * 5 * 49)
    assert found["bias"].kept > found["unconditioned"].kept


def test_what_is_kept_is_what_training_keeps_and_nothing_of_it_remains():
    net = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5), nn.Dropout(0.5)).eval()
    x, shared = torch.randn(2, 3, 7, 7), nn.BatchNorm2d(5)
    net.append(shared).append(nn.Sequential(shared))
    waiting = net(x).sum()
    held = [(buffer, buffer.clone()) for buffer in net.buffers()]
    state = torch.get_rng_state()
    found = compare({"net": Plain(net)}, (x, torch.zeros(2, COND)), rounds=1)
    features, statistics = 4 * 2 * 5 * 49, 4 * 2 * 5  # each norm keeps what it reads, mean and deviation
    mask = features  # the dropout's
    assert found["net"].kept == 4 * x.numel() + 3 * features + 3 * statistics + mask
    assert torch.equal(torch.get_rng_state(), state)
    for buffer, (same, value) in zip(net.buffers(), held, strict=True):
        assert buffer is same
        assert torch.equal(buffer, value)
    waiting.backward()
    assert net.training is net[1].training is False


def test_what_a_branch_keeps_that_has_no_part_in_the_output_is_freed():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 5), nn.Linear(3, 8)

        def forward(self, x):
            self.unused(x).exp().sin()
            return self.used(x)

    x = torch.randn(7, 3)
    assert compare({"net": Plain(Unused())}, (x, torch.zeros(7, COND)), rounds=1)["net"].kept == 4 * x.numel()


def test_what_is_kept_is_the_same_in_inference_mode():
    given, before = models("film"), batch()
    expected = [row.kept for row in compare(given, before, rounds=1)]
    with torch.inference_mode():
        for one in (before, batch()):
            assert [row.kept for row in compare(given, one, rounds=1)] == expected
        assert [row.kept for row in compare(models("film"), before, rounds=1)] == [0, 0]  # never trained


def test_switches_of_torch_that_are_closed_are_no_hindrance(monkeypatch: pytest.MonkeyPatch):
    closing = torch.backends.disable_global_flags.__globals__  # for good, so here as it does it
    monkeypatch.setitem(closing, "__allow_nonbracketed_mutation_flag", False)
    assert compare(models("film"), batch(), rounds=1)["film"].flops > 0
    assert torch.backends.mkldnn.enabled


def test_a_batch_that_batch_norms_cannot_be_trained_on_is_measured_in_eval_mode():
    net = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5))
    found = compare({"net": Plain(net)}, (torch.randn(1, 3, 1, 1), torch.randn(1, COND)), rounds=1)
    assert found["net"].kept == 4 * (3 + 5)


def test_a_comparison_leaves_no_trace():
    given = models("film", "concat")
    for model in given.values():
        randomise(model)
        model.train()
        model[1].eval()
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in given.items()}
    compare(given, batch(), rounds=2)
    for name, model in given.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name][key])
        assert [module.training for module in model] == [True, False, True, True]
        assert all(parameter.grad is None for parameter in model.parameters())


class Hand(nn.Module):
    """A network that listens without any help of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.layer(x) + cond


class Late(nn.Module):
    """A layer that registers a buffer when it runs in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.register_buffer("late", torch.zeros(3))
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_buffers_that_come_late_and_those_of_torchscript_are_left_as_they_were():
    net = nn.Sequential(nn.Linear(3, 5), torch.jit.script(nn.BatchNorm1d(5)), Late())
    model = condition(net, "0", Vector(COND))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compare({"film": model}, (torch.randn(2, 3), torch.randn(2, COND)), rounds=1)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_networks_that_others_conditioned_are_compared_with_the_first():
    inputs = {"x": torch.randn(2, 3), "cond": torch.randn(2, 5)}
    found = compare({"one": Hand(), "two": Hand()}, inputs, rounds=1)
    assert [(row.name, row.added) for row in found.rows] == [("one", 0), ("two", 0)]
    assert found["one"].ratio == 1


def test_the_table_shows_every_number():
    row = Row("film", 1100, 100, 3_000_000_000, 2.5, (2.0, 3.0), 1.25, 4_000_000)
    scored = Scored(0.5, 0.25, 0.75, (0.5,))
    plain = Row("unconditioned", 1000, 0, 2_000_000_000, 2.0, (1.5, 2.5), 1.0, 2_000_000)
    *lines, empty, legend = str(Comparison((plain, row), 3, "cpu")).splitlines()
    assert empty == ""
    assert legend == (
        "ms: median [middle half] of 3 passes; time: x unconditioned; "
        "kept MB: kept for the backward pass in training"
    )
    assert [" ".join(line.split()) for line in lines] == [
        "parameters added GFLOP added ms [middle half] time kept MB",
        "unconditioned 1,000 - 2.000 - 2.000 [1.500, 2.500] 1.000 2.000",
        "film 1,100 +10.00% 3.000 +50.00% 2.500 [2.000, 3.000] 1.250 4.000",
    ]
    small = dataclasses.replace(row, flops=924, kept=1680, score=Scored(5e-5, 4e-5, 6e-5, (5e-5,)))
    assert all(text in str(Comparison((small,), 3, "cpu")) for text in (" 9.24e-07 ", " 0.00168 "))
    assert " 5.00e-05 [4.00e-05, 6.00e-05]" in str(Comparison((small,), 3, "cpu"))
    assert len({len(line) for line in lines}) == 1
    with_score = str(Comparison((plain, Row(*list(vars(row).values())[:8], scored)), 3, "cpu"))
    assert with_score.splitlines()[2].endswith("0.500 [0.250, 0.750]     -")
    assert with_score.splitlines()[-2].endswith("in training")
    single = "samples; what another seed would change is not in it"
    both = "seeds and samples"
    for seeds, over in (((1,), single), ((3,), both), ((3, 1), f"{both}, of one seed over samples alone")):
        rows = [
            dataclasses.replace(row, score=dataclasses.replace(scored, by_seed=(0.5,) * n)) for n in seeds
        ]
        legend = str(Comparison((plain, *rows), 3, "cpu")).splitlines()[-1]
        assert legend == f"score: mean [95 % interval over {over}]; gain: score minus that of film"


@pytest.mark.plain
def test_names_may_be_numbers():
    numbered = {1: nn.Linear(3, 5), 64: nn.Linear(3, 7)}
    found = compare(numbered, {"input": torch.randn(2, 3)}, rounds=1)  # type: ignore[arg-type]
    assert [row.name for row in found] == ["1", "64"]
    assert str(found).splitlines()[2].startswith("64 ")


@pytest.mark.plain
def test_a_network_without_a_name_is_refused():
    with pytest.raises(ValueError, match="expected networks by name, got a Linear"):
        compare(nn.Linear(2, 3), batch())


def test_no_networks_are_refused():
    with pytest.raises(ValueError, match="expected at least one network, got none"):
        compare({}, batch())
    with pytest.raises(ValueError, match="expected at least one network for 'bias', got none"):
        compare(models("film") | {"bias": []}, batch())


def test_a_comparison_is_drawn_with_a_panel_for_each_number():
    plot = pytest.importorskip("torchfilm.plot")
    plain = Row("unconditioned", 1000, 0, 2_000_000_000, 2.0, (1.5, 2.5), 1.0, 2_000_000)
    row = Row("film", 1100, 100, 3_000_000_000, 2.5, (2.0, 3.5), 1.25, 4_000_000)
    scored = dataclasses.replace(row, name="concat", score=Scored(0.5, 0.25, 0.75, (0.5,)))
    figure = plot.comparison(Comparison((plain, row, scored), 3, "cpu").to_json()["rows"])
    titles = [ax.get_xlabel() for ax in figure.axes]
    assert titles == ["parameters, million", "GFLOP", "ms", "MB kept for training", "score"]
    assert [bar.get_width() for bar in figure.axes[2].patches] == [2.0, 2.5, 2.5]
    ((left, _), (right, _)) = figure.axes[2].collections[0].get_segments()[1]
    assert (left, right) == (2.0, 3.5)
    assert len(plot.comparison(Comparison((plain,), 3, "cpu").to_json()["rows"]).axes) == 4


@pytest.mark.plain
def test_a_network_that_adds_no_time_is_nothing_to_compare_with():
    rows = tuple(Row(name, 1, 1, 1, ms, (ms, ms), ms, 1) for name, ms in (("plain", 1.0), ("film", 3.0)))
    found = Comparison(rows, 1, "cpu")
    assert (found.added_time("film", "film"), found.added_time("plain", "film")) == (1.0, 0.0)
    with pytest.raises(ValueError, match="a network that adds time to the reference 'plain', got 'plain'"):
        found.added_time("film", "plain")


def test_names_and_rounds_that_mean_nothing_are_refused():
    model, batch = (
        condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7)),
        (torch.rand(2, 3), torch.rand(2, 7)),
    )
    with pytest.raises(ValueError, match="rounds expected a whole number from 1 on, got 0"):
        compare({"film": model}, batch, rounds=0)
    with pytest.raises(ValueError, match=r"no network named 'unconditioned' beside a conditioned one"):
        compare({"film": model, "unconditioned": nn.Linear(3, 5)}, batch)
    with pytest.raises(
        ValueError, match=r"Comparison: expected one of 2 names, got 'flim'.\nThe nearest are 'film'"
    ):
        compare({"film": model}, batch, rounds=1)["flim"]


@pytest.mark.plain
def test_a_comparison_is_its_rows():
    row = Row("film", 1100, 100, 3_000_000_000, 2.5, (2.0, 3.5), 1.25, 4_000_000)
    found = Comparison((row,), 3, "cpu")
    assert [*found] == [row]
    assert len(found) == 1
    assert "film" in found
    assert "flim" not in found
    assert all(row in found for row in found)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (torch.rand(2, 3), torch.rand(2, 7), torch.rand(2)),
            r"batch \(\*inputs, cond\) that fits 'unconditioned', got \['a Tensor \(2, 3\)', "
            r"'a Tensor \(2, 7\)', 'a Tensor \(2,\)'\](.|\n)*without a target",
        ),
        (
            (torch.rand(2, 7),),
            r"batch \(\*inputs, cond\) that fits 'unconditioned', got \['a Tensor \(2, 7\)'\]",
        ),
        (torch.rand(2, 3), r"a batch \(x, cond\), or a mapping of keyword arguments, got a Tensor \(2, 3\)"),
        ((), r"a batch \(x, cond\), or a mapping of keyword arguments, got nothing"),
    ],
    ids=["a target", "a condition alone", "an input alone", "nothing"],
)
def test_a_batch_that_no_network_is_called_with_is_refused(given, message: str):
    model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
    with pytest.raises(ValueError, match=message):
        compare({"film": model}, given, rounds=1)


def test_an_error_of_the_network_s_own_is_not_put_down_to_the_batch():
    class Broken(Hand):
        def forward(self, x: Tensor, cond: Tensor) -> Tensor:
            return super().forward(x, None)

    with pytest.raises(TypeError, match="NoneType"):
        compare({"broken": Broken()}, (torch.rand(2, 3), torch.rand(2, 5)), rounds=1)


def around(x: Tensor, cond: Tensor | None = None) -> Tensor:
    """Be a function, where a network is asked for."""
    return x


@pytest.mark.plain
def test_networks_of_several_seeds_come_in_anything_that_can_be_gone_through():
    kept = {seed: condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7)) for seed in range(2)}
    for given in (kept.values(), (model for model in kept.values())):
        found = compare({"film": given}, (torch.rand(2, 3), torch.rand(2, 7)), rounds=1, score=lambda m: 1.0)
        assert found["film"].score.by_seed == (1.0, 1.0)


FUNCTIONS = {
    "condition": lambda f: condition(f, "0", Vector(7)),
    "conditioning": tf.conditioning,
    "modulations": lambda f: tf.modulations(f, torch.rand(2, 7)),
    "using": lambda f: tf.using(f, cond=torch.rand(2, 7)).__enter__(),
    "record": lambda f: tf.record(f).__enter__(),
    "doctor": lambda f: tf.doctor(f, torch.rand(2, 3), cond=torch.rand(2, 7)),
    "fold": lambda f: tf.fold(f, cond=torch.rand(1, 7)),
    "remove": tf.remove,
    "freeze_base": tf.freeze_base,
    "find": lambda f: tf.find(f, "0"),
    "load": lambda f: tf.load(f, "folder"),
    "compare": lambda f: compare({"film": f}, (torch.rand(2, 3), torch.rand(2, 7))),
    "compare seeds": lambda f: compare({"film": [f, f]}, (torch.rand(2, 3), torch.rand(2, 7))),
}


@pytest.mark.plain
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("given", "kind"), [(around, "function"), (nn.ReLU, "the class ReLU"), (None, "NoneType")]
)
def test_what_is_no_network_is_refused(name: str, given: object, kind: str):
    with pytest.raises(ValueError, match=f"expected an nn.Module, got .*{kind}"):
        FUNCTIONS[name](given)
