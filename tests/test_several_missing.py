"""What missing conditions hold, and which of several are lost together."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise

PRESENT = torch.tensor([True, False, True, True, False])


class Logs(nn.Module):
    """An encoder that takes no zero, of a vector or of a mapping."""

    dim = 7

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 7)

    def forward(self, v: torch.Tensor | dict) -> torch.Tensor:
        return self.layer((v if isinstance(v, torch.Tensor) else v["level"]).log())


class Layer(nn.Linear):
    """An encoder with a weight that meets what it is given."""

    def __init__(self) -> None:
        super().__init__(3, 7)
        self.dim = 7


BROKEN = {
    "numbers": (lambda: tf.Maybe(tf.Scalars(3, 12, learned=True)), lambda v: v),
    "tokens": (lambda: tf.Maybe(tf.Tokens(3, "attention")), lambda v: v[:, None].expand(5, 2, 3)),
    "tokens and mask": (
        lambda: tf.Maybe(tf.Tokens(3, "attention")),
        lambda v: (v[:, None].expand(5, 2, 3), torch.ones(5, 2, dtype=torch.bool)),
    ),
    "several": (lambda: tf.Maybe(tf.Several({"v": tf.Scalars(3, 6, learned=True)})), lambda v: {"v": v}),
    "one of several": (lambda: tf.Several({"v": tf.Scalars(3, 6, learned=True)}), None),
    "one's own": (lambda: tf.Maybe(Layer()), lambda v: v),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("as_what", [torch.tensor, list, np.array])
def test_what_is_no_number_where_it_is_missing_reaches_neither_output_nor_gradients(name, as_what):
    make, given = BROKEN[name]
    encoder = randomise(make())
    whole = torch.rand(5, 3)
    broken = whole.clone()
    broken[1], broken[4] = float("nan"), float("inf")
    results = []
    for value in (whole, broken):
        mask = as_what(PRESENT.tolist())
        given_value = {"v": tf.Masked(value, mask)} if given is None else tf.Masked(given(value), mask)
        encoder.zero_grad()
        z = encoder(given_value)
        z.square().sum().backward()
        results.append((z.detach(), [p.grad.clone() for p in encoder.parameters()]))
    (expected, gradients), (found, others) = results
    assert torch.equal(found, expected)
    for one, other in zip(gradients, others, strict=True):
        assert torch.equal(one, other)


def test_finite_numbers_where_it_is_missing_stay_as_they_are_for_encoders_that_take_no_zero():
    encoder = tf.Maybe(Logs())
    for given in (torch.ones(5, 3), {"level": torch.ones(5, 3)}):
        encoder(tf.Masked(given, PRESENT)).sum().backward()
        assert encoder.condition.layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("index", [-1, -100, 11, 255])
def test_a_class_that_there_is_not_may_stand_where_it_is_missing(named: bool, index: int):
    classes = tf.Maybe(randomise(tf.Classes(11, 7)))
    encoder = tf.Several({"kind": classes}) if named else classes
    for given in (torch.tensor([3, index, 5, 0, 1]), torch.tensor([3, 10, 5, 0, 1])):
        masked = tf.Masked(given, PRESENT)
        z = encoder({"kind": masked} if named else masked)
        assert torch.equal(z, torch.where(PRESENT[:, None], classes.condition.table(given.clamp(0, 10)), 0))
    with pytest.raises(IndexError, match=f"from 0 to 10, got {index}"):
        classes(tf.Masked(torch.tensor([3, 5, index, 0, 1]), PRESENT))


def test_whole_numbers_from_zero_on_stay_as_they_are_where_they_are_missing():
    class Counts(Logs):
        def forward(self, v: torch.Tensor) -> torch.Tensor:
            return super().forward(v.float())

    encoder = tf.Maybe(Counts())
    for dtype in (torch.int64, torch.uint16):
        encoder(tf.Masked(torch.full((5, 3), 2, dtype=dtype), PRESENT)).sum().backward()
        assert encoder.condition.layer.weight.grad.isfinite().all()


def test_one_number_may_be_missing():
    class Level(nn.Module):
        dim = 2

        def forward(self, level: torch.Tensor) -> torch.Tensor:
            return torch.stack([level, -level], dim=-1)

    encoder = tf.Maybe(Level())
    assert torch.equal(encoder(tf.Masked(torch.tensor(3.0), False)), encoder(None))
    assert torch.equal(encoder(tf.Masked(torch.tensor(3.0), True)), torch.tensor([3.0, -3.0]))


MASKS = {
    r"got torch.float32 .*\nFor 0 and 1 with 1 for present use present.bool\(\)": ((5, 7), PRESENT.float()),
    r"got torch.bool \(5, 1\).\nA sample is there as a whole.*all\(dim=-1\)": ((5, 7), PRESENT[:, None]),
    r"one per sample \(\), .* \(5,\).\nA value that all samples share": ((7,), PRESENT),
    r"one per sample \(5,\), .* \(3,\).\nGive as many as there are samples": ((5, 7), PRESENT[:3]),
}


@pytest.mark.plain
@pytest.mark.parametrize("message", MASKS)
def test_a_mask_that_does_not_fit_is_refused_with_what_would(message):
    shape, present = MASKS[message]
    with pytest.raises(ValueError, match=message):
        tf.Maybe(tf.Vector(7))(tf.Masked(torch.rand(shape), present))


class Spectral(nn.Module):
    """An encoder with a complex parameter."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return (torch.fft.fft(v) * self.weight).abs()


