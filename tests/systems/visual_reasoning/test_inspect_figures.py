import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_exam import small_exam, small_network

from torchfilm.data.clevr.question_types import TYPES
from torchfilm.systems.visual_reasoning.exam import look, modulate
from torchfilm.systems.visual_reasoning.inspect_figures import TYPE_MARKS, inspect, pool_counts
from torchfilm.systems.visual_reasoning.model import VisualReasoner


def test_each_type_of_question_has_a_mark_of_its_own() -> None:
    assert set(TYPE_MARKS) == set(TYPES)
    assert len({(m.color, m.marker) for m in TYPE_MARKS.values()}) == 13


def test_every_figure_has_its_numbers_beside_it(tmp_path) -> None:
    exam, network = small_exam(), small_network()
    images = np.random.default_rng(0).integers(0, 255, (7, 20, 30, 3), dtype=np.uint8)
    heard: list[tuple[int, int]] = []
    files = inspect(
        network,
        exam,
        tmp_path / "figures",
        images=images,
        points=30,
        seed=1,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(0, 2), (1, 2), (2, 2)]
    names = {path.name for path in files}
    assert names == {path.name for path in (tmp_path / "figures").iterdir()}
    figures = {
        "histograms",
        "channels_gamma",
        "channels_beta",
        "planes_block1",
        "planes_block2",
        "embedding",
        "pool",
    }
    assert {name.removesuffix(".png") for name in names if name.endswith(".png")} == figures
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 100
        else:
            assert path.stat().st_size > 50

    drawn = exam.sample(30, 1)
    gamma = modulate(network, drawn.questions)["block2"].gamma
    summary = json.loads((tmp_path / "figures" / "histograms.json").read_text())["block2"]["gamma"]
    assert summary["below_zero"] == pytest.approx((gamma < 0).float().mean().item())
    assert sum(summary["counts"]) == summary["n"] == gamma.numel()
    with (tmp_path / "figures" / "channels.csv").open() as stream:
        rows = [r for r in csv.DictReader(stream) if r["site"] == "block2" and r["parameter"] == "gamma"]
    assert [float(r["mean"]) for r in rows] == pytest.approx(gamma.mean(0).tolist())
    with (tmp_path / "figures" / "planes_block2.csv").open() as stream:
        assert {r["type"] for r in csv.DictReader(stream)} <= set(TYPES)
    with (tmp_path / "figures" / "embedding.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 60


def test_the_pool_is_counted_for_each_question_by_hand() -> None:
    exam, network = small_exam(), small_network()
    counts = pool_counts(network, look(network, exam), modulate(network, exam.questions))
    assert counts.shape == (60, 4, 5)
    for i in (0, 31, 59):
        length = int(exam.questions.lengths[i])
        tokens = torch.from_numpy(exam.questions.tokens[i : i + 1, :length].astype(np.int64))
        picture = torch.from_numpy(exam.pictures[exam.questions.image_index[i]][None])
        with torch.no_grad():
            z = network.encode(tokens, torch.tensor([length]))
            maps = network.reason(network.features(picture), network.modulations(z)).pooled_from[0]
        expected = np.zeros((4, 5), int)
        for channel in maps.numpy():
            if channel.max() > 0:
                expected[np.unravel_index(channel.argmax(), (4, 5))] += 1
        assert np.array_equal(counts[i], expected)
    assert counts.sum() > 0


def test_a_network_without_film_has_nothing_to_show(tmp_path) -> None:
    deaf = VisualReasoner(replace(small_network().config, filmed_blocks=()))
    with pytest.raises(ValueError, match="without a block that listens"):
        inspect(deaf, small_exam(), tmp_path)
