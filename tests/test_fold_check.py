"""Outputs on given inputs tell whether a folded network computes what the conditioned one does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise

End = Callable[[Tensor, Tensor], object]
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Ends(nn.Module):
    """Outputs made of what a layer gives and of whether its weight changed; tracing it fails."""

    def __init__(self, end: End) -> None:
        super().__init__()
        self.linear, self.end = nn.Linear(3, 5), end
        self.before = self.linear.weight.detach().clone()

    def forward(self, x: Tensor) -> object:
        y = self.linear(x) if x.sum() > -1e9 else x
        return self.end(y, (self.linear.weight != self.before).any())


def report_of(end: End, inputs: object) -> tf.FoldReport:
    model = tf.condition(Ends(end).eval(), "linear", tf.Vector(7))
    randomise(tf.conditioning(model))
    return tf.fold(model, cond=torch.randn(1, 7), inputs=inputs)[1]


RIGHT = {
    "masked": lambda y, _: y.masked_fill(torch.tensor([0, 1, 0, 0, 1]).bool(), -torch.inf),
    "undefined": lambda y, _: (y, y.new_full((2,), torch.nan)),
    "empty": lambda y, _: (y[:0], y),
    "zero": lambda y, _: {"zero": 0 * y, "y": y},
}
WRONG = {
    "small": lambda y, changed: (1e6 * y, 1 + changed.float()),
    "undefined": lambda y, changed: (y, torch.where(changed, torch.nan, 1.0)),
    "infinite": lambda y, changed: (torch.where(changed, torch.inf, 1.0), y),
    "finite": lambda y, changed: (torch.where(changed, 1.0, torch.inf), y),
}


@pytest.mark.parametrize("end", RIGHT)
@pytest.mark.parametrize("inputs", [X, [X], {"x": X}], ids=["one", "by position", "by name"])
def test_a_right_copy_passes_whatever_its_outputs_are(end, inputs):
    error = report_of(RIGHT[end], inputs).error
    assert error is not None  # it was compared; on some processors both round alike
    assert error < 1e-5


@pytest.mark.parametrize("end", WRONG)
def test_a_wrong_copy_is_refused_whichever_output_tells(end):
    with pytest.raises(ValueError, match=r"computes the same, but its outputs differ by (\d|nan|inf)"):
        report_of(WRONG[end], X)


@contextmanager
def rough(switch: str) -> Iterator[None]:
    """Take products of float32 in bfloat16, where this processor has any."""
    convolutions: Any = torch.backends.mkldnn.conv
    before = torch.get_float32_matmul_precision(), convolutions.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium" if switch == "products" else before[0])
        convolutions.fp32_precision = "bf16" if switch == "convolutions" else before[1]
        with torch.autocast("cpu", torch.bfloat16, enabled=switch == "autocast"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        convolutions.fp32_precision = before[1]


@pytest.mark.parametrize("switch", ["products", "convolutions", "autocast"])
def test_products_of_less_precision_are_no_error_of_folding(switch: str):
    layers = nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(2), nn.Linear(64, 8)
    model = tf.condition(nn.Sequential(*layers).eval(), "0|2|4", tf.Vector(7))
    randomise(tf.conditioning(model))
    x, z = torch.randn(2, 16, 12, 12), torch.randn(1, 7)
    with rough(switch):
        report = tf.fold(model, cond=z, inputs=x)[1]
        with tf.folded(model, cond=z):
            model(x)
    assert max(site.error for site in report) < 1e-5
    assert report.error < 0.05


@pytest.mark.plain
def test_some_conditions_cannot_be_folded_without_the_others():
    both = tf.Several({"speaker": tf.Classes(3, 4), "mel": tf.Vector(6), "style": tf.Maybe(tf.Vector(5))})
    model, fixed = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", both), {"speaker": torch.tensor([1])}
    randomise(model.film)
    with pytest.raises(
        ValueError, match=r"fold: .* none for \['mel'\][\s\S]*cond=\{\*\*fixed, 'mel': \.\.\.\}"
    ):
        tf.fold(model, cond=fixed)
    with pytest.raises(ValueError, match=r"fold: .* none for \['mel'\]"), tf.folded(model, cond=fixed):
        pass
    with pytest.raises(
        ValueError, match=r"expected one of \['speaker', 'mel', 'style'\], got 'mell'"
    ) as told:
        tf.fold(model, cond={**fixed, "mell": torch.randn(1, 6)})
    assert "fixed" not in str(told.value)
    x, cond = torch.randn(2, 2), {**fixed, "mel": torch.randn(1, 6)}
    plain, _ = tf.fold(model, cond=cond)
    torch.testing.assert_close(plain(x), model(x, cond=cond))


@pytest.mark.plain
def test_an_encoder_that_knows_what_is_missing_is_folded():
    class Known(tf.Several):
        def forward(self, conditions: dict[str, Any], **options: Any) -> torch.Tensor:
            return super().forward({"mel": torch.ones(1, 6), **conditions}, **options)

    encoder, fixed = Known({"speaker": tf.Classes(3, 4), "mel": tf.Vector(6)}), {"speaker": torch.tensor([1])}
    model, x = tf.condition(nn.Sequential(nn.Linear(2, 3)), "0", encoder).eval(), torch.randn(5, 2)
    randomise(model.film)
    torch.testing.assert_close(tf.fold(model, cond=fixed)[0](x), model(x, cond=fixed))
