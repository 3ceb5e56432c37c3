"""The counterfactual score on functions whose hearing is known."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import oracles
import torchfilm as tf
from catalogue import randomise
from torchfilm.counterfactual import blanked, keys, others
from torchfilm.heard import heard


def batches(count: int = 3, size: int = 11) -> list:
    made = []
    for _ in range(count):
        x, z = torch.randn(size, 5), torch.randn(size, 7)
        made.append((x, z, x.sum(1) + z.sum(1)))
    return made


def listens(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return x.sum(1) + cond.sum(1)


def deaf(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return x.sum(1)


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square()


def test_a_network_that_uses_its_condition_is_heard():
    found = heard(listens, batches(), loss=squared, success=lambda y, t: (y - t).abs() < 0.1)
    assert found.verdict == "heard"
    assert found.loss is not None
    assert found.loss.value == 0
    assert found.success is not None
    assert found.success.value == 1
    swap = found.effects["swap"]
    assert swap.loss.low > 1
    assert swap.success.high < -0.5
    assert found.words.startswith("The condition is heard: swapping it changes the output by")
    assert "the loss rises by" in found.words
    assert "the success falls by" in found.words


def test_the_host_hears_under_another_default_device():
    given = batches()
    expected = heard(listens, given, loss=squared)
    with torch.device("meta"):
        found = heard(lambda *a, **k: listens(*a, **k).numpy(), given, loss=lambda y, t: (y - t.numpy()) ** 2)
    assert found == expected


def test_a_network_that_does_not_use_its_condition_ignores_it():
    found = heard(deaf, batches(), loss=squared)
    assert found.verdict == "ignored"
    assert [effect.output.value for effect in found.effects.values()] == [0, 0, 0]
    assert "The condition is ignored" in str(found)
    assert "less than 0.01" in str(found)


def test_a_change_of_the_output_that_serves_no_purpose_is_unused():
    found = heard(
        lambda x, cond: x.sum(1) + 10 * cond[:, 0], [(x, z, x.sum(1)) for x, z, _ in batches()], loss=squared
    )
    assert found.verdict == "unused"
    assert "to no clear advantage" in found.words
    assert "the loss does not clearly rise" in found.words


def test_conditions_out_of_step_with_their_samples_are_pointed_out():
    def crossed(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return x.sum(1) - 3 * cond.sum(1)

    z = torch.cat([torch.full((6, 1), 1.0), torch.full((6, 1), -1.0)])
    x = torch.randn(12, 5)
    found = heard(crossed, [(x, z, x.sum(1) + z.sum(1))], loss=squared)
    assert found.verdict == "unused"
    assert "are conditions and samples out of step?" in found.words


def test_the_change_of_the_output_is_what_a_loop_over_samples_finds():
    x, z, _ = batches(1)[0]
    found = heard(listens, [(x, z)], seed=3)
    order = others(keys(z), np.random.default_rng(3))
    before, after = listens(x, z).double().numpy(), listens(x, z[order]).double().numpy()
    expected = oracles.relative_change(before, after)
    assert found.effects["swap"].output.value == pytest.approx(expected, rel=1e-5)


def test_an_output_that_is_nothing_but_the_condition_changes_by_as_much_as_samples_differ():
    found = heard(lambda x, cond: cond, batches(20, 13))
    assert found.effects["swap"].output.value == pytest.approx(1, abs=0.1)
    assert found.effects["swap"].output.low < 1 < found.effects["swap"].output.high


ORDERED = {
    "floats": lambda x: 1e6 + x,
    "integers": lambda x: (3 * x).long(),
    "booleans": lambda x: x > 0,
    "complex": lambda x: torch.complex(x.round(), x.sign()),
    "words": lambda x: [f"{one:.0f}" for one in x[:, 0]],
}


@pytest.mark.parametrize("output", ORDERED.values(), ids=ORDERED)
def test_every_sample_is_compared_with_all_others_of_its_batch(output):
    x = torch.linspace(-2, 2, 11, dtype=torch.float64)[:, None] * torch.tensor([1.0, 3.0, 7.0])
    z = torch.arange(11.0)[:, None]
    other = torch.randperm(11)
    model, blank = lambda x, cond: output(x + 0.3 * cond), lambda cond: -cond
    effects = heard(model, [(x, z)], blank=blank).effects
    moved, apart = (
        sum(far(model(x, z), model(x, c), i, j) for i, j in pairs) / len(pairs)
        for c, pairs in ((-z, [(i, i) for i in range(11)]), (z, list(itertools.permutations(range(11), 2))))
    )
    assert effects["blank"].output.value == pytest.approx((moved / apart) ** 0.5)
    shuffled = heard(model, [(x[other], z[other])], blank=blank).effects["blank"].output.value
    assert shuffled == pytest.approx(effects["blank"].output.value)


def far(first, second, i: int, j: int) -> float:
    """The squared distance of two rows, of real and imaginary parts; 0 or 1 for what has no distance."""
    if isinstance(first, list):
        return float(first[i] != second[j])
    if first.is_complex():
        return (far(first.real, second.real, i, j) + far(first.imag, second.imag, i, j)) / 2
    apart = first[i] - second[j] if first.is_floating_point() else (first[i] != second[j]).double()
    return apart.square().mean().item()


def test_neighbours_that_are_alike_make_no_condition_heard():
    torch.manual_seed(0)
    x, z = torch.linspace(-1, 1, 256)[:, None], torch.randn(256, 1)
    for rows in (torch.arange(256), torch.randperm(256)):
        found = heard(lambda x, cond: x + 0.002 * cond, [(x[rows], z[rows])])
        assert found.verdict == "ignored"
        assert found.effects["swap"].output.value == pytest.approx(0.0035, abs=0.0005)


def test_a_batch_of_one_sample_has_no_part_in_the_difference_between_samples():
    x, z = torch.randn(7, 3), torch.randn(7, 3)
    batch, single = (x, z), (x[:1], z[:1])
    found, more = (
        heard(lambda x, cond: x + cond, given, blank=lambda z: z + 1).effects
        for given in ([batch], [batch, single, single, single])
    )
    assert more["blank"].output.value == pytest.approx(found["blank"].output.value)
    assert (more["blank"].output.n, more["swap"].output.n) == (10, 7)
    assert more["swap"].output.value == found["swap"].output.value


def test_noise_of_torch_is_the_same_on_both_sides():
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    found = heard(Noisy(), batches())
    assert found.verdict == "ignored"
    assert found.effects["repeat"].output.value == 0


def test_what_a_repetition_changes_as_well_is_not_put_down_to_the_condition():
    outside = np.random.default_rng(0)

    def noisy(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return x + torch.from_numpy(outside.normal(size=tuple(x.shape))).float()

    found = heard(noisy, batches())
    assert found.verdict == "ignored"
    assert found.effects["repeat"].output.value > 0.5
    assert "not clearly more than a repetition" in found.words


def test_a_policy_whose_success_falls_is_heard_though_chance_moves_the_outputs_as_much():
    outside = np.random.default_rng(0)

    def episode(x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        noise = torch.from_numpy(outside.normal(size=(len(x), 7))).float()
        return torch.cat([cond, 30 * noise], dim=1)

    goals = [(x, z, z) for x, z, _ in batches()]
    found = heard(episode, goals, success=lambda y, goal: (y[:, :7] - goal).abs().amax(1) < 0.1)
    assert found.effects["swap"].beyond.output.low < 0
    assert found.verdict == "heard"
    assert found.effects["swap"].success.value == -1


def test_a_module_predicts_while_it_is_measured_and_keeps_its_modes_also_after_an_exception():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.norm = nn.Dropout(), nn.BatchNorm1d(5).eval()

        def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            assert not self.drop.training
            assert not torch.is_grad_enabled()
            return self.drop(self.norm(x)) + cond[:, :5]

    net, data = Net(), batches()
    assert heard(net, data).verdict == "heard"
    assert (net.training, net.drop.training, net.norm.training) == (True, True, False)
    net.forward = None
    with pytest.raises(TypeError):
        heard(net, data)
    assert net.drop.training


class Timed(nn.Module):
    """A network of two inputs, with statistics that training would change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x)) + t


