import numpy as np
import pytest
import torch

from torchfilm.data.clevr.render import render
from torchfilm.data.clevr.scenes import SceneConfig, sample_scene
from torchfilm.systems.visual_reasoning.perception import (
    GROUPS,
    NUM_MAPS,
    Perception,
    PerceptionConfig,
    mirrored,
    object_labels,
    perception_accuracy,
    perception_loss,
    squash,
)

SMALL = PerceptionConfig(widths=(8, 12, 16), num_blocks=1)


def scenes(number: int, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, SceneConfig(max_objects=6)) for _ in range(number)]


def perfect_raw(attributes: np.ndarray, places: np.ndarray, sure: float = 30.0) -> torch.Tensor:
    """What a stem that sees everything says."""
    there = attributes[:, :1] >= 0
    parts = [np.where(there, sure, -sure)]
    for i, values in enumerate(GROUPS.values()):
        parts.append(sure * (attributes[:, i : i + 1] == np.arange(len(values))[None, :, None, None]))
    return torch.from_numpy(np.concatenate([*parts, places], axis=1).astype(np.float32))


def test_labels_stand_where_the_objects_project():
    scene, _ = scenes(1)[0]
    attributes, places = object_labels([scene], 64, 96)
    cells = {}
    for thing in sorted(scene["objects"], key=lambda thing: -thing["pixel_coords"][2]):
        x, y = thing["pixel_coords"][0] / 480 * 96, thing["pixel_coords"][1] / 320 * 64
        cells[(int(y // 8), int(x // 8))] = (thing, x, y)
    assert (attributes[0, 0] >= 0).sum() == len(cells)
    for (row, column), (thing, x, y) in cells.items():
        named = [values[attributes[0, i, row, column]] for i, values in enumerate(GROUPS.values())]
        assert named == [thing[name] for name in GROUPS]
        middle = (column + 0.5 + places[0, 0, row, column] / 2, row + 0.5 + places[0, 1, row, column] / 2)
        assert middle == pytest.approx((x / 8, y / 8), abs=1e-4)


def test_places_order_the_objects_as_the_relations_do():
    for scene, _ in scenes(5):
        attributes, places = object_labels([scene], 64, 96)
        right = {
            (int(thing["pixel_coords"][1] // 40), int(thing["pixel_coords"][0] // 40)): i
            for i, thing in enumerate(scene["objects"])
        }
        if len(right) < len(scene["objects"]):
            continue
        for (row, column), i in right.items():
            for (other_row, other_column), j in right.items():
                to_the_right = j in scene["relationships"]["right"][i]
                if to_the_right:
                    assert places[0, 2, other_row, other_column] > places[0, 2, row, column]
        assert (attributes >= -1).all()


def test_a_perfect_stem_has_no_loss_and_is_all_right():
    attributes, places = object_labels([scene for scene, _ in scenes(3)], 64, 96)
    raw = perfect_raw(attributes, places)
    a, p = torch.from_numpy(attributes), torch.from_numpy(places)
    assert perception_loss(raw, a, p).item() < 1e-6
    scores = perception_accuracy(raw, a, p)
    assert scores["all four"] == scores["objectness"] == 1.0
    assert scores["ground error"] == pytest.approx(0.0, abs=1e-6)
    spoiled = raw.clone()
    spoiled[:, 1:4] = spoiled[:, 1:4].roll(1, dims=1)
    assert perception_accuracy(spoiled, a, p)["shape"] == 0.0
    assert perception_loss(spoiled, a, p).item() > 10


def test_maps_are_zero_where_nothing_stands_and_one_hot_where_something_does():
    attributes, places = object_labels([scene for scene, _ in scenes(2)], 64, 96)
    maps = squash(perfect_raw(attributes, places))
    assert maps.shape == (2, NUM_MAPS, 8, 12)
    there = torch.from_numpy(attributes[:, 0] >= 0)
    assert maps.movedim(1, -1)[~there].abs().max() < 1e-6
    assert torch.allclose(maps[:, 1:16].sum(1)[there], torch.tensor(4.0), atol=1e-4)


def test_mirroring_a_scene_is_mirroring_its_picture():
    attributes, places = (torch.from_numpy(x) for x in object_labels([scenes(1)[0][0]], 64, 96))
    picture = torch.rand(1, 3, 64, 96)
    image, flipped, moved = mirrored(picture, attributes, places, torch.tensor([True]))
    assert torch.equal(image, picture.flip(-1))
    row, column = [int(index[0]) for index in torch.nonzero(attributes[0, 0] >= 0, as_tuple=True)]
    assert torch.equal(flipped[0, :, row, 11 - column], attributes[0, :, row, column])
    expected = places[0, :, row, column] * torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert torch.equal(moved[0, :, row, 11 - column], expected)
    kept = mirrored(picture, attributes, places, torch.tensor([False]))
    assert torch.equal(kept[0], picture)
    assert torch.equal(kept[2], places)


def test_a_small_stem_learns_to_see_the_scenes_it_is_shown():
    torch.manual_seed(0)
    shown = scenes(6)
    images = torch.from_numpy(np.stack([render(s, v, 96, 64).image for s, v in shown])).permute(0, 3, 1, 2)
    attributes, places = (torch.from_numpy(x) for x in object_labels([s for s, _ in shown], 64, 96))
    model = Perception(SMALL)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = perception_loss(model(images), attributes, places)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert perception_accuracy(model(images), attributes, places)["objectness"] > 0.97


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 3, 60, 96\)"):
        Perception(SMALL)(torch.rand(1, 3, 60, 96))


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_however_objects_are_spread():
    attributes, places = (
        torch.from_numpy(x) for x in object_labels([s for s, _ in scenes(5, seed=6)], 64, 96)
    )
    attributes[0], attributes[1, :, :4] = -1, -1  # parts with unequal numbers of objects, a picture with none
    raw = torch.randn(5, NUM_MAPS, 8, 12, dtype=torch.float64)
    places = places.double()
    whole = perception_loss(raw, attributes, places)
    parts = [
        (rows, perception_loss(raw[rows], attributes[rows], places[rows])) for rows in (slice(2), slice(2, 5))
    ]
    counts = [int((attributes[rows, 0] >= 0).sum()) / len(attributes[rows]) for rows, _ in parts]
    assert counts[0] < counts[1] / 2
    shares = torch.stack([value * len(raw[rows]) for rows, value in parts])
    torch.testing.assert_close(shares.sum() / len(raw), whole)


def test_a_batch_without_objects_has_a_finite_loss_and_gradient():
    attributes = torch.full((2, 4, 8, 12), -1, dtype=torch.int8)
    raw = torch.randn(2, NUM_MAPS, 8, 12, requires_grad=True)
    loss = perception_loss(raw, attributes, torch.zeros(2, 4, 8, 12))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(raw.grad).all()
