from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_line import Line, Points, mean_error, squared_error, toy_config

from torchfilm.training import CheckpointError, Draw, RunFolderError, find_weights, train
from torchfilm.training.folder import alone_in, describe


def run(out: Path, *, resume: bool = False, module: nn.Module | None = None, **changes: object) -> None:
    config = toy_config(**{"steps": 6, "evaluate_steps": None, **changes})
    extra = {"model": {"width": 3}}
    train(module or Line(), squared_error, Points(), config, out, resume=resume, extra_config=extra)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_with_a_run_is_refused_and_untouched(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(
        RunFolderError,
        match=r"found a run at step_0000006 .*Go on with resume \(--resume\), or choose another",
    ):
        run(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_second_process_that_goes_on_with_the_same_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    found = r"expected no other process that trains there, found one\. Wait for it, or stop it first \(Ctrl-C"
    with alone_in(tmp_path), pytest.raises(RunFolderError, match=found):
        run(tmp_path, resume=True)
    assert contents(tmp_path) == before
    run(tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_what_was_forked_meanwhile_does_not_keep_the_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        sleeper.start()
    with alone_in(tmp_path):
        sleeper.kill()
    sleeper.join()


def test_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunFolderError, match=r"expected a new folder, got the file .*run"):
        run(tmp_path / "run")


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError,
        match=r"expected a run in .*found no config\.json.*Start without resume \(--resume\)",
    ):
        run(tmp_path, resume=True)


def test_a_description_that_was_cut_short_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "config.json").write_text('{"train": {"lr"')
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object"):
        run(tmp_path, resume=True)


def test_resuming_with_another_config_names_the_fields(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        RunFolderError, match=r"train\.lr: 0\.05 in the run, 0\.5 now\n  train\.seed: 3 in the run"
    ):
        run(tmp_path, resume=True, lr=0.5, seed=4)
    with pytest.raises(RunFolderError, match=r"extra\.model\.width: 3 in the run, 5 now"):
        train(
            Line(),
            squared_error,
            Points(),
            toy_config(steps=6, evaluate_steps=None),
            tmp_path,
            resume=True,
            extra_config={"model": {"width": 5}},
        )
    assert contents(tmp_path) == before


def test_data_is_compared_where_the_run_has_written_which(tmp_path: Path) -> None:
    config = toy_config(steps=6, evaluate_steps=None)

    def resume(**extra: object) -> None:
        train(Line(), squared_error, Points(), config, tmp_path, resume=True, extra_config=extra)

    train(Line(), squared_error, Points(), config, tmp_path)
    resume(data={"questions": "1a"})
    (tmp_path / "config.json").write_text(json.dumps(describe(config, {"data": {"questions": "1a"}})))
    resume(data={"questions": "1a"})
    with pytest.raises(RunFolderError, match=r"extra\.data\.questions: '1a' in the run, '2b' now"):
        resume(data={"questions": "2b"})


def test_how_often_to_save_may_change_on_resuming(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, resume=True, checkpoint_steps=2, keep=5)


def test_a_run_of_a_version_without_a_field_had_its_default(tmp_path: Path) -> None:
    run(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for name in ("best", "optimiser", "outputs"):
        del described["train"][name]
    (tmp_path / "config.json").write_text(json.dumps(described))
    run(tmp_path, resume=True)
    with pytest.raises(RunFolderError, match=r"train\.best: None in the run, 'error' now"):
        run(tmp_path, resume=True, best="error")


def test_resuming_a_finished_run_trains_nothing_and_gives_the_same_result(tmp_path: Path) -> None:
    config = toy_config()
    first = train(Line(), squared_error, Points(), config, tmp_path, evaluate=mean_error)
    before = contents(tmp_path)
    points, module = Points(), Line()
    second = train(module, squared_error, points, config, tmp_path, evaluate=mean_error, resume=True)
    assert points.asked == []
    assert contents(tmp_path) == before
    assert (second.steps, second.train, second.evaluation) == (first.steps, first.train, first.evaluation)


def test_resuming_with_another_module_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    other = Line()
    other.head = nn.Linear(3, 2).double()
    with pytest.raises(CheckpointError, match=r"differs     head\.weight: the module has \(\(2, 3\)"):
        run(tmp_path, resume=True, module=other)


def test_the_weights_of_a_run_are_the_averaged_ones_also_on_the_way(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"Weights: expected a run in"):
        find_weights(tmp_path)
    points = Points()

    def failing(draw: Draw) -> object:
        if draw.step == 5:
            raise KeyError("the power is gone")
        return points(draw)

    with pytest.raises(KeyError, match="power"):
        train(Line(), squared_error, failing, toy_config(), tmp_path)
    assert find_weights(tmp_path) == tmp_path / "checkpoints" / "step_0000004" / "ema.safetensors"
    train(Line(), squared_error, points, toy_config(), tmp_path, resume=True)
    assert find_weights(tmp_path) == tmp_path / "weights.safetensors"
    averaged = tmp_path / "checkpoints" / "step_0000024" / "ema.safetensors"
    assert find_weights(tmp_path).read_bytes() == averaged.read_bytes()


def test_the_global_random_state_is_the_callers_afterwards(tmp_path: Path) -> None:
    module = Line()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(tmp_path, module=module)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_an_average_the_weights_are_the_last_ones(tmp_path: Path) -> None:
    module = Line()
    train(module, squared_error, Points(), toy_config(ema=None), tmp_path)
    newest = tmp_path / "checkpoints" / "step_0000024"
    assert not (newest / "ema.safetensors").exists()
    assert find_weights(tmp_path).read_bytes() == (newest / "weights.safetensors").read_bytes()