def test_several_inputs_are_a_tuple():
    model = randomise(tf.condition(Timed(), "layer", tf.Vector(7)))
    x, t, z = torch.randn(11, 3), torch.randn(11, 1), torch.randn(11, 7)
    found = heard(model, [((x, t), z)])
    assert int(model.norm.num_batches_tracked) == 0
    assert model.training
    model.eval()
    assert found.effects == heard(lambda both, cond: model(*both, cond=cond), [([x, t], z)]).effects


def test_of_a_long_loader_a_few_arrays_are_kept():
    found = []

    def loader():
        for number in range(65):
            if number in (16, 64):
                taken = tracemalloc.take_snapshot()
                found.append(
                    len(taken.filter_traces([tracemalloc.Filter(True, "*/torchfilm/heard.py")]).traces)
                )
            yield torch.full((2, 5), float(number)), torch.arange(14.0).reshape(2, 7)

    tracemalloc.start()
    try:
        heard(listens, loader(), resamples=40)
    finally:
        tracemalloc.stop()
    assert found[1] < 2 * found[0]


def test_the_random_state_is_left_as_it_was():
    data, state = batches(), torch.get_rng_state()
    heard(listens, data)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_with_a_single_condition_are_left_out_and_counted():
    x, z = torch.randn(5, 3), torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0]])
    found = heard(lambda x, cond: cond, [(x, z), (x, torch.ones(5, 1))])
    assert (found.left_out, found.effects["swap"].output.n, found.effects["repeat"].output.n) == (5, 5, 10)
    assert "swap: 5 of 10 samples are in batches with a single condition" in str(found)


