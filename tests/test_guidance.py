"""Guidance: the exact ends, the published sums, and what is repeated for them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise


class Net(nn.Module):
    """A convolution, a norm and a head: what is conditioned here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.out = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        y = self.out(self.norm(self.conv(x)).relu())
        return y if shift is None else y + shift[:, None, None, None]


def conditioned(spec: nn.Module, **options: object) -> nn.Module:
    return randomise(tf.condition(Net(), "norm", spec, **options)).eval()


def several() -> tf.Several:
    parts = {"text": tf.Maybe(tf.Vector(7)), "style": tf.Maybe(tf.Classes(11, 5))}
    return tf.Several({"time": tf.Scalars(1, 4), **parts})


def given() -> dict[str, torch.Tensor]:
    return {
        "time": torch.rand(5, 1),
        "text": torch.randn(5, 7),
        "style": torch.randint(11, (5,)),
    }


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 2, 4, 6)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(11, (5,))


class Keyed(nn.Module):
    """A network that is called by keyword, as those of diffusers are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, sample, *, timestep, gain=None, extra=None):
        y = self.net(sample, timestep) * (1 if gain is None else gain)
        return y if extra is None else y + extra["by"][:, None, None, None]


def test_tensors_by_keyword_with_a_row_per_sample_are_repeated_like_those_by_position(x, labels):
    model = randomise(tf.condition(Keyed(), "net.norm", tf.Maybe(tf.Classes(11, 7)))).eval()
    t, extra, gain = torch.rand(5), {"by": torch.rand(5)}, torch.rand(1, 2, 1, 1)
    missing = tf.Masked(labels, torch.zeros(5, dtype=torch.bool))
    rest = {"timestep": t, "extra": extra, "gain": gain}
    low, high = model(x, cond=missing, **rest), model(x, cond=labels, **rest)
    torch.testing.assert_close(tf.guide(model, x, cond=labels, scale=3.0, **rest), low + 3 * (high - low))
    torch.testing.assert_close(
        tf.guide(model, sample=x, cond=labels, scale=3.0, **rest), low + 3 * (high - low)
    )
    same = tf.guide(model, sample=x, cond=labels[:1], scale=3.0, **rest)
    assert same.shape == x.shape


@pytest.mark.parametrize("space", ["output", "modulation"])
def test_a_scale_of_one_is_the_conditional_output_and_zero_the_unconditional_one_to_the_bit(x, labels, space):
    model = conditioned(tf.Maybe(tf.Classes(11, 7), dropout=0.1))
    missing = tf.Masked(labels, torch.tensor([False]).expand(5))
    assert torch.equal(tf.guide(model, x, cond=labels, scale=1.0, space=space), model(x, cond=labels))
    assert torch.equal(tf.guide(model, x, cond=labels, scale=0.0, space=space), model(x, cond=missing))
    assert not torch.allclose(model(x, cond=labels), model(x, cond=missing))


def test_beyond_one_the_output_goes_on_in_the_direction_of_the_condition(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    with_it, without = model(x, cond=labels), model(x, cond=tf.Masked(None))
    for scale in (0.3, 3.0, -1.0):
        expected = without + scale * (with_it - without)
        torch.testing.assert_close(tf.guide(model, x, cond=labels, scale=scale), expected)


def test_every_sample_may_have_a_scale_of_its_own(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    scales = torch.tensor([0.0, 1.0, 2.0, -1.0, 7.5])
    y = tf.guide(model, x, cond=labels, scale=scales)
    for i, scale in enumerate(scales.tolist()):
        alone = tf.guide(model, x[i : i + 1], cond=labels[i : i + 1], scale=scale)
        torch.testing.assert_close(y[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["output", "modulation"])
def test_scales_may_be_a_list(x, labels, space: str):
    model, scales = conditioned(tf.Maybe(tf.Classes(11, 7))), [0, 1.0, 2.0, -1.0, 7.5]
    expected = tf.guide(model, x, cond=labels, scale=torch.tensor(scales), space=space)
    for device in ("cpu", "meta"):  # whatever the default is
        with torch.device(device):
            assert torch.equal(tf.guide(model, x, cond=labels, scale=scales, space=space), expected)
    both, cond = conditioned(several()), given()
    named = [tf.guide(both, x, cond=cond, scale={"style": s, "text": 2.0}, space=space) for s in (3.0, [3.0])]
    torch.testing.assert_close(*named)


def test_several_conditions_come_in_one_after_the_other_each_with_its_scale(x):
    model, cond = conditioned(several()), given()
    neither = model(x, cond={"time": cond["time"]})
    one = model(x, cond={"time": cond["time"], "style": cond["style"]})
    both = model(x, cond=cond)
    expected = neither + 1.5 * (one - neither) + 4.0 * (both - one)
    torch.testing.assert_close(tf.guide(model, x, cond=cond, scale={"style": 1.5, "text": 4.0}), expected)


@pytest.mark.parametrize("space", ["output", "modulation"])
def test_scales_of_zero_and_one_for_several_conditions_are_exact_too(x, space):
    model, cond = conditioned(several()), given()
    some = {"time": cond["time"], "style": cond["style"]}
    for scale, present in [({"style": 1.0, "text": 1.0}, cond), ({"style": 1.0, "text": 0.0}, some)]:
        y = tf.guide(model, x, cond=cond, scale=scale, space=space)
        torch.testing.assert_close(y, model(x, cond=present), rtol=0, atol=0)


class Counting:
    """A function of features and a condition that remembers how many rows it was called with."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: torch.Tensor, *, cond: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return x * cond


