"""What the figures of a policy show, in the numbers behind them."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_policy import small

from torchfilm.app.cli import main
from torchfilm.data.table.wording import vocabulary
from torchfilm.systems.diffusion_policy import RECIPES, build
from torchfilm.systems.diffusion_policy.inspect_figures import (
    PARTS,
    Take,
    depth_figure,
    explained,
    heard_by_site,
    side_by_side,
)

for package in ("mujoco", "diffusers", "gymnasium"):
    pytest.importorskip(package)


def test_the_share_explained_is_that_of_the_analysis_of_variance():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=400).astype(str)
    group = rng.normal(size=(3, 5))
    assert explained(group[labels.astype(int)], labels) == pytest.approx(1)
    assert explained(rng.normal(size=(400, 5)), labels) < 0.02
    assert explained(np.ones((400, 5)), labels) == 0
    values = group[labels.astype(int)] + rng.normal(size=(400, 5))
    within = sum(((values[labels == k] - values[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels))
    total = ((values - values.mean(0)) ** 2).sum()
    assert explained(values, labels) == pytest.approx(1 - within / total * 399 / 397)


def test_takes_stand_side_by_side_until_the_last_one_ends():
    first, second = (np.full((8, 8, 3), grey, np.uint8) for grey in (40, 200))
    short = Take(None, None, [first] * 3, np.zeros((3, 2)))
    long = Take(None, None, [second] * 4 + [first], np.zeros((5, 2)))
    film = Image.open(io.BytesIO(side_by_side([short, long])))
    assert film.size == (16, 8)
    frames = []
    for frame in range(film.n_frames):  # equal pictures in a row are one frame that stays longer
        film.seek(frame)
        shown = np.asarray(film.convert("L"))
        frames.append((int(shown[4, 4]), int(shown[4, 12]), film.info["duration"]))
    assert frames == [(40, 200, 50 * 4), (40, 40, 50 * (1 + 20))]


def test_words_that_change_nothing_explain_nothing(tmp_path):
    recipe = RECIPES["tiny"].config
    network = build(replace(recipe, vocabulary=vocabulary())).eval()
    depth_figure(network, tmp_path, points=60)
    shares = json.loads((tmp_path / "depth.json").read_text())
    assert list(shares) == [*network.encoder.sites, *network.unet.sites]
    assert {row[part] for found in shares.values() for row in found.values() for part in PARTS} == {0.0}


def test_inspect_draws_a_policy(tmp_path, capsys):
    main(["inspect", "diffusion_policy", "--out", str(tmp_path), "--points", "40", "--json"])
    found = json.loads(capsys.readouterr().out)
    names = ["reach_manners", "push_manners", "company", "depth"]
    assert sorted({path.stem for path in tmp_path.iterdir()}) == sorted(names)
    assert len(found["files"]) == 12
    takes = json.loads((tmp_path / "reach_manners.json").read_text())
    assert len({take["told"] for take in takes}) == 4
    assert takes[0]["energy"] > takes[2]["energy"]
    with Image.open(tmp_path / "reach_manners.gif") as film:
        assert film.size == (960, 240)
    avoids, saves, saved, avoided = json.loads((tmp_path / "company.json").read_text())
    assert all(take["success"] for take in (avoids, saves, saved, avoided))
    assert saved["energy"] < 0.7 * avoids["energy"]  # the first arm's push
    assert saves["energy"] < 0.7 * avoided["energy"]  # the second arm's reach
    assert avoids["collisions"] == 0 < saved["collisions"]
    with Image.open(tmp_path / "company.gif") as film:
        assert film.size == (480, 240)
    with (tmp_path / "depth.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * (7 + 8)
    assert all(0 <= float(row[part]) <= 1 for row in rows for part in PARTS)


def test_what_has_no_gamma_and_beta_is_refused():
    with pytest.raises(ValueError, match="expected fusion film, scale or bias, got 'concat'"):
        heard_by_site(small(fusion="concat", vectors=()), ["push"])
    with pytest.raises(ValueError, match="expected a policy that hears an instruction as γ and β"):
        heard_by_site(small(vocabulary=()), ["push"])