@pytest.mark.parametrize("size", [50, 200])
def test_a_majority_is_exchanged_as_a_whole_whatever_the_batches(size: int):
    classes = torch.tensor([0] * 180 + [1] * 20)[torch.randperm(200)]
    found = heard(
        lambda x, cond: cond.float(),
        [(one, one, one) for one in classes.split(size)],
        loss=lambda y, t: (1.0 + 10.0 * t) * (y != t),  # an error costs 1 for class 0, and 11 for class 1
    )
    swap = found.effects["swap"]
    assert (swap.loss.value, swap.loss.n, found.left_out) == (2.0, 200, 0)


def test_swaps_differ_between_seeds_and_agree_within_one():
    first, again, other = (heard(listens, batches_of(5), seed=seed).effects for seed in (1, 1, 2))
    assert first == again
    assert first["swap"] != other["swap"]


def batches_of(seed: int) -> list:
    torch.manual_seed(seed)
    return batches()


@pytest.mark.parametrize(
    "condition",
    [
        torch.tensor([3, 1, 3, 2]),
        (torch.randn(4, 2, 5), torch.tensor([[True, False]] * 4)),
        {"say": ["up", "down", "up", "left"], "at": torch.arange(4.0), "scale": 2.0, "none": None},
        ["up", "down", "up", "left"],
        np.arange(12.0).reshape(4, 3),
        torch.randn(4, 3, dtype=torch.bfloat16),
    ],
    ids=["classes", "tokens and mask", "dict", "texts", "array", "bfloat16"],
)
def test_every_structure_of_conditions_is_swapped_by_rows(condition: object):
    seen = []

    def model(x: torch.Tensor, cond: object) -> torch.Tensor:
        seen.append(keys(cond))
        return x

    heard(model, [(torch.randn(4, 3), condition)], resamples=40)
    right, again, swapped = seen[:3]
    assert right == again == keys(condition)
    assert set(swapped) <= set(right)
    assert all(a != b for a, b in zip(right, swapped, strict=True))


def test_a_blank_is_zero_or_no_words_and_what_has_no_zero_is_left_alone():
    mask = torch.tensor([[True, False], [True, True]])
    zeros, kept = blanked((torch.randn(2, 2, 5), mask))
    assert not zeros.any()
    assert kept is mask
    assert blanked({"say": ["up", "down"], "none": None}) == {"say": ["", ""], "none": None}
    assert blanked(torch.tensor([1, 2])) is None
    x = torch.randn(2, 3)
    found = heard(lambda x, cond: x, [(x, torch.tensor([1, 2]))])
    assert "blank" not in found.effects
    assert "a class has no zero" in str(found)


