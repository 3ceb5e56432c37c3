"""The report of a fold can be read by name, in turn, and as plain values."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

import torchfilm as tf


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
