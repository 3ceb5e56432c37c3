"""The heads of a generator: what they compute, what they share, what they cost, how they start."""

import pytest
import torch
from torch import nn

import oracles
import torchfilm as tf
from catalogue import randomise, refilled_by_name, refilled_by_type
from torchfilm.heads import AffineHead, LowRankHead

SITES = {"block1": 3, "block2": 5, "block3": 3}
WIDTHS = [6, 10, 6]
KINDS = ["linear", "shared", "lowrank:4", "table"]


def generator(head: str, **options: object) -> tf.Generator:
    return tf.Generator(7, SITES, head=head, **options)


def condition(head: str, batch: int = 2) -> torch.Tensor:
    return torch.randint(7, (batch,)) if head == "table" else torch.randn(batch, 7)


def raw_of(modulations: dict[str, tf.Modulation]) -> torch.Tensor:
    return torch.cat([torch.cat([m.gamma - 1, m.beta], dim=-1) for m in modulations.values()], dim=-1)


@pytest.mark.parametrize("head", KINDS)
def test_every_head_starts_as_the_identity_at_every_site(head):
    for m in generator(head)(condition(head)).values():
        assert torch.equal(m.gamma, torch.ones_like(m.gamma))
        assert torch.equal(m.beta, torch.zeros_like(m.beta))


@pytest.mark.parametrize("head", KINDS)
def test_every_head_learns_from_its_start(head):
    made = generator(head)
    sum((m.gamma.square() + m.beta).sum() for m in made(condition(head)).values()).backward()
    gradients = {name: p.grad.any().item() for name, p in made.named_parameters()}
    assert gradients.pop("head.down", False) is False  # its turn comes as soon as the layer above has moved
    assert all(gradients.values()), gradients


def test_a_low_rank_head_is_two_products():
    made = randomise(generator("lowrank:4")).double()
    z = torch.randn(2, 7).double()
    down, weight, bias = (
        p.detach().numpy() for p in (made.head.down, made.head.up.weight, made.head.up.bias)
    )
    inner = oracles.linear(z.numpy(), down, torch.zeros(4).double().numpy())
    expected = oracles.linear(inner, weight, bias)
    torch.testing.assert_close(raw_of(made(z)), torch.from_numpy(expected))
    assert torch.linalg.matrix_rank(raw_of(made(torch.randn(50, 7).double())) - made.head.up.bias) == 4


def test_a_shared_head_is_one_projection_for_each_width_and_an_offset_for_each_site():
    made = randomise(generator("shared")).double()
    z = torch.randn(2, 7).double()
    weight, bias = made.head.weight.detach().numpy(), made.head.bias.detach().numpy()
    expected = oracles.shared_head(z.numpy(), weight, bias, WIDTHS)
    torch.testing.assert_close(raw_of(made(z)), torch.from_numpy(expected))


def test_sites_of_one_width_hear_the_same_but_for_a_constant():
    made = randomise(generator("shared"))
    one, other = (made(torch.randn(1, 7)) for _ in range(2))
    torch.testing.assert_close(
        one["block1"].gamma - one["block3"].gamma, other["block1"].gamma - other["block3"].gamma
    )
    assert not torch.allclose(one["block1"].gamma, other["block1"].gamma)


def test_a_table_has_a_row_for_each_class():
    made = randomise(generator("table"))
    classes = torch.tensor([[4, 0], [4, 2]])
    torch.testing.assert_close(raw_of(made(classes)), made.head.weight[classes])


def test_weights_over_the_classes_mix_their_rows():
    made = randomise(generator("table"))
    weights = torch.tensor([[0.0, 0, 0, 0, 1, 0, 0], [0.25, 0.75, 0, 0, 0, 0, 0]])
    rows = made.head.weight
    expected = torch.stack([rows[4], 0.25 * rows[0] + 0.75 * rows[1]])
    torch.testing.assert_close(raw_of(made(weights)), expected)


def test_classes_without_vectors_and_a_table_condition_a_network():
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Classes(7), head="table")
    made = randomise(tf.conditioning(model).generator)
    assert made.head.weight.shape == (7, 10)
    x, classes = torch.randn(2, 3), torch.tensor([6, 0])
    m = made(classes)["0"]
    with tf.unconditioned(model):
        plain = model(x)
    torch.testing.assert_close(model(x, cond=classes), m.gamma * plain + m.beta)


