"""Ways round circles, against geometry by dense sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchfilm.systems.diffusion_policy.detours import Ways, features_of_ways, ways_round


def table(seed: int, batch: int = 6, n: int = 4):
    """Starts, ends, centres and radii; nothing holds a start or an end."""
    rng = np.random.default_rng(seed)
    start, end = rng.uniform(-0.3, 0.3, (2, batch, 2))
    radii = rng.uniform(0.03, 0.12, (batch, n))
    centres = np.zeros((batch, n, 2))
    for b in range(batch):
        for i in range(n):
            while True:
                centre = rng.uniform(-0.4, 0.4, 2)
                if min(np.linalg.norm(centre - one[b]) for one in (start, end)) > 1.1 * radii[b, i]:
                    break
            centres[b, i] = centre
    return start, end, centres, radii


def ways(start, end, centres, radii, absent=None, alone=1) -> Ways:
    absent = np.zeros_like(radii) if absent is None else absent
    return ways_round(*(torch.from_numpy(x) for x in (start, end, centres, radii, absent)), alone)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_first_way_is_straight_and_the_others_pass_each_circle_on_either_side(seed):
    start, end, centres, radii = table(seed)
    found = ways(start, end, centres, radii)
    directions = found.directions.numpy()
    straight = (end - start) / np.linalg.norm(end - start, axis=-1, keepdims=True)
    np.testing.assert_allclose(directions[:, 0], straight, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-9)
    assert directions.shape == (6, 1 + 2 * 4, 2)
    for side, first in ((1, 1), (-1, 5)):
        there, way = centres - start[:, None], directions[:, first : first + 4]
        off = way[..., 0] * there[..., 1] - way[..., 1] * there[..., 0]
        np.testing.assert_allclose(off, -side * 1.02 * radii, atol=1e-9)  # the circle lies on the other hand
        assert ((way * there).sum(-1) > 0).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_is_said_of_a_way_is_so_where_it_is_walked(seed):
    start, end, centres, radii = table(seed)
    features = ways(start, end, centres, radii, alone=1).features.numpy()
    assert features.shape == (6, 9, features_of_ways(1))
    share = np.linspace(0, 1, 2001)[:, None]
    for b in range(6):
        for k in range(9):
            corner = features[b, k, :2] * 0.25
            legs = [start[b] + share * (corner - start[b]), corner + share * (end[b] - corner)]
            length = np.linalg.norm(end[b] - start[b])
            walked = np.linalg.norm(corner - start[b]) + np.linalg.norm(end[b] - corner)
            np.testing.assert_allclose(
                features[b, k, 2:4], [(walked - length) / 0.1, length / 0.25], atol=1e-9
            )
            gaps = []
            for leg in legs:
                away = np.linalg.norm(leg[:, None] - centres[b], axis=-1).min(0) - radii[b]
                gaps += [away[:3].min(), away[3]]
            np.testing.assert_allclose(features[b, k, 5:9], np.tanh(np.array(gaps) / 0.02), atol=2e-2)
            np.testing.assert_allclose(features[b, k, 9:13], np.clip(np.array(gaps) / 0.1, -1, 1), atol=2e-3)
            assert features[b, k, 13:].tolist() == [k == 0, k in (4, 8)]


def test_a_circle_that_holds_the_start_or_the_end_is_shrunk_until_it_does_not():
    start, end = np.array([[0.0, 0.0]]), np.array([[0.3, 0.0]])
    for centre in ([0.02, 0.01], [0.29, 0.01]):
        found = ways(start, end, np.array([[centre]]), np.array([[0.1]]), alone=0)
        assert found.features.isfinite().all()
        apart, held = math.hypot(*centre), 0.96 * min(math.hypot(*centre), math.dist(centre, (0.3, 0.0)))
        turned = math.asin(min(1.0, 1.02 * held / apart))
        between = torch.rad2deg(torch.arccos((found.directions[0, 1] * found.directions[0, 2]).sum()))
        assert float(between) == pytest.approx(math.degrees(2 * turned), abs=1e-6)


def test_what_moves_is_not_in_its_own_way():
    start, end, centres, radii = table(3)
    moved = centres.copy()
    moved[:, 0] = start
    absent = np.zeros_like(radii)
    absent[:, 0] = 1
    found = ways(start, end, moved, radii, absent)
    alone = ways(start, end, moved[:, 1:], radii[:, 1:])
    kept = [0, 2, 3, 4, 6, 7, 8]  # all but those round the thing itself
    torch.testing.assert_close(found.features[:, kept], alone.features)
    torch.testing.assert_close(found.directions[:, kept], alone.directions)
