"""Every named run builds, and every ablation changes what its name says and nothing else."""

import json
from dataclasses import fields, replace

import pytest
import torch

from torchfilm.systems.visual_reasoning import build, describe, load, loss, predict
from torchfilm.systems.visual_reasoning.baselines import BaselineConfig
from torchfilm.systems.visual_reasoning.data import Batch
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner
from torchfilm.systems.visual_reasoning.recipe import ABLATIONS, RECIPES, ablate
from torchfilm.training import save_weights

CHANGED = {
    "beta_zero": {"emit"},
    "gamma_one": {"emit"},
    "gamma_sigmoid": {"bound"},
    "gamma_tanh": {"bound"},
    "gamma_exp": {"bound"},
    "after_relu2": {"placement"},
    "after_conv2": {"placement"},
    "before_conv1": {"placement"},
    "after_residual": {"placement"},
    "only_1x1_no_coordinates": {
        "kernel_size",
        "stem_kernel",
        "coordinates_in_stem",
        "coordinates_in_blocks",
        "coordinates_in_classifier",
    },
    "no_residual": {"residual"},
    "no_batch_norm": {"batch_norm"},
}


def batch(config: ReasonerConfig | BaselineConfig) -> Batch:
    size = (2, config.input_channels, config.input_height, config.input_width)
    return Batch(
        images=torch.rand(size),
        questions=torch.randint(0, 9, (3, 5)),
        lengths=torch.tensor([5, 2, 3]),
        scene_index=torch.tensor([0, 1, 1]),
        answers=torch.tensor([1, 0, 4]),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name):
    with torch.device("meta"):
        assert list(build(RECIPES[name].config).parameters())


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("paper")])
def test_every_recipe_has_a_loss_and_predicts_probabilities(name):
    config = RECIPES[name].config
    model = build(config)
    value = loss(model, batch(config))
    assert value.items == 3
    assert value.value.requires_grad
    assert 0 <= value.metrics["accuracy"] <= 1
    probabilities = predict(model, batch(config))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    assert model.training


def test_the_paper_recipes_train_as_the_paper_did():
    for name in ("paper", "paper_pixels"):
        training = RECIPES[name].training
        assert (training.lr, training.weight_decay, training.batch_size) == (3e-4, 1e-5, 64)
        assert (training.optimiser, training.decay, training.grad_clip) == ("adam_l2", "all", None)
        assert training.schedule == "constant"
        assert (training.best, training.evaluate_steps) == ("accuracy", 699_989 // 64)


@pytest.mark.parametrize("name", CHANGED)
def test_an_ablation_changes_its_fields_only(name):
    base = RECIPES["paper"]
    changed = ablate(base, name)
    assert changed.training == base.training
    differing = {
        f.name for f in fields(base.config) if getattr(base.config, f.name) != getattr(changed.config, f.name)
    }
    assert differing == CHANGED[name]


@pytest.mark.parametrize(
    ("name", "filmed"),
    [
        ("no_film_in_last_block", (1, 2, 3)),
        ("no_film_in_last_two_blocks", (1, 2)),
        ("film_in_first_block_only", (1,)),
        ("no_film", ()),
    ],
)
def test_film_is_left_out_from_the_last_block_on(name, filmed):
    assert ablate(RECIPES["paper"], name).config.filmed_blocks == filmed


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_of_the_tiny_network_runs(name):
    config = ablate(RECIPES["tiny"], name).config
    model = build(config)
    loss(model, batch(config)).value.backward()
    assert isinstance(model, VisualReasoner)
    if name.startswith("blocks_"):
        assert len(model.blocks) == int(name.removeprefix("blocks_"))


def test_unknown_ablations_and_baselines_are_named():
    with pytest.raises(ValueError, match=r"got 'gamma_tan'. Nearest: gamma_tanh"):
        ablate(RECIPES["tiny"], "gamma_tan")
    with pytest.raises(ValueError, match="got the baseline 'relation_network'"):
        ablate(RECIPES["laptop_rn"], "gamma_one")


@pytest.mark.parametrize("name", ["tiny", "laptop_sa"])
def test_a_saved_network_loads_as_it_was(name, tmp_path):
    config = replace(RECIPES[name].config, answers=7)
    model = build(config)
    save_weights(tmp_path / "weights.safetensors", model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"network": describe(config)}))
    loaded = load(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    observation = batch(config)
    assert torch.equal(predict(loaded, observation), predict(model, observation))


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a trained network in .*, found no config\.json"):
        load(tmp_path)