def test_one_call_computes_the_outputs_that_are_needed_and_no_others():
    model, x = Counting(), torch.randn(3, 2)
    cond = {"a": torch.randn(3, 2), "b": torch.randn(3, 2)}
    nulls = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}

    def product(x, *, cond):
        return model(x, cond=cond["a"] + cond["b"])

    tf.guide(product, x, cond=cond, null=nulls, scale={"a": 2.0, "b": 3.0})
    tf.guide(product, x, cond=cond, null=nulls, scale={"a": 2.0, "b": 2.0})
    tf.guide(product, x, cond=cond, null=nulls, scale={"a": 1.0, "b": 1.0})
    assert model.rows == [9, 6, 3]


def test_any_function_is_guided_with_a_null_of_its_own():
    x, cond = torch.randn(3, 2), torch.randn(3, 2)
    y = tf.guide(lambda x, cond: x * cond, x, cond=cond, null=torch.ones(1, 2), scale=4.0)
    torch.testing.assert_close(y, x + 4.0 * (x * cond - x))


def test_in_modulation_space_gamma_and_beta_are_extrapolated_and_the_network_runs_once(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    film = tf.conditioning(model)
    one, none = film.modulations(labels)["norm"], film.modulations(tf.Masked(None))["norm"]
    gamma = none.gamma + 3.0 * (one.gamma - none.gamma)
    beta = none.beta + 3.0 * (one.beta - none.beta)
    rows = []
    handle = model.conv.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    y = tf.guide(model, x, cond=labels, scale=3.0, space="modulation")
    handle.remove()
    assert rows == [5]
    torch.testing.assert_close(y, model(x, modulation={"norm": tf.Modulation(gamma, beta)}))


def test_in_modulation_space_a_scale_per_sample_and_a_gate_are_taken_along(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)), emit=("gamma", "beta", "gate"), gate_start=1.0)
    scales = torch.tensor([0.0, 1.0, 2.0, -1.0, 7.5])
    y = tf.guide(model, x, cond=labels, scale=scales, space="modulation")
    for i, scale in enumerate(scales.tolist()):
        alone = tf.guide(model, x[i : i + 1], cond=labels[i : i + 1], scale=scale, space="modulation")
        torch.testing.assert_close(y[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_positional_tensors_are_repeated_and_keywords_are_passed_on(x, labels):
    model, shift = conditioned(tf.Maybe(tf.Classes(11, 7))), torch.randn(5)
    with_it, without = model(x, shift, cond=labels), model(x, shift, cond=tf.Masked(None))
    torch.testing.assert_close(
        tf.guide(model, x, shift, cond=labels, scale=2.0), without + 2.0 * (with_it - without)
    )
    alone = tf.guide(model, x[:1], cond=labels[:1], scale=1.0, shift=shift[:1])
    torch.testing.assert_close(alone, model(x[:1], shift[:1], cond=labels[:1]))


def test_samples_that_miss_the_condition_anyway_are_left_alone(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    cond = tf.Masked(labels, torch.tensor([True, False, True, False, True]))
    y = tf.guide(model, x, cond=cond, scale=3.0)
    torch.testing.assert_close(y[1::2], model(x, cond=tf.Masked(None))[1::2])
    torch.testing.assert_close(y[::2], tf.guide(model, x[::2], cond=labels[::2], scale=3.0))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_tokens_with_their_mask_are_guided(x, pooling):
    model = conditioned(tf.Maybe(tf.Tokens(7, pooling)))
    cond = (torch.randn(5, 3, 7), torch.rand(5, 3) < 0.7)
    with_it, without = model(x, cond=cond), model(x, cond=tf.Masked(None))
    torch.testing.assert_close(tf.guide(model, x, cond=cond, scale=2.0), without + 2.0 * (with_it - without))


def test_numbers_are_conditions_for_all_samples(x):
    model = conditioned(tf.Vector(7))
    tf.tabulate(model, conds=torch.randn(11, 7))
    low, high = model(x, cond=0), model(x, cond=5)
    for cond, null in [(5, 0), (torch.full((5,), 5), 0), (5, torch.tensor([0])), (5, torch.zeros(5).long())]:
        y = tf.guide(model, x, cond=cond, null=null, scale=3.0)
        torch.testing.assert_close(y, low + 3 * (high - low), rtol=1e-4, atol=1e-4)


class Words(nn.Module):
    """An encoder of texts, by their letters."""

    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, 4)

    def forward(self, texts: list[str]) -> torch.Tensor:
        letters = [torch.tensor([ord(letter) for letter in text], dtype=torch.long) for text in texts]
        return torch.stack([self.letters(one).sum(dim=0) for one in letters])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_lists_of_texts_are_joined(batch: int, named: bool):
    spec = tf.Several({"text": Words(), "more": Words()}) if named else Words()
    model, x, texts = conditioned(spec), torch.randn(batch, 2, 4, 6), ["red", "blue", "green"][:batch]
    cond = {"text": texts, "more": texts} if named else texts
    low = model(x, cond={**cond, "text": [""] * batch} if named else [""] * batch)
    high = model(x, cond=cond)
    for null in ([""], [""] * batch, ""):
        given = ({"text": null}, {"text": 3.0}) if named else (null, 3.0)
        y = tf.guide(model, x, cond=cond, null=given[0], scale=given[1])
        torch.testing.assert_close(y, low + 3 * (high - low), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("same", [torch.tensor(4), torch.tensor([4])])
def test_in_modulation_space_one_condition_for_all_has_a_scale_for_each(same):
    model, x = conditioned(tf.Maybe(tf.Classes(11, 7))), torch.randn(3, 2, 4, 6)
    scales = torch.tensor([0.0, 3.0, -2.0])
    y = tf.guide(model, x, cond=same, scale=scales, space="modulation")
    for i, scale in enumerate(scales.tolist()):
        alone = tf.guide(model, x[i : i + 1], cond=same, scale=scale, space="modulation")
        torch.testing.assert_close(y[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("null", [torch.zeros(7), torch.zeros(4, 7)], ids=["for all", "per sample"])
def test_in_modulation_space_a_null_meets_a_condition_per_token(null):
    model = randomise(tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Vector(7))).eval()
    x, cond, film = torch.randn(4, 3, 2), torch.randn(4, 3, 7), tf.conditioning(model)
    none, some = film.modulations(torch.zeros(4, 3, 7))["0"], film.modulations(cond)["0"]
    for scale in (2.0, torch.tensor([2.0, 0.0, -1.0, 1.0])):
        by = scale if isinstance(scale, float) else scale[:, None, None]
        gamma, beta = none.gamma + by * (some.gamma - none.gamma), none.beta + by * (some.beta - none.beta)
        y = tf.guide(model, x, cond=cond, null=null, scale=scale, space="modulation")
        torch.testing.assert_close(y, model(x, modulation={"0": tf.Modulation(gamma, beta)}))


@pytest.mark.parametrize("space", ["output", "modulation"])
def test_scales_may_have_an_axis_of_one_behind_the_batch(space: str):
    model = randomise(tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", tf.Maybe(tf.Vector(7)))).eval()
    x, cond, scale = torch.randn(5, 2), torch.randn(5, 7), torch.randn(5)
    first = (lambda x, cond: model(x, cond=cond)[:, 0]) if space == "output" else model
    y = tf.guide(first, x, cond=cond, scale=scale[:, None], space=space)
    torch.testing.assert_close(y, tf.guide(first, x, cond=cond, scale=scale, space=space))
    with pytest.raises(ValueError, match=r"a scale for each of 5 samples, got \(3,\) of them"):
        tf.guide(first, x, cond=cond, scale=torch.ones(3) * 2, space=space)


def test_a_tensor_with_one_row_in_front_is_shared_by_all_samples(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    low, high = model(x, cond=tf.Masked(None)) + 3, model(x, cond=labels) + 3
    swapped = lambda shift, x, cond: model(x, cond=cond) + shift  # noqa: E731
    for cond, wanted in ((labels, high), (labels[:1], model(x, cond=labels[:1]) + 3)):
        y = tf.guide(swapped, torch.full((1, 1, 1, 1), 3.0), x, cond=cond, scale=2.0)
        torch.testing.assert_close(y, low + 2 * (wanted - low))


@dataclass
class Step:
    """What a network may return that is no pytree."""

    sample: torch.Tensor
    extra: dict[str, torch.Tensor]
    name: str = "velocity"


def test_the_fields_of_dataclasses_are_guided(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))

    def step(x, cond):
        y = model(x, cond=cond)
        return Step(y, {"twice": 2 * y})

    expected = tf.guide(model, x, cond=labels, scale=3.0)
    found = tf.guide(step, x, cond=labels, scale=3.0)
    torch.testing.assert_close(found.sample, expected)
    torch.testing.assert_close(found.extra["twice"], 2 * expected)
    assert found.name == "velocity"
    with pytest.raises(ValueError, match=r"got a ndarray, which would stay unguided(.|\n)*use_cache=False"):
        tf.guide(lambda x, cond: model(x, cond=cond).detach().numpy(), x, cond=labels, scale=3.0)


def test_a_mapping_that_is_missing_for_some_is_guided(x):
    inner = tf.Maybe(tf.Several({"u": tf.Maybe(tf.Vector(3)), "v": tf.Vector(2)}))
    model = conditioned(tf.Several({"n": inner, "time": tf.Scalars(1, 4)}))
    given = {"u": torch.randn(5, 3), "v": torch.randn(5, 2)}
    for value in (given, tf.Masked(given, torch.rand(5) < 0.5)):
        cond = {"n": value, "time": torch.rand(5, 1)}
        low, high = model(x, cond={**cond, "n": None}), model(x, cond=cond)
        y = tf.guide(model, x, cond=cond, scale={"n": 2.0})
        torch.testing.assert_close(y, low + 2 * (high - low))


@pytest.mark.parametrize("as_what", [np.array, list, torch.tensor])
def test_masks_come_as_others_write_them(x, labels, as_what):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    present = [True, False, True, False, True]
    expected = tf.guide(model, x, cond=tf.Masked(labels, torch.tensor(present)), scale=3.0)
    assert torch.equal(tf.guide(model, x, cond=tf.Masked(labels, as_what(present)), scale=3.0), expected)


def test_what_the_network_was_always_given_is_not_dropped(x):
    model, cond = conditioned(several()), given()
    with pytest.raises(ValueError, match=r"may be missing, got \['time'\], whose null training never met"):
        tf.guide(model, x, cond=cond, scale={"text": 2.0, "time": 2.0})
    assert tf.guide(model, x, cond=cond, scale={"time": 1.0}).shape == x.shape
    null = {"time": torch.zeros(1, 1)}
    assert tf.guide(model, x, cond=cond, null=null, scale={"text": 2.0, "time": 2.0}).shape == x.shape


def test_one_condition_for_all_samples_is_spread(x):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    for same in (torch.tensor(4), torch.tensor([4])):
        y = tf.guide(model, x, cond=same, scale=2.0)
        torch.testing.assert_close(y, tf.guide(model, x, cond=torch.full((5,), 4), scale=2.0))


def test_half_precision_is_weighted_in_float32_and_rounded_once():
    x, cond = torch.randn(3, 2).bfloat16(), torch.randn(3, 2).bfloat16()
    y = tf.guide(lambda x, cond: x * cond, x, cond=cond, null=torch.ones(1, 2).bfloat16(), scale=7.5)
    expected = -6.5 * x.float() + 7.5 * (x * cond).float()
    assert torch.equal(y, expected.bfloat16())


def test_complex_outputs_are_guided():
    x, cond, null = (torch.randn(3, 2, dtype=torch.complex64) for _ in range(3))
    y = tf.guide(lambda x, cond: x * cond, x, cond=cond, null=null, scale=3.0)
    torch.testing.assert_close(y, x * null + 3 * (x * cond - x * null))


def test_every_tensor_of_the_output_is_guided():
    def model(x, cond):
        return {"noise": x * cond, "steps": torch.arange(len(x)), "name": "velocity"}

    x, cond = torch.randn(3, 2), torch.randn(3, 2)
    y = tf.guide(model, x, cond=cond, null=torch.zeros(1, 2), scale=2.0)
    torch.testing.assert_close(y["noise"], 2.0 * x * cond)
    assert y["steps"].tolist() == [3, 4, 5]
    assert y["name"] == "velocity"


@pytest.mark.plain
def test_it_works_compiled(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = tf.guide(model, x, cond=labels, scale=2.0)
    torch.testing.assert_close(tf.guide(compiled, x, cond=labels, scale=2.0), expected)


class Guided(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.model, self.options = conditioned(several()), options

    def forward(self, x: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return tf.guide(self.model, x, cond=given, scale={"text": 3.0, "style": [2.0]}, **self.options)


@pytest.mark.plain
@pytest.mark.parametrize("space", ["output", "modulation"])
def test_it_is_compiled_and_exported_as_a_part_of_a_network_for_every_batch_size(x, space: str):
    guided, cond = Guided(space=space).eval(), given()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = (batch, dict.fromkeys(cond, batch))
    runs = [
        torch.compile(guided, fullgraph=True, dynamic=True, backend="eager"),
        torch.export.export(guided, (x, cond), dynamic_shapes=shapes, strict=False).module(),
    ]
    for rows in (5, 3):
        less = {name: value[:rows] for name, value in cond.items()}
        for run in runs:
            torch.testing.assert_close(run(x[:rows], less), guided(x[:rows], less))


LABELS = torch.tensor([3, 4, 5, 6, 7])
REFUSED = [
    ({"cond": LABELS, "scale": {"text": 2.0}}, "expected one scale for one condition, got scales for"),
    ({"cond": {"text": LABELS}, "scale": 2.0}, r"expected a scale by name .*, got 2.0[\s\S]*'text': 3.0"),
    ({"cond": {"text": LABELS}, "scale": {"txt": 2.0}}, r"among \['text'\], got \['txt'\]"),
    (
        {"cond": LABELS, "scale": 2.0, "space": "latent"},
        r"space expected one of \['output', 'modulation'\], got 'latent'",
    ),
    *[
        (
            {"cond": LABELS, "scale": scale},
            r"a scale that is a number, .* got (None|'2'|\['2'\]).\nGive scale=3.0",
        )
        for scale in (None, "2", ["2"])
    ],
    (
        {"cond": LABELS, "scale": 2.0, "null": "none"},
        "tensors, numbers or lists of texts .*, got str and Tensor",
    ),
    ({"cond": ["a", "b"], "scale": 2.0, "null": ""}, r"number for each of 5 samples, .* got \['a', 'b'\]"),
    (
        {"cond": LABELS, "scale": 2.0, "null": torch.arange(3)},
        r"of 5 rows, or one, .* got \[\(3,\), \(5,\)\]",
    ),
]


@pytest.mark.plain
@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_guided_is_refused(x, arguments, message):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    with pytest.raises(ValueError, match=message):
        tf.guide(model, x, **arguments)


def test_a_condition_that_cannot_be_missing_is_refused(x, labels):
    model = conditioned(tf.Classes(11, 7))
    with pytest.raises(ValueError, match=r"expected a condition that may be missing, got Net[\s\S]*Maybe"):
        tf.guide(model, x, cond=labels, scale=2.0)
    assert torch.equal(tf.guide(model, x, cond=labels, scale=1.0), model(x, cond=labels))


def test_modulation_space_is_refused_without_modulations(x, labels):
    with pytest.raises(ValueError, match="expected a conditioned network, got function"):
        tf.guide(lambda x, cond: x, x, cond=labels, null=labels, scale=2.0, space="modulation")
    with pytest.raises(ValueError, match="expected a conditioned network, got a plain one"):
        tf.guide(Net(), x, cond=labels, null=labels, scale=2.0, space="modulation")
    model = conditioned(tf.Maybe(tf.Classes(11, 7)), fusion="low_rank")
    with pytest.raises(ValueError, match=r"expected a Modulation at 'norm', got [\s\S]*space='output'"):
        tf.guide(model, x, cond=labels, scale=2.0, space="modulation")


def test_outputs_without_rows_are_refused(x, labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    for output, shape in ((lambda y: y.mean(), r"\(\)"), (lambda y: y[:4], r"\(4, 2, 4, 6\)")):
        with pytest.raises(
            ValueError, match=f"rows for each of 2 copies of a batch of 5, got a tensor {shape}"
        ):
            tf.guide(lambda x, cond, output=output: output(model(x, cond=cond)), x, cond=labels, scale=2.0)


@pytest.mark.parametrize("space", ["output", "modulation"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_no_condition_is_dropped_in_training_mode(x, labels, space, scale):
    model = conditioned(tf.Maybe(tf.Classes(11, 7), dropout=1.0))
    expected = tf.guide(model, x, cond=labels, scale=scale, space=space)
    model.film.train()
    torch.testing.assert_close(tf.guide(model, x, cond=labels, scale=scale, space=space), expected)
    assert model.film.cond.training


def test_a_batch_of_none_is_guided():
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    empty = tf.guide(model, torch.randn(0, 2, 4, 6), cond=torch.zeros(0, dtype=torch.long), scale=2.0)
    assert len(empty) == 0


def test_one_sample_beside_a_table_has_one_row(labels):
    model = conditioned(tf.Maybe(tf.Classes(11, 7)))
    placed = lambda x, table, cond: model(x, cond=cond) + table.sum()  # noqa: E731
    x, table = torch.randn(1, 2, 4, 6), torch.randn(7, 4)
    low, high = model(x, cond=tf.Masked(None)), model(x, cond=labels[:1])
    y = tf.guide(placed, x, table, cond=labels[:1], scale=2.0)
    torch.testing.assert_close(y, low + 2 * (high - low) + table.sum())