def test_an_encoder_with_a_complex_parameter_may_be_missing():
    encoder = tf.Maybe(Spectral())
    z = encoder(None)
    assert z.dtype == torch.float32
    z.sum().backward()
    assert torch.equal(encoder.condition.weight.grad, torch.zeros(3, dtype=torch.complex64))


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_may_have_a_condition_that_is_missing():
    class Unconditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = randomise(tf.Maybe(Layer()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.encoder(None)

    traced, x = torch.jit.trace(Unconditional(), torch.randn(2, 7)), torch.randn(3, 7)
    assert torch.equal(traced(x), x + traced.encoder.null)


@pytest.mark.plain
def test_a_condition_that_is_missing_compiles_in_one_graph_with_gradients():
    encoder = randomise(tf.Maybe(Layer()))
    compiled = torch.compile(lambda x: x + encoder(None), backend="eager", fullgraph=True)
    compiled(torch.zeros(2, 7)).sum().backward()
    assert torch.equal(encoder.null.grad, torch.full((7,), 2.0))
    assert torch.equal(encoder.condition.weight.grad, torch.zeros(7, 3))


def parts_of(**maybe: bool) -> dict[str, nn.Module]:
    return {name: tf.Maybe(tf.Vector(2)) if may else tf.Vector(2) for name, may in maybe.items()}


JOINT = [
    ({"a": True, "b": True, "c": True}, None, ("a", "b", "c"), ()),
    ({"a": False, "b": True, "c": True}, None, ("b", "c"), ("a",)),
    ({"a": False, "b": False, "c": False}, None, ("a", "b", "c"), ()),
    ({"a": False, "b": False, "c": False}, ("b", "c"), ("b", "c"), ("a",)),
    ({"a": True, "b": True, "c": False}, ["c"], ("c",), ()),
    ({"a": False, "b": True, "c": True}, ["b"], ("b",), ("a",)),
]


@pytest.mark.parametrize(("maybe", "joint", "lost", "required"), JOINT)
def test_those_that_are_named_are_lost_together_and_what_never_is_is_asked_for(maybe, joint, lost, required):
    both = tf.Several(parts_of(**maybe), joint_dropout=0.5, joint=joint).train()
    assert (both.joint, both.required) == (lost, required)
    gone = both({name: torch.ones(400, 2) for name in maybe}).view(400, 3, 2).eq(0).all(dim=2)
    share = {name: gone[:, i].float().mean().item() for i, name in enumerate(maybe)}
    assert {name for name in maybe if share[name]} == set(lost)
    assert all(0.3 < share[name] < 0.7 for name in lost)
    together = gone[:, [name in lost for name in maybe]]
    assert torch.equal(together.all(dim=1), together.any(dim=1))
    assert both({name: torch.ones(3, 2) for name in required}).shape[-1] == 6
    both.joint_dropout = 0.0
    assert both.required == tuple(name for name, may in maybe.items() if not may)


def test_what_is_lost_together_is_shown():
    assert "joint_dropout=0.1 of b" in repr(tf.Several(parts_of(a=False, b=True), joint_dropout=0.1))
    assert "of b" not in repr(tf.Several(parts_of(a=False, b=True)))


def test_a_single_sample_without_a_batch_axis_is_lost_as_a_whole():
    maybe = randomise(tf.Maybe(tf.Vector(7), dropout=0.5)).train()
    lost = [bool((maybe(torch.ones(7)) == maybe.null).all()) for _ in range(40)]
    assert 5 < sum(lost) < 35
    kept = [torch.equal(maybe(torch.ones(7)), torch.ones(7)) for _ in range(40)]
    assert 5 < sum(kept) < 35


def test_a_vector_that_all_samples_share_is_lost_by_each_for_itself():
    both = tf.Several(parts_of(a=True, b=True), joint_dropout=0.5).train()
    gone = both({"a": torch.ones(2), "b": torch.ones(400, 2)}).eq(0)
    assert torch.equal(gone[:, :2], gone[:, 2:])
    assert 0.3 < gone.float().mean() < 0.7
    assert both({"a": torch.ones(2), "b": torch.ones(2, 2)}).shape == (2, 4)


def test_a_list_that_says_who_is_present_serves_on_every_device():
    maybe = tf.Maybe(tf.Vector(7), device="meta")
    assert maybe(tf.Masked(torch.empty(2, 7, device="meta"), [True, False])).is_meta


def test_none_need_be_lost_together_where_none_are():
    assert tf.Several({"a": tf.Vector(7)}, joint=[]).joint == ()


@pytest.mark.parametrize("condition", [tf.Vector(7), tf.Classes(11, 7)], ids=["vector", "classes"])
def test_a_zero_null_is_where_the_condition_is(condition: nn.Module):
    maybe = tf.Maybe(condition, null="zero")
    older = pickle.loads(pickle.dumps(maybe))
    del older.place  # as of before it remembered its place
    for one in (maybe, older):
        assert one(None).device.type == "cpu"
        assert not one(None).any()
    for there in (copy.deepcopy(maybe).to("meta"), tf.Maybe(tf.Vector(7), null="zero", device="meta")):
        assert there(None).device.type == "meta"
        assert not there.to_empty(device="cpu")(None).any()


def test_a_zero_null_is_where_tensors_are_assigned_to_a_network_on_meta():
    def made() -> nn.Module:
        both = tf.Several({"a": tf.Maybe(tf.Vector(7), null="zero"), "b": tf.Vector(3)})
        return tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", both)

    model, x, z = randomise(made()), torch.randn(2, 3), torch.randn(2, 3)
    with torch.device("meta"):
        other = made()
    assert other(x.to("meta"), cond={"b": z.to("meta")}).is_meta
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(x, cond={"b": z}), model(x, cond={"b": z}))


def test_a_null_of_zero_has_nothing_that_processes_send_round():
    maybe = tf.Maybe(tf.Vector(7), null="zero")
    assert not [*maybe.parameters(), *maybe.buffers()]
