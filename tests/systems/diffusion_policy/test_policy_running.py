"""From demonstrations to a policy in a folder, to episodes, to a report; by functions and by commands."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from torchfilm.app.cli import main
from torchfilm.data.table.demonstrations import generate_demonstrations, read_demonstrations
from torchfilm.data.table.scenes import place_of
from torchfilm.data.table.tasks import HOWS, Task
from torchfilm.data.table.trials import Trials
from torchfilm.data.table.wording import vocabulary
from torchfilm.systems.diffusion_policy import RECIPES, SHIPPED, load, running
from torchfilm.systems.diffusion_policy.data import Recordings, Windows
from torchfilm.systems.diffusion_policy.evaluate import (
    Share,
    draw_scenes,
    evaluate,
    in_all_manners,
    language_score,
    rows_of,
)
from torchfilm.systems.diffusion_policy.looking import SPOTS
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import Vocabulary
from torchfilm.systems.diffusion_policy.running import train_policy
from torchfilm.systems.diffusion_policy.thinking import Thoughts
from torchfilm.training import Draw, RunFolderError, TrainConfig

for package in ("mujoco", "pyarrow", "gymnasium", "diffusers"):
    pytest.importorskip(package)

QUICK = replace(
    RECIPES["tiny"], training=TrainConfig(steps=3, batch_size=4, warmup_steps=1, checkpoint_steps=2, ema=None)
)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quick"
    return out, train_policy("tiny", QUICK, read_demonstrations(folder), out)


def test_the_encoder_sees_the_spots_that_tasks_speak_of(run):
    _, outcome = run
    scene = draw_scenes(1, 0)[0].scene
    trials = Trials([scene], [[Task(0)]])
    state = np.concatenate((trials.state[:, 0], trials.environment[:, 0]), axis=1)
    seen = torch.from_numpy(state.astype(np.float32))[:, None].expand(-1, 2, -1)
    spots = outcome.policy.encoder.spots(seen)[0] * 0.25 + seen[0, -1, 4:6]
    expected = [scene.obstacle, *(place_of(scene, place) for place in SPOTS[2:])]
    np.testing.assert_allclose(spots.numpy(), expected, atol=1e-5)


def test_actions_have_one_scale_in_all_directions_when_the_network_turns(run):
    scale = run[1].policy.action_scale
    assert scale.low.tolist() == (-scale.high).tolist()
    assert torch.equal(scale.high[:, 0], scale.high[:, 1])


def test_relative_actions_have_a_scale_for_each_step_of_a_chunk(run):
    high = run[1].policy.action_scale.high
    assert high.shape == (16, 2)
    assert high[-1, 0] > 3 * high[1, 0]


def recordings():
    observations = torch.arange(9.0)[:, None]
    words = Vocabulary(("go", "on"))(["go", "on on"])
    return Recordings(observations, 10 * observations, np.array([0, 4, 9]), {"instruction": words})


def test_windows_repeat_the_edges_of_their_own_episode():
    batch = Windows(recordings(), 2, 5).at(np.array([0, 3, 4, 8]))
    assert batch.observations[..., 0].tolist() == [[0, 0], [2, 3], [4, 4], [7, 8]]
    assert batch.actions[..., 0].tolist() == [
        [0, 0, 10, 20, 30],
        [20, 30, 30, 30, 30],
        [40, 40, 50, 60, 70],
        [70, 80, 80, 80, 80],
    ]
    tokens, lengths = batch.reasoning["instruction"]
    assert tokens.tolist() == [[1, 0], [1, 0], [2, 2], [2, 2]]
    assert lengths.tolist() == [1, 1, 2, 2]


def test_equal_draws_give_equal_windows_and_processes_share_them():
    windows = Windows(recordings(), 2, 5)
    whole = windows(Draw(7, 1, 0.0, 6)).actions
    assert torch.equal(whole, windows(Draw(7, 1, 0.0, 6)).actions)
    parts = [windows(Draw(7, 1, 0.0, 6, rank, 2)).actions for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, windows(Draw(8, 1, 0.0, 6)).actions)


def test_a_balance_of_one_draws_episodes_evenly():
    first = {}
    for balance in (0.0, 1.0):
        seen = Windows(recordings(), 1, 1, balance)(Draw(0, 0, 0.0, 20_000)).observations[:, 0, 0]
        first[balance] = float((seen < 4).double().mean())
    assert first[0.0] == pytest.approx(4 / 9, abs=0.02)
    assert first[1.0] == pytest.approx(1 / 2, abs=0.02)


def test_a_share_of_what_is_drawn_are_beginnings():
    windows = Windows(recordings(), 1, 1, balance=1.0, beginnings=0.5)
    seen = windows(Draw(0, 0, 0.0, 20_000)).observations[:, 0, 0]
    assert float((seen == 0).double().mean()) == pytest.approx(0.25 + 0.25 / 4, abs=0.02)
    assert float((seen == 8).double().mean()) == pytest.approx(0.25 / 5, abs=0.02)


def test_recordings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected one action per observation"):
        Recordings(torch.ones(3, 1), torch.ones(2, 1), np.array([0, 3]), {})


def test_a_trained_policy_loads_with_its_scales_and_acts_alike(run):
    out, outcome = run
    policy = load(out)
    assert policy.config.vocabulary == vocabulary()
    assert torch.equal(policy.action_scale.low, outcome.policy.action_scale.low)
    assert not torch.equal(policy.scale.low, -torch.ones(46))
    observation = torch.rand(2, 46) * 0.1
    for network in (policy, outcome.policy):
        acting = Policy(network)
        acting.reset(["push the red ball to the goal", None])
        torch.testing.assert_close(acting.act(observation), acting._chunks[:, 1])
    assert outcome.to_json()["steps"] == 3


def test_a_sensor_is_trained_beside_the_words(folder, tmp_path):
    force = {"force": torch.randn(4, 3)}
    outcome = train_policy("tiny", QUICK, read_demonstrations(folder), tmp_path / "run", vectors=force)
    assert outcome.policy.config.vectors == (("force", 3),)
    acting = Policy(load(tmp_path / "run"))
    acting.reset(["push the red ball to the goal"], {"force": torch.ones(1, 3)})
    assert acting.act(torch.zeros(1, 46)).shape == (1, 2)


def test_a_reader_is_trained_in_place_of_the_words(folder, tmp_path):
    class Reader:
        dim = 2

        def __call__(self, texts, scenes=None):
            return Thoughts(tuple(texts), torch.tensor([[len(text), 1.0] for text in texts]))

    shown = read_demonstrations(folder)
    read = {"text": Reader()([episode.told[0].text for episode in shown.episodes]).vectors}
    train_policy("tiny", QUICK, shown, tmp_path / "run", vectors=read, words=Vocabulary(()))
    first = replace(QUICK, understanding=QUICK.training)
    with pytest.raises(ValueError, match="expected words for a recipe that learns them first, got none"):
        train_policy("tiny", first, shown, tmp_path / "other", words=Vocabulary(()))
    network = load(tmp_path / "run")
    assert (network.config.vocabulary, network.config.vectors) == ((), (("text", 2),))
    acting = Policy(network, readers={"text": Reader()})
    acting.reset(["anything in any words"])
    assert acting.act(torch.zeros(1, 46)).shape == (1, 2)


FIRST = TrainConfig(steps=5, batch_size=4, warmup_steps=1, checkpoint_steps=2, ema=None)
UNDERSTOOD = replace(QUICK, understanding=FIRST)


def words_of(tensors) -> dict[str, torch.Tensor]:
    return {key.removeprefix("policy."): v for key, v in tensors.items() if "instruction.condition" in key}


@pytest.fixture(scope="module")
def understood(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "understood"
    return out, train_policy("tiny", UNDERSTOOD, read_demonstrations(folder), out)


def test_words_learned_first_are_held_fast_and_not_learned_again(folder, understood):
    out, outcome = understood
    learned = words_of(load_file(out / "understanding" / "weights.safetensors"))
    assert len(learned) > 5
    assert all(torch.equal(outcome.policy.state_dict()[key], value) for key, value in learned.items())
    assert outcome.policy.encoder.held
    again = train_policy("tiny", UNDERSTOOD, read_demonstrations(folder), out, resume=True)
    assert torch.equal(again.policy.unet.out.weight, outcome.policy.unet.out.weight)


def test_nothing_is_held_of_an_encoder_that_hears_nothing(folder, tmp_path):
    deaf = replace(UNDERSTOOD, config=replace(UNDERSTOOD.config, listens=("condition",)))
    policy = train_policy("tiny", deaf, read_demonstrations(folder), tmp_path / "run").policy
    learned = load_file(tmp_path / "run" / "understanding" / "weights.safetensors")
    assert not policy.encoder.held
    assert not all(torch.equal(policy.state_dict()[key], value) for key, value in words_of(learned).items())
    assert not torch.equal(policy.encoder.score.weight, learned["policy.encoder.score.weight"])


@pytest.mark.parametrize(("stage", "at"), [("understanding_loss", 3), ("understanding_loss", 4), ("loss", 2)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    stage, at, folder, understood, tmp_path, monkeypatch
):
    shown, out, calls = read_demonstrations(folder), tmp_path / "run", []
    whole = getattr(running, stage)

    def dying(*given):
        calls.append(1)
        if len(calls) > at:
            raise KeyError("the power is gone")
        return whole(*given)

    with monkeypatch.context() as patch:
        patch.setattr(running, stage, dying)
        with pytest.raises(KeyError, match="power"):
            train_policy("tiny", UNDERSTOOD, shown, out)
    assert (out / "config.json").is_file() == (stage == "loss")
    with pytest.raises(RunFolderError, match="expected a new or empty one, found a run at"):
        train_policy("tiny", UNDERSTOOD, shown, out)
    again = train_policy("tiny", UNDERSTOOD, shown, out, resume=True)
    for name, value in understood[1].policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], value), name


def test_a_run_goes_on_with_its_own_demonstrations_alone(run, folder):
    out, _ = run
    shown = read_demonstrations(folder)
    train_policy("tiny", QUICK, shown, out, resume=True)
    with pytest.raises(RunFolderError, match=r"extra\.data: '\w+' in the run, '\w+' now"):
        train_policy("tiny", QUICK, replace(shown, action=shown.action + 0.01), out, resume=True)


def test_where_nothing_was_begun_there_is_nothing_to_resume(folder, tmp_path):
    with pytest.raises(RunFolderError, match=r"expected a run in .*nothing, found no config\.json there"):
        train_policy("tiny", UNDERSTOOD, read_demonstrations(folder), tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_run_does_not_go_on_with_other_demonstrations(folder, run, tmp_path):
    out = tmp_path / "other"
    generate_demonstrations(out, 3, seed=4)
    with pytest.raises(RunFolderError, match=r"extra\.episodes: 4 in the run, 3 now"):
        train_policy("tiny", QUICK, read_demonstrations(out), run[0], resume=True)


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a trained policy in"):
        load(tmp_path)
    if not (SHIPPED / "config.json").is_file():
        with pytest.raises(ValueError, match="expected the shipped checkpoint in"):
            load()


def test_the_same_scenes_are_played_in_all_manners():
    scenes = draw_scenes(4, seed=1)
    told = in_all_manners(scenes, seed=1)
    assert [e.tasks[0].how for e in told] == list(HOWS) * 4
    assert all(told[i].scene == scenes[i // 4].scene for i in range(16))
    assert {told[i].tasks[0].which for i in range(4)} == {scenes[0].tasks[0].which}
    other = in_all_manners(scenes, seed=1, held_out=True)
    assert all(e.told[0].held_out for e in other)
    assert [e.tasks for e in other] == [e.tasks for e in told]


def test_experts_would_pass_where_they_are_told_to_avoid():
    from torchfilm.data.table.playing import play

    told = in_all_manners(draw_scenes(6, seed=2), seed=2)
    played = play([e.scene for e in told], [e.tasks for e in told])
    rows = rows_of(told, [outcome for (outcome,) in played])
    assert rows["reach avoid"].collisions.value == 0
    assert rows["reach plain"].collisions.value == 1
    assert rows["push save"].energy < rows["push plain"].energy / 2
    assert all(row.success.value == 1 for row in rows.values())
    pairs = zip(told, played, strict=True)
    plain = [one for e, (one,) in pairs if (e.tasks[0].what, e.tasks[0].how) == ("reach", "plain")]
    assert rows["reach plain"].clearance == pytest.approx(np.mean([one.clearance for one in plain]))
    assert rows["reach plain"].path == pytest.approx(np.mean([one.path for one in plain]))
    assert rows["reach plain"].clearance < 0 < rows["reach avoid"].clearance
    assert rows["reach plain"].path < rows["reach avoid"].path


def test_a_report_counts_what_was_played(run):
    report = evaluate(Policy(load(run[0])), scenes=2, seed=1)
    found = report.to_json()
    assert found["n"] == 8
    assert set(found["by_kind"]) == {f"{what} {how}" for what in ("reach", "push") for how in HOWS}
    assert report.success("reach").n == report.success("push", held_out=True).n == 4
    assert found["held_out"]["push both"]["looks"]["n"] == 1
    assert found["failures"] == []
    json.dumps(found)


@pytest.mark.parametrize("scenes", [-1, 0, 1])
def test_fewer_scenes_than_deeds_are_refused(run, scenes):
    with pytest.raises(ValueError, match=f"at least 2 scenes, one for each deed, got {scenes}"):
        evaluate(Policy(load(run[0])), scenes=scenes)


def test_an_interval_is_wilsons():
    share = Share.of([True] * 9 + [False])
    assert (share.value, share.n) == (0.9, 10)
    assert share.low == pytest.approx(0.5958, abs=1e-3)
    assert share.high == pytest.approx(0.9821, abs=1e-3)


def test_instructions_are_swapped_blanked_and_paraphrased():
    hearing = language_score(Policy(load()), scenes=6, seed=1, batch=6)
    assert set(hearing.effects) == {"repeat", "swap", "blank", "paraphrase"}
    effects = {name: effect.success.value for name, effect in hearing.effects.items()}
    assert hearing.success.value >= 0.8
    assert effects["repeat"] == 0
    assert effects["swap"] <= -0.5
    assert effects["blank"] <= -0.5


def test_the_commands_train_and_measure(tmp_path, capsys, folder):
    out = tmp_path / "run"
    train = ["train", "diffusion_policy", "--recipe", "tiny", "--data", str(folder), "--out", str(out)]
    assert main([*train, "--steps", "2", "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["steps"] == 2
    assert main(["eval", "diffusion_policy", str(out), "--scenes", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"success", "by_kind", "n", "seed"} <= set(found)
    assert main(["train", "diffusion_policy", "--recipe", "labtop"]) == 2
    assert "nearest: laptop" in capsys.readouterr().err
