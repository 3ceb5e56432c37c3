"""Which encoders of conditions a fusion can read; the others are refused while nothing has changed."""

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.fusion import FUSIONS

COMPOSED = {"a": tf.Vector(3), "b": tf.Vector(4)}


@pytest.mark.plain
@pytest.mark.parametrize(
    ("cond", "options", "message"),
    [
        (
            tf.Classes(10),
            {},
            r"vectors in front of Generator, got Classes\(10, dim=None\).*\nUse Classes\(10, 64\)",
        ),
        (tf.Classes(10), {"fusion": "concat"}, "vectors in front of Concatenations"),
        (
            tf.Tokens(7, None),
            {},
            r"one vector per sample in front of Generator, got Tokens.*\nUse pooling='mean'",
        ),
        (tf.Maybe(tf.Tokens(7, None)), {"fusion": "gate"}, "one vector per sample in front of Gates"),
        (tf.Several(COMPOSED, "compose"), {"fusion": "concat"}, "can be composed, got Concatenations"),
        (tf.Several(COMPOSED, "compose"), {"fusion": "low_rank"}, r"got Bilinears.*\nUse combine='concat'"),
    ],
)
def test_encoders_that_a_fusion_cannot_read_are_refused_before_anything_is_changed(cond, options, message):
    model = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(ValueError, match=message):
        tf.condition(model, "0", cond, **options)
    assert type(model) is nn.Sequential
    assert len(model) == 1


@pytest.mark.parametrize("fusion", ["film", "scale", "bias", "gate"])
def test_composed_conditions_and_class_tables_are_read_by_those_that_can(fusion: str):
    for cond, z in (
        (tf.Several(COMPOSED, "compose"), {"a": torch.randn(2, 3), "b": torch.randn(2, 4)}),
        (tf.Classes(10), torch.tensor([3, 9])),
    ):
        options = {"head": "table"} if isinstance(cond, tf.Classes) else {}
        model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", cond, fusion=fusion, **options))
        y = model(torch.ones(2, 3), cond=z)
        assert not torch.allclose(y[0], y[1])


class Unpooled(nn.Module):
    """An encoder of one's own that gives tokens and their mask."""

    dim = 13

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("wrap", [lambda encoder: encoder, tf.Maybe])
def test_tokens_of_ones_own_encoder_are_refused_where_vectors_are_read_and_taken_by_attention(wrap):
    x, z = torch.randn(2, 3), torch.randn(2, 5, 13)
    for fusion in ("film", "gate", "concat", "low_rank"):
        model = tf.condition(nn.Sequential(nn.Linear(3, 7)), "0", wrap(Unpooled()), fusion=fusion)
        with pytest.raises(
            ValueError, match=r"one vector per sample .* got Unpooled\(\), which gives tokens"
        ):
            model(x, cond=z)
    model = tf.condition(nn.Sequential(nn.Linear(3, 7)), "0", wrap(Unpooled()), fusion="cross_attention")
    assert model(x, cond=z).shape == (2, 7)


class Reader(tf.Generator):
    """A generator of one's own that reads tokens and their mask."""

    def forward(self, tokens_and_mask: tuple[torch.Tensor, torch.Tensor]) -> dict[str, tf.Modulation]:
        return super().forward(tokens_and_mask[0].mean(dim=1))


@pytest.mark.parametrize("encoder", [Unpooled(), tf.Tokens(13, None)], ids=["own", "Tokens"])
def test_a_generator_of_ones_own_reads_what_it_likes(encoder: nn.Module):
    model = tf.condition(nn.Sequential(nn.Linear(3, 7)), "0", encoder, generator=Reader)
    tokens = torch.randn(2, 5, 13)
    z = tokens if isinstance(encoder, Unpooled) else (tokens, torch.ones(2, 5, dtype=torch.bool))
    assert model(torch.randn(2, 3), cond=z).shape == (2, 7)


@pytest.mark.parametrize(
    ("fusion", "options"), [("concat", {"width": 50}), ("cross_attention", {"width": 50})]
)
def test_inner_layers_start_as_those_of_torch(fusion, options):
    encoder = tf.Tokens(7, None) if fusion == "cross_attention" else tf.Vector(7)
    net = tf.condition(nn.Sequential(nn.Linear(3, 400)), "0", encoder, fusion=fusion, **options)
    (inner,) = (p for p in net.film.parameters() if p.shape == (50, 400))
    assert 0.95 * 400**-0.5 < inner.max() <= 400**-0.5
    assert 0.95 * 400**-0.5 < -inner.min() <= 400**-0.5


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_vector_that_is_missing_for_the_whole_batch_is_missing_for_each_sample(fusion: str):
    torch.manual_seed(3)
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Maybe(tf.Vector(7)), fusion=fusion)
    randomise(model).double()
    x, z = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    each = model(x, cond=tf.Masked(z, torch.tensor([False, False])))
    torch.testing.assert_close(model(x, cond=tf.Masked(None)), each)
