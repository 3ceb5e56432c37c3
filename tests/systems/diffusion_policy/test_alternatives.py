"""FiLM against the alternatives in one policy: each trains, is measured, and is not trained twice."""

import json
from dataclasses import replace

import pytest

from torchfilm.app.cli import main
from torchfilm.systems.diffusion_policy import RECIPES
from torchfilm.systems.diffusion_policy.alternatives import (
    ALTERNATIVES,
    Contest,
    added_at_paper_size,
    hold,
    restore,
    summary,
)
from torchfilm.training import TrainConfig
from torchfilm.training.folder import alone_in
from torchfilm.training.series import RESULT

for package in ("mujoco", "pyarrow", "gymnasium", "diffusers"):
    pytest.importorskip(package)

QUICK = replace(
    RECIPES["tiny"], training=TrainConfig(steps=2, batch_size=4, warmup_steps=1, checkpoint_steps=1, ema=None)
)


@pytest.fixture(scope="module")
def shown(folder):
    from torchfilm.data.table.demonstrations import read_demonstrations

    return read_demonstrations(folder)


def test_a_contest_is_held_once_and_grows_by_names(shown, tmp_path):
    heard = []
    contest = Contest(QUICK, ("film",), seeds=1, scenes=2)
    found = hold(
        contest, shown, tmp_path / "out", lambda name, done, total: heard.append((name, done, total))
    )
    assert heard == [("film, seed 0", 0, 1)]
    row = found["rows"]["film"]
    assert row["seeds"] == 1
    assert 0 <= row["reach"]["mean"] <= 1
    for told in ("language", "language_blank", "language_paraphrase"):
        assert -1 <= row[told]["mean"] <= 1
    assert row["parameters_added"] > 0
    assert row["time"] > 0
    assert row["training_time"] > 0
    kept = (tmp_path / "out" / "film" / "seed_0" / RESULT).read_bytes()
    more = hold(replace(contest, names=("film", "cross_attention")), shown, tmp_path / "out")
    assert (tmp_path / "out" / "film" / "seed_0" / RESULT).read_bytes() == kept
    assert set(more["rows"]) == {"film", "cross_attention"}
    assert more["rows"]["film"]["reach"] == row["reach"]
    restore(json.loads(json.dumps(more)), tmp_path / "again")
    again = hold(replace(contest, names=("film", "cross_attention")), shown, tmp_path / "again")
    assert again["runs"] == more["runs"]
    assert not (tmp_path / "again" / "film" / "seed_0" / "model").exists()
    wider = replace(QUICK, config=replace(QUICK.config, reasoning=9))
    longer = replace(QUICK, training=replace(QUICK.training, steps=3))
    for other, said in (
        (replace(contest, scenes=4), "extra.scenes: 2 in the run, 4 now"),
        (replace(contest, recipe=wider), "extra.network.reasoning: 8 in the run, 9 now"),
        (replace(contest, recipe=longer), "train.steps: 2 in the run, 3 now"),
    ):
        with pytest.raises(ValueError, match=said):
            hold(other, shown, tmp_path / "out")


def test_two_processes_do_not_share_a_folder(shown, tmp_path):
    out = tmp_path / "out"
    with alone_in(out), pytest.raises(ValueError, match="expected no other process that trains there"):
        hold(Contest(QUICK, ("film",), seeds=1, scenes=2), shown, out)
    assert not list(out.iterdir())
    with alone_in(out):  # free again
        pass


def test_every_alternative_is_a_change_of_one_config():
    configs = [change(RECIPES["laptop"].config) for change in ALTERNATIVES.values()]
    assert configs[0] == RECIPES["laptop"].config
    assert len({repr(config) for config in configs}) == len(configs)


def test_what_is_added_at_the_papers_size_is_what_brings_the_reasoning_to_its_places():
    words = ("go", "on")
    added = {name: added_at_paper_size(name, words) for name in ALTERNATIVES}
    channels = 2 * (256 + 512 + 1024) + 2 * 1024 + 2 * 512 + 2 * 256  # two blocks down and up, two between
    silent = added["film"] ** -1 * 129 * 2 * channels  # z of 128 numbers and a constant make gamma and beta
    assert 65e6 < silent < 67e6
    assert added["scale"] == added["bias"] == added["film"] / 2
    assert 0.004 < added["film_low_rank"] < 0.005
    assert added["concat_matched"] == pytest.approx(added["film"], rel=0.02)
    assert added["encoder_only"] is None


def test_seeds_are_summed_up_by_mean_and_range():
    found = summary([{"reach": 0.5}, {"reach": 1.0}])
    assert found == {"seeds": 2, "reach": {"mean": 0.75, "low": 0.5, "high": 1.0}}


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"expected names among film, .* got flim"):
        Contest(QUICK, ("flim",))
    with pytest.raises(ValueError, match="expected at least 1 seed and 2 scenes, got 0 and 100"):
        Contest(QUICK, seeds=0)
    assert main(["compare", "visual_reasoning"]) == 2
    assert "compare: expected diffusion_policy, got 'visual_reasoning'" in capsys.readouterr().err
    assert main(["compare", "diffusion_policy", "--only", "flim", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