def test_a_blank_of_ones_own_may_also_be_no_condition_at_all():
    def model(x: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return x if cond is None else x + cond[:, None]

    found = heard(model, [(torch.randn(2, 3), torch.tensor([1, 2]))], blank=lambda condition: None)
    assert found.effects["blank"].output.value > 0


def length(x: torch.Tensor, cond: list[str]) -> torch.Tensor:
    return x[:, 0] + torch.tensor([float(len(text)) for text in cond])


def test_a_paraphrase_is_a_function_or_a_dict_or_a_pair_of_conditions():
    texts, x = ["go", "stop", "left"], torch.randn(3, 2)
    other = {"go": "on", "stop": "cease"}
    by_dict = heard(length, [(x, texts)], paraphrase=other).effects["paraphrase"]
    by_pair = heard(length, [(x, texts)], paraphrase=(["go", "stop"], ["on", "cease"])).effects["paraphrase"]
    assert by_dict == by_pair
    assert by_dict.output.n == 2
    function = heard(length, [(x, texts)], paraphrase=lambda words: [w[::-1] for w in words])
    assert function.effects["paraphrase"].output.value == 0
    assert "Other words for the same condition change it by 0.000 [0.000, 0.000]." in function.words


PLACES = {
    "a dict": (lambda words: {"say": words}, lambda cond: cond["say"]),
    "a tuple": (lambda words: (words,), lambda cond: cond[0]),
    "beside numbers": (lambda words: {"say": words, "at": torch.arange(3)}, lambda cond: cond["say"]),
    "a tuple of words": (tuple, lambda cond: cond),
    "an array": (np.array, lambda cond: cond),
    "an array of objects": (lambda words: np.array(words, dtype=object), lambda cond: cond),
}


@pytest.mark.parametrize(("put", "get"), PLACES.values(), ids=PLACES)
def test_texts_are_swapped_blanked_and_reworded_wherever_they_are(put, get):
    texts, x, other = ["go", "stop", "left"], torch.randn(3, 2), {"go": "onwards", "stop": "cease"}

    def model(x: torch.Tensor, cond: object) -> torch.Tensor:
        assert type(cond) is type(put(texts))
        return length(x, get(cond))

    expected = heard(length, [(x, texts)], paraphrase=other)
    found = heard(model, [(x, put(texts))], paraphrase=other)
    assert found.effects["paraphrase"] == expected.effects["paraphrase"]
    assert found.effects["paraphrase"].output.n == 2
    if put is not PLACES["beside numbers"][0]:
        assert found == expected


def test_outputs_may_be_words_classes_or_several_things():
    def says(x: torch.Tensor, cond: torch.Tensor) -> dict:
        return {"text": [str(c) for c in cond.tolist()], "class": cond, "level": x, "loss": x.sum()}

    x, z = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    found = heard(says, [(x, z)], blank=torch.zeros_like).effects["swap"].output
    assert found.value == pytest.approx(2 / 3)


def test_words_of_an_output_may_be_an_array():
    x, texts = torch.randn(4, 3), ["up", "down", "left", "up"]
    found = [heard(lambda x, cond, kind=kind: kind(cond), [(x, texts)]) for kind in (list, np.array)]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [torch.Tensor.conj, torch.Tensor.numpy])
def test_complex_outputs_differ_by_as_much_as_their_parts(kind):
    x, z = torch.arange(8.0)[:, None], torch.randn(8, 3)
    found = heard(lambda x, cond: kind(torch.complex(x + 1e-4 * cond, x * cond)), [(x, z)])
    expected = heard(lambda x, cond: torch.cat([x + 1e-4 * cond, x * cond], 1), [(x, z)])
    assert found.effects["swap"].output.value == pytest.approx(expected.effects["swap"].output.value)
    spectrum = torch.fft.rfft(z)
    assert heard(lambda x, cond: x + cond.abs(), [(x, spectrum)]).effects["blank"].output.value > 0


@pytest.mark.parametrize("empty", [(torch.zeros(0, 3), torch.zeros(0, 3)), (torch.zeros(0, 3), [])])
def test_an_empty_batch_has_no_part(empty: tuple):
    batch = (torch.randn(5, 3), torch.randn(5, 3))
    assert heard(listens, [batch, empty]) == heard(listens, [batch])
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        heard(listens, [empty])


def test_an_output_that_never_differs_naturally_can_still_change_without_bound():
    x = torch.tensor([[0.0], [1.0]])
    found = heard(lambda x, cond: (x + cond) % 2, [(x, x)])
    assert math.isinf(found.effects["swap"].output.value)
    assert found.verdict == "heard"


def test_all_numbers_come_as_plain_values():
    found = heard(listens, batches(), loss=squared).to_json()
    assert found["verdict"] == "heard"
    assert set(found["effects"]["swap"]["loss"]) == {"value", "low", "high", "n"}
    assert found["success"] is None


