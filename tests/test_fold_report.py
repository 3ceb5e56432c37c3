"""What folding says of each site: a report by name, in turn, and as plain values; and how it measures."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise


def test_a_report_is_its_sites_and_plain_values_and_refuses_a_site_that_it_has_not():
    model = tf.condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), "1", tf.Vector(7))
    _, report = tf.fold(model, cond=torch.randn(7))
    assert [site.site for site in report] == ["1"]
    assert len(report) == 1
    assert "1" in report
    assert "5" not in report
    assert all(site in report for site in report)
    said = json.loads(json.dumps(report.to_json()))
    assert said["sites"] == [asdict(report["1"])]
    assert said["parameters"] == list(report.parameters)
    with pytest.raises(
        ValueError, match=r"FoldReport: expected one of 1 names, got '5'.\nThe nearest are '1'"
    ):
        report["5"]


def network(**options) -> nn.Module:
    model = tf.condition(nn.Sequential(nn.Linear(16, 16)), "0", tf.Vector(7), **options).eval()
    randomise(tf.conditioning(model))
    return model


def test_a_site_that_hooks_watch_is_measured_without_them():
    model, x, z, seen = network(), torch.randn(3, 16), torch.randn(1, 7), []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y) or y.relu())
    expected = model(x, cond=z)
    plain, report = tf.fold(model, cond=z)
    with tf.folded(model, cond=z):
        assert len(seen) == 1
        torch.testing.assert_close(model(x), expected)
    assert report["0"].error < 1e-6
    torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize(
    ("fusion", "width"), [("film", None), ("concat", None), ("concat", 5), ("low_rank", 5)]
)
def test_weights_are_computed_in_float64_whatever_the_precision_of_the_fusion(fusion, width):
    model = network(fusion=fusion) if width is None else network(fusion=fusion, width=width)
    tf.conditioning(model).bfloat16()
    x, z = torch.randn(3, 16), torch.randn(1, 7)
    plain, _ = tf.fold(model, cond=z)
    error = (plain(x) - model(x, cond=z)).abs().max() / plain(x).abs().max()
    assert error < 1e-6


class Rows(nn.Module):
    """An embedding, and an output without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        y = self.table(words)
        return y, y[:0]


@pytest.mark.parametrize("fusion", ["film", "concat"])
def test_a_fold_is_measured_under_another_default_device(fusion):
    words, z, linear = torch.arange(5), torch.randn(1, 7), network(fusion=fusion)
    model = tf.condition(Rows().eval(), "table", tf.Vector(7), dim=-1, fusion=fusion)
    randomise(tf.conditioning(model))
    with torch.device("meta"):
        plain, report = tf.fold(model, cond=z, inputs=words)
        with tf.folded(model, cond=z):
            torch.testing.assert_close(model(words), plain(words))
        assert tf.fold(linear, cond=z)[1]["0"].error < 1e-5
    assert max(report.error, report["table"].error) < 1e-5