@pytest.mark.parametrize(
    ("head", "count"),
    [
        ("linear", 22 * (7 + 1)),
        ("shared", 16 * 7 + 22),
        ("lowrank:4", 4 * 7 + 22 * (4 + 1)),
        ("table", 7 * 22),
    ],
)
def test_a_head_costs_what_its_formula_says(head, count):
    assert sum(p.numel() for p in generator(head).parameters()) == count


@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("options", [{}, {"trunk": (5, "silu")}, {"learned_scale": True}], ids=str)
def test_the_description_counts_every_parameter_once(head, options):
    if head == "table" and "trunk" in options:
        pytest.skip("a table reads classes")
    made = generator(head, **options)
    lines = [line.split() for line in made.describe().splitlines()[1:]]
    counts = [int(line[-2].replace(",", "")) for line in lines]
    assert sum(counts[:-1]) == counts[-1] == sum(p.numel() for p in made.parameters())
    shared = head in ("shared", "lowrank:4") or "trunk" in options
    assert ("(all sites)" in made.describe()) == shared


@pytest.mark.parametrize("head", KINDS)
def test_a_random_start_is_found_again_after_the_meta_device(head):
    for options in ({"init": "default"}, {"init": "default", "init_std": 0.1}):
        with torch.device("meta"):
            made = generator(head, **options)
        made.to_empty(device="cpu")
        torch.nn.utils.vector_to_parameters(
            torch.zeros(sum(p.numel() for p in made.parameters())), made.parameters()
        )
        for part in made.modules():
            if list(part.parameters(recurse=False)):
                part.reset_parameters()
        expected = {name: bool(p.any()) for name, p in generator(head, **options).named_parameters()}
        assert {name: bool(p.any()) for name, p in made.named_parameters()} == expected


@pytest.mark.parametrize("head", KINDS)
def test_every_parameter_of_a_head_lives_where_it_is_told(head):
    assert all(p.is_meta for p in generator(head, device="meta").parameters())


@pytest.mark.parametrize("head", KINDS)
def test_every_head_gives_float32_from_bfloat16_and_under_autocast(head):
    made, z = randomise(generator(head)), condition(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = made(z)
    within = made.bfloat16()(z.bfloat16() if z.is_floating_point() else z)
    for m in (*under.values(), *within.values()):
        assert m.gamma.dtype == m.beta.dtype == torch.float32


@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("refill", [refilled_by_type, refilled_by_name])
def test_no_head_is_a_layer_of_torch_for_the_hooks_of_others(head, refill):
    made = generator(head)
    before = {name: p.clone() for name, p in made.named_parameters()}
    made.apply(refill)
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())


@pytest.mark.plain
@pytest.mark.parametrize("head", KINDS)
def test_a_condition_of_another_size_is_refused(head):
    with pytest.raises(ValueError, match=r"condition: expected 7 numbers on the last axis \(cond_dim\)"):
        generator(head)(torch.randn(2, 5))


@pytest.mark.plain
@pytest.mark.parametrize("numbers", [torch.arange(7), torch.ones(2, 7) > 0])
@pytest.mark.parametrize("head", ["linear", "shared", "lowrank:4"])
def test_a_condition_of_other_numbers_is_refused(head: str, numbers: torch.Tensor):
    with pytest.raises(ValueError, match=r"expected floating-point numbers, got torch.(int64|bool)"):
        generator(head)(numbers)


def test_a_class_outside_the_table_is_refused():
    with pytest.raises(
        IndexError, match="Table of classes: expected an index from 0 to 6, got 7: out of range"
    ):
        generator("table")(torch.tensor([7]))


def test_the_paper_s_start_of_a_linear_head_is_reproduced_number_by_number():
    torch.manual_seed(5)
    made = AffineHead(7, 6, "default")
    torch.manual_seed(5)
    weight, bias = torch.empty(6, 7), torch.empty(6)
    nn.init.uniform_(weight, -(7**-0.5), 7**-0.5)
    nn.init.uniform_(bias, -(7**-0.5), 7**-0.5)
    assert torch.equal(made.weight, weight)
    assert torch.equal(made.bias, bias)


def test_a_low_rank_head_goes_down_as_a_linear_layer_of_torch_starts():
    down = LowRankHead(400, 6, 50).down
    assert 0.95 * 400**-0.5 < down.max() <= 400**-0.5
    assert 0.95 * 400**-0.5 < -down.min() <= 400**-0.5