def test_the_report_is_a_table_with_a_line_for_each_change():
    text = str(heard(listens, batches(), loss=squared))
    names = [line.split("  ")[0] for line in text.splitlines()[2:7]]
    assert names == ["condition", "as it is", "repeat", "swap", "blank"]
    assert "success" not in text.splitlines()[2]


REFUSED = [
    ([], {}, "expected at least one batch, got none"),
    ([(torch.ones(3, 2), torch.ones(3, 2))], {}, "two different conditions, got none"),
    ([(torch.ones(3, 2), torch.rand(3, 2))], {"loss": squared}, "loss needs a target"),
    (torch.rand(2, 3), {}, r"got a Tensor"),
    ([(torch.ones(3, 2),)], {}, r"got a tuple of 1"),
    (
        [(torch.ones(3, 2), torch.rand(3, 2), None, [1, 2])],
        {},
        r"text for each of 3 samples, got 2: \[1, 2\]",
    ),
    ([(torch.ones(3, 2), torch.rand(3, 2), None, [[1]] * 3)], {}, r"got 3: \[\[1\], \[1\], \[1\]\]"),
    ([(torch.ones(4, 2), torch.tensor([0.0, -0.0] * 2))], {}, "two different conditions, got none"),
    ([(torch.ones(3, 2), torch.rand(3, 2))], {"resamples": 39}, "expected at least 40 resamples, got 39"),
    ([(torch.ones(3, 2), torch.rand(3, 2))], {"resamples": "99"}, "at least 40 resamples, got '99'"),
    ([(torch.ones(3, 2), 5)], {}, r"one row per sample in every part, got no rows"),
    ([(torch.ones(3, 2), {"a": torch.ones(3), "b": ["x", "y"]})], {}, r"got \[2, 3\] rows"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("given", "options", "message"), REFUSED)
def test_batches_that_cannot_be_measured_are_refused(given: object, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        heard(lambda x, cond: x, given, **options)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda x, cond: x.sum(), {}, r"outputs with one row for each of 3 samples, got shapes \[\]"),
        (lambda x, cond: x[:2], {}, r"got shapes \[\(2, 2\)\]"),
        (lambda x, cond: x / 0, {}, "got 3 of 3 samples with NaN or infinity"),
        (lambda x, cond: x, {"loss": lambda y, t: y.sum()}, r"for each of 3 samples, got shape \(\)"),
        (lambda x, cond: x, {"success": lambda y, t: t * math.nan}, "got NaN or infinity"),
        (lambda x, cond: x, {"success": lambda y, t: 100 + 0 * t}, "success to be 0..1 .* got 100 to 100"),
        (lambda x, cond: x[:, : 1 + int(cond[0] == 0)], {}, "one shape whatever the condition"),
        (lambda x, cond: (x,) * (1 + int(cond[0] == 0)), {}, "got 2 with the right ones and 1 without"),
        (lambda x, cond: x, {"paraphrase": (torch.ones(2), torch.ones(1))}, "got 1 for 2"),
    ],
)
def test_outputs_and_scores_that_cannot_be_compared_are_refused(model, options: dict, message: str):
    batch = (torch.rand(3, 2), torch.tensor([0.0, 1.0, 2.0]), torch.rand(3))
    with pytest.raises(ValueError, match=message):
        heard(model, [batch], **options)


@pytest.mark.parametrize("several", [False, True])
def test_a_network_that_knows_what_is_missing_is_blanked_by_it(several: bool):
    part = tf.Maybe(tf.Classes(11, 7))
    cond = tf.Several({"kind": part}) if several else part
    model = randomise(tf.condition(nn.Sequential(nn.Linear(5, 1)), "0", cond)).eval()
    x, kinds = torch.randn(11, 5), torch.arange(11)
    found = heard(model, [(x, {"kind": kinds} if several else kinds)])
    given = model(x, cond={"kind": kinds} if several else kinds)
    blank = model(x, cond={} if several else tf.Masked(None))
    expected = oracles.relative_change(
        *(y.detach().expand(11, 1)[:, 0].double().numpy() for y in (given, blank))
    )
    assert found.effects["blank"].output.value == pytest.approx(expected, rel=1e-4)
    assert not any("blank" in note for note in found.notes)
