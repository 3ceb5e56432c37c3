"""From a folder to a trained bundle: what is seen, what is written, what is read again."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from torchfilm.data.clevr.catalogue import KINDS
from torchfilm.data.clevr.features import write_features
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.data.clevr.generate import generate_dataset
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning import BaselineConfig, build, running
from torchfilm.systems.visual_reasoning.answering import Answerer
from torchfilm.systems.visual_reasoning.bundle import (
    Bundle,
    Sight,
    find_bundle,
    load_blind,
    load_bundle,
    load_sight,
    save_sight,
)
from torchfilm.systems.visual_reasoning.perception import Perception, PerceptionConfig, object_labels
from torchfilm.systems.visual_reasoning.recipe import RECIPES, TINY, Recipe
from torchfilm.systems.visual_reasoning.running import Material, budgeted, fitted, train_bundle
from torchfilm.systems.visual_reasoning.sights import Labelled, LabelledBatches, split_maps, train_sight
from torchfilm.training import Draw, Interrupted, Loss, RunFolderError, TrainConfig, train
from torchfilm.training.checkpoint import newest_checkpoint

SMALL = PerceptionConfig((4, 6, 8), num_blocks=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ClevrFolder:
    out = tmp_path_factory.mktemp("running") / "data"
    for split, scenes in (("train", 11), ("val", 5)):
        generate_dataset(out, split, scenes, seed=2, workers=1, questions_per_scene=7)
    return ClevrFolder(out)


@pytest.fixture
def sight() -> Sight:
    torch.manual_seed(1)
    return Sight(SMALL, Perception(SMALL).eval())


@pytest.fixture
def material(folder, sight) -> Material:
    return Material(folder, folder.vocabulary("train"), sight)


def tiny(**training) -> Recipe:
    given = {"steps": 3, "batch_size": 8, "checkpoint_seconds": None, "tensorboard": False} | training
    return replace(RECIPES["tiny"], training=TrainConfig(**given))


def logits(bundle: Bundle, material: Material) -> torch.Tensor:
    exam = material.exam(bundle.network.config, "val")
    asked = exam.questions
    with torch.no_grad():
        return bundle.network(
            torch.from_numpy(exam.pictures[asked.image_index]),
            torch.from_numpy(asked.tokens.astype(np.int64)),
            torch.from_numpy(asked.lengths.astype(np.int64)),
        )


def test_a_trained_bundle_answers_alike_when_read_again(material, tmp_path):
    outcome = train_bundle("tiny", tiny(), material, tmp_path)
    again = load_bundle(tmp_path)
    assert again.recipe == "tiny"
    assert again.vocabulary == material.vocabulary
    assert again.sight is not None
    assert material.sight is not None
    assert again.sight.digest == material.sight.digest
    torch.testing.assert_close(logits(again, material), logits(outcome.bundle, material))
    told = outcome.to_json()
    assert told["steps"] == 3
    assert told["n"] == len(material.exam(again.network.config, "val"))
    assert set(told["by_kind"]) <= set(KINDS)
    assert Answerer.load(find_bundle(tmp_path)).height == 64


def learned(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run leaves: of its newest checkpoint (weights, average, optimiser) and bundle."""
    files = [
        *max((run / "checkpoints").glob("step_*")).glob("*.safetensors"),
        run / "model/weights.safetensors",
    ]
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def told(run: Path) -> list[dict[str, object]]:
    """The lines of a run's metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "items_per_second")} for line in lines]


@pytest.mark.parametrize("stopped_by", [KeyError("the power is gone"), signal.SIGTERM])
def test_a_run_stopped_half_way_goes_on_to_the_bit(stopped_by, material, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe = replace(tiny(steps=4, checkpoint_steps=2, log_steps=1), feed=RECIPES["tiny"].feed)
    train_bundle("tiny", recipe, material, whole)
    calls = []

    def failing(model: torch.nn.Module, batch: object) -> Loss:
        calls.append(batch)
        if len(calls) == 3 and isinstance(stopped_by, Exception):
            raise stopped_by
        if len(calls) == 2 and isinstance(stopped_by, int):
            signal.raise_signal(stopped_by)
        return running.loss(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(running, "train", lambda net, loss, *rest, **more: train(net, failing, *rest, **more))
        with pytest.raises((KeyError, Interrupted)):
            train_bundle("tiny", recipe, material, broken)
    assert newest_checkpoint(broken / "checkpoints").name == "step_0000002"
    assert (broken / "model" / "weights.safetensors").is_file() == isinstance(stopped_by, int)
    train_bundle("tiny", recipe, material, broken, resume=True)
    expected, found = learned(whole), learned(broken)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert told(broken) == told(whole)
    assert len(told(whole)) == 5


def test_a_run_goes_on_with_its_own_data_alone(material, folder, tmp_path):
    train_bundle("tiny", tiny(), material, tmp_path / "run")
    resumed = {"name": "tiny", "recipe": tiny(), "out": tmp_path / "run", "resume": True}
    shutil.copytree(folder.root, tmp_path / "data")
    train_bundle(material=replace(material, folder=ClevrFolder(tmp_path / "data")), **resumed)
    asked = tmp_path / "data" / "questions" / "CLEVR_train_questions.json"
    asked.write_text(asked.read_text().replace('"answer":"yes"', '"answer":"no"'))
    other = replace(material, folder=ClevrFolder(tmp_path / "data"))
    with pytest.raises(RunFolderError, match=r"extra\.data\.questions\.train: '\w+' in the run, '\w+' now"):
        train_bundle(material=other, **resumed)
    with pytest.raises(RunFolderError, match=r"extra\.data\.splits\.held_out: 'val' in the run, 'train' now"):
        train_bundle(material=replace(material, val_split="train"), **resumed)


def test_a_perception_goes_on_with_its_own_data_alone(folder, tmp_path):
    config = TrainConfig(steps=2, batch_size=4, tensorboard=False)
    given = {"out": tmp_path, "training": config, "config": SMALL}
    train_sight(folder, "train", held_out="val", **given)
    train_sight(folder, "train", held_out="val", resume=True, **given)
    with pytest.raises(RunFolderError, match=r"extra\.data\.held_out: 'val' in the run, 'train' now"):
        train_sight(folder, "train", held_out="train", resume=True, **given)


def test_a_run_resumed_after_its_end_trains_no_further(material, tmp_path):
    first = train_bundle("tiny", tiny(), material, tmp_path)
    second = train_bundle("tiny", tiny(), material, tmp_path, resume=True)
    assert second.result.steps == first.result.steps
    torch.testing.assert_close(
        logits(second.bundle, material), logits(first.bundle, material), rtol=0, atol=0
    )


def test_fine_tuning_starts_from_the_given_weights(material, tmp_path):
    start = train_bundle("tiny", tiny(), material, tmp_path / "first").bundle
    still = tiny(lr=1e-12, weight_decay=0.0, steps=1, ema=None)
    tuned = train_bundle("tiny", still, material, tmp_path / "second", start=start.network).bundle
    for (name, before), after in zip(
        start.network.named_parameters(), tuned.network.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before, msg=name, rtol=1e-5, atol=1e-7)


def test_fine_tuning_gives_new_words_vectors_and_may_train_the_generator_alone(material, tmp_path):
    start = train_bundle("tiny", tiny(), material, tmp_path / "first").bundle.network
    asked = [{"question": "Is zorp zorp?"}] * 3 + [{"question": "Is a rare thing zorp?"}]
    known = material.vocabulary
    more = replace(material, vocabulary=known.expand(asked, unk_threshold=5))
    assert list(more.vocabulary.questions)[len(known.questions) :] == ["zorp"]
    recipe = replace(tiny(lr=1e-2, ema=None), trained="generator")
    tuned = train_bundle("tiny", recipe, more, tmp_path / "second", start=start).bundle.network
    before, after = start.state_dict(), tuned.state_dict()
    for name in before:
        kept = after[name][: len(before[name])] if name.startswith("encoder.") else after[name]
        assert torch.equal(kept, before[name]) != name.startswith(("encoder.", "generator.")), name
    for name in ("encoder.embedding.weight", "encoder.bag.weight"):
        assert len(after[name]) == len(before[name]) + 1
        assert after[name][-1].std() > 0.3
    still = tiny(lr=1e-12, weight_decay=0.0, steps=1, ema=None)
    kept = train_bundle("tiny", still, more, tmp_path / "third", start=start).bundle.network.state_dict()
    rows = kept["encoder.embedding.weight"][:-1]
    torch.testing.assert_close(rows, before["encoder.embedding.weight"], rtol=1e-5, atol=1e-7)
    lstm = replace(recipe, config=RECIPES["laptop_lstm"].config)
    with pytest.raises(ValueError, match="expected a FiLM network to train the generator of, got a baseline"):
        train_bundle("lstm", lstm, more, tmp_path / "fourth")


def test_only_the_first_scenes_are_asked_about(material):
    questions = replace(material, scenes=4).training_questions()
    assert set(questions.image_index.tolist()) == {0, 1, 2, 3}


def test_maps_are_what_the_perception_sees_and_are_kept(material, folder, sight):
    images = folder.images("val", 64, 96)
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = sight.network.maps(pixels).numpy()
    np.testing.assert_allclose(material.pictures(TINY, "val")[np.arange(5)], expected, atol=2e-3)
    assert Path(str(split_maps(sight, images).filename)).parent == folder.root / ".cache"
    other = Sight(SMALL, Perception(SMALL).eval())
    assert other.digest != sight.digest
    assert not np.allclose(split_maps(other, images), expected, atol=2e-3)


def test_maps_of_older_pictures_are_dropped_and_damaged_ones_are_named(sight, tmp_path):
    generate_dataset(tmp_path, "val", 3, seed=2, workers=1, questions_per_scene=0)
    folder = ClevrFolder(tmp_path)
    first = Path(str(split_maps(sight, folder.images("val", 64, 96)).filename))
    folder.image_files("val")[1].touch()
    images = folder.images("val", 64, 96)
    second = Path(str(split_maps(sight, images).filename))
    assert [path for path in (first, second) if path.exists()] == [second]
    second.write_bytes(b"")
    with pytest.raises(ValueError, match=r"maps-.*npy: expected a cache .* Delete the file"):
        split_maps(sight, images)


def test_pixels_come_in_0_to_1_and_channels_first(material, folder):
    size = {"input_channels": 3, "input_height": 64, "input_width": 96, "margins": (0, 0, 0, 0)}
    config = replace(TINY, input="pixels", **size)
    seen = material.pictures(config, "val")[np.array([3, 1])]
    expected = np.stack([folder.image("val", 3), folder.image("val", 1)]).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    assert seen.dtype == np.float32


def test_features_are_read_where_the_original_writes_them(material, folder, tmp_path):
    config = replace(TINY, input="features", input_channels=2, input_height=3, input_width=5)
    with pytest.raises(ValueError, match=r"expected the features of the split 'val' in .*val_features.h5"):
        material.pictures(config, "val")
    features = np.random.default_rng(0).normal(size=(5, 2, 3, 5)).astype(np.float32)
    write_features(folder.root / "val_features.h5", features)
    np.testing.assert_array_equal(material.pictures(config, "val")[np.array([4, 0])], features[[4, 0]])
    (folder.root / "val_features.h5").rename(tmp_path / "val_features.h5")
    elsewhere = replace(material, features=tmp_path)
    np.testing.assert_array_equal(elsewhere.pictures(config, "val")[np.array([4, 0])], features[[4, 0]])


def test_decoding_and_looking_are_told_picture_by_picture(folder, sight, tmp_path):
    heard = []
    fresh = replace(folder, cache=tmp_path)
    told = Material(fresh, folder.vocabulary("train"), sight, progress=lambda *done: heard.append(done))
    told.warm(TINY)
    assert heard == [(11, 11), (11, 11), (5, 5), (5, 5)]
    told.warm(TINY)
    assert len(heard) == 4


def test_maps_need_a_perception(material):
    with pytest.raises(ValueError, match="--recipe perception"):
        replace(material, sight=None).pictures(TINY, "val")


def test_a_budget_replaces_the_recipes(material):
    training = TrainConfig(minutes=15)
    assert (budgeted(training, steps=7).steps, budgeted(training, steps=7).minutes) == (7, None)
    assert budgeted(TrainConfig(steps=5), minutes=0.5, seed=3) == TrainConfig(minutes=0.5, seed=3)
    assert budgeted(training) == training
    with pytest.raises(ValueError, match="expected one budget, got minutes=2 and steps=3"):
        budgeted(training, minutes=2, steps=3)


def test_the_config_gets_the_vocabularys_sizes(material):
    config = fitted(TINY, material.vocabulary)
    assert config.vocabulary == len(material.vocabulary.questions)
    assert config.answers == len(material.vocabulary.answers)


def test_a_blind_network_is_found_beside_its_bundle(material, tmp_path):
    sizes = {"vocabulary": len(material.vocabulary.questions), "answers": len(material.vocabulary.answers)}
    lstm = BaselineConfig("lstm", word_dim=3, encoder_width=5, hidden=7, **sizes)
    seeing = Bundle("tiny", build(replace(TINY, **sizes)), material.vocabulary, material.sight)
    seeing.save(tmp_path / "model")
    assert load_blind(None, tmp_path, material.vocabulary) is None
    Bundle("laptop_lstm", build(lstm), material.vocabulary, None).save(tmp_path / "model" / "blind")
    found = load_blind(None, tmp_path, material.vocabulary)
    assert found is not None
    assert found.config == lstm
    other = Vocabulary.build([{"question": "What?", "answer": "red"}])
    with pytest.raises(ValueError, match="expected a blind network with the same vocabulary"):
        load_blind(tmp_path / "model" / "blind", tmp_path, other)


def test_what_is_no_bundle_is_refused(material, sight, tmp_path):
    with pytest.raises(ValueError, match=r"expected a trained perception in .*, found no config.json"):
        load_sight(tmp_path)
    save_sight(tmp_path / "sight", sight)
    assert load_sight(tmp_path / "sight").digest == sight.digest
    with pytest.raises(ValueError, match=r"found no weights\.safetensors\. Has its training finished"):
        load_bundle(tmp_path / "sight")
    (tmp_path / "sight" / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object"):
        load_sight(tmp_path / "sight")


def test_batches_for_the_perception_mirror_picture_and_labels_together(folder):
    labelled = Labelled.of(folder, "train")
    np.testing.assert_array_equal(labelled.attributes, object_labels(folder.scenes("train"), 64, 96)[0])
    images, attributes, _ = LabelledBatches(labelled)(Draw(step=0, seed=4, progress=0.0, batch_size=11))
    mirrored = 0
    for image, attribute in zip(images.numpy(), attributes.numpy(), strict=True):
        plain = [i for i in range(11) if np.array_equal(labelled.images[i].transpose(2, 0, 1), image)]
        turned = [
            i for i in range(11) if np.array_equal(labelled.images[i].transpose(2, 0, 1)[..., ::-1], image)
        ]
        assert len(plain + turned) == 1
        expected = labelled.attributes[(plain + turned)[0]]
        np.testing.assert_array_equal(attribute, expected[..., ::-1] if turned else expected)
        mirrored += len(turned)
    assert 0 < mirrored < 11


def test_the_vocabulary_is_kept_until_the_questions_change(folder):
    first = folder.vocabulary("train")
    kept = list((folder.root / ".cache").glob("vocabulary-train-*.json"))
    assert len(kept) == 1
    assert folder.vocabulary("train") == first
    assert {word for question in folder.questions("train") for word in [question["answer"]]} <= set(
        first.answers
    )
