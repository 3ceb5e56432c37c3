"""The command from end to end on a tiny dataset, in this process; its options, errors and promises."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchfilm.app import cli
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.systems.visual_reasoning import running, sights
from torchfilm.systems.visual_reasoning.bundle import Sight, load_bundle, save_sight
from torchfilm.systems.visual_reasoning.perception import Perception, PerceptionConfig
from torchfilm.training import Interrupted, TrainConfig
from torchfilm.version import VERSION

OPTIONS = {
    "data": "NAME OUT --split --scenes --seed --recipe --workers --questions-per-scene --condition --width "
    "--height --episodes --noise --json",
    "train": "SYSTEM --recipe --data --out --minutes --steps --lr --seed --start --generator-only --resume "
    "--train-split --val-split --scenes --perception --features --images --cache --json",
    "eval": "SYSTEM RUN --data --split --experiment --blind --families --limit --scenes --seed --out "
    "--recipe --minutes --steps --seeds --only --perception --features --images --guidance "
    "--execution --cache --json",
    "compare": "SYSTEM --recipe --data --out --minutes --steps --seeds --scenes --only --json",
    "inspect": "SYSTEM RUN --data --split --out --points --scenes --between --picture --seed --images "
    "--cache --json",
    "ask": "IMAGE QUESTION --model --json",
    "serve": "SYSTEM --model --host --port --json",
}


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "data"
    for split, scenes in (("train", 14), ("val", 9)):
        given = ("--scenes", scenes, "--questions-per-scene", 13, "--workers", 1)
        assert run("data", "clevr", out, "--split", split, *given) == 0
    return out


@pytest.fixture(scope="module")
def eyes(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    config = PerceptionConfig((4, 6, 8), num_blocks=1)
    folder = tmp_path_factory.mktemp("eyes")
    save_sight(folder, Sight(config, Perception(config).eval()))
    return folder


@pytest.fixture(scope="module")
def trained(data, eyes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    given = ("--data", data, "--out", out, "--steps", 4, "--perception", eyes)
    assert run("train", "--recipe", "tiny", *given) == 0
    return out


@pytest.fixture(scope="module")
def blind(data, eyes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "blind"
    given = ("--data", data, "--out", out, "--steps", 2, "--perception", eyes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "compilable", lambda: False)
        assert run("train", "--recipe", "laptop_lstm", *given) == 0
    return out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """Figures go to runs/EXPERIMENT here, where no --out is named."""
    monkeypatch.chdir(tmp_path)


def only_json(capsys) -> dict:
    """What stdout holds: one JSON object on one line, and nothing else."""
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def complaint(capsys) -> str:
    """The one line on stderr of a command that failed; stdout stays empty."""
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("torchfilm: ")
    return lines[0]


# ---------------------------------------------------------------- the whole way


def test_data_writes_what_the_reader_reads(data):
    folder = ClevrFolder(data)
    assert folder.splits() == ["train", "val"]
    assert folder.images("val", 64, 96).shape == (9, 64, 96, 3)


def test_data_says_what_it_made(data, capsys):
    given = ("--scenes", 9, "--questions-per-scene", 13, "--workers", 1, "--split", "val")
    assert run("data", "clevr", data, *given, "--json") == 0
    made = only_json(capsys)
    questions = sum(1 for _ in ClevrFolder(data).questions("val"))
    assert made == {"out": str(data), "split": "val", "num_scenes": 9, "num_questions": questions, "seed": 0}


def test_a_run_leaves_a_bundle_and_resumes_to_the_same_weights(data, eyes, trained, tmp_path, capsys):
    again = tmp_path / "again"
    given = ("train", "--recipe", "tiny", "--data", data, "--out", again, "--perception", eyes)
    assert run(*given, "--steps", 4) == 0
    capsys.readouterr()
    assert run(*given, "--steps", 4, "--resume", "--json") == 0
    told = only_json(capsys)
    assert (told["steps"], told["recipe"], told["seed"], told["run"]) == (4, "tiny", 0, str(again))
    assert 0 <= told["accuracy"] <= 1
    first, second = (load_bundle(folder).network.state_dict() for folder in (trained, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path.name for path in (trained / "model").iterdir()} == {
        "config.json",
        "weights.safetensors",
        "vocab.json",
        "perception.safetensors",
    }


def test_a_run_starts_where_another_ended(data, trained, tmp_path, capsys):
    given = ("train", "--data", data, "--recipe", "tiny", "--out", tmp_path, "--start", trained)
    assert run(*given, "--steps", 1, "--lr", 1e-12) == 0
    before, after = (load_bundle(path).network.state_dict() for path in (trained, tmp_path))
    assert all(torch.allclose(after[name], before[name], atol=1e-4) for name in before if "norm" not in name)


def test_an_interrupted_run_leaves_its_newest_weights(data, eyes, tmp_path, monkeypatch):
    def interrupted(network, *arguments, **more):
        running_train(network, *arguments, **more)
        raise Interrupted(2, "stopped at step 2")

    running_train = running.train
    monkeypatch.setattr(running, "train", interrupted)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        run("train", "--recipe", "tiny", "--data", data, "--out", out, "--steps", 2, "--perception", eyes)
    assert end.value.code == 130
    assert load_bundle(out).recipe == "tiny"


def test_eval_measures_beside_the_blind_baseline(data, trained, blind, capsys):
    assert run("eval", "visual_reasoning", trained, "--data", data, "--blind", blind, "--families") == 0
    shown = capsys.readouterr().out
    assert re.search(r"question +n +accuracy +95 % +blind +most frequent", shown)
    assert re.search(r"\nall .* \d+\.\d % .* \d+\.\d %", shown)
    given = ("--data", data, "--split", "val", "--blind", blind, "--limit", 50, "--json")
    assert run("eval", "visual_reasoning", trained, *given) == 0
    found = only_json(capsys)
    assert {"accuracy", "by_kind", "n", "seed", "blind", "mode"} <= set(found)
    assert (found["n"], found["seed"], found["split"], found["recipe"]) == (50, 0, "val", "tiny")


def test_eval_reads_questions_whose_images_lie_elsewhere(data, trained, tmp_path, capsys):
    asked = json.loads((data / "questions" / "CLEVR_val_questions.json").read_text())["questions"][:5]
    kept = ("question", "image_filename", "answer", "split")
    humans = tmp_path / "CLEVR-Humans-val.json"
    humans.write_text(json.dumps({"questions": [{key: one[key] for key in kept} for one in asked]}))
    given = ("eval", "visual_reasoning", trained, "--data", tmp_path, "--split", "val", "--json")
    assert run(*given) == 2
    assert run(*given, "--images", data) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 5


def test_eval_renders_fresh_scenes_where_no_data_is_named(trained, tmp_path, capsys):
    given = ("--scenes", 3, "--seed", 5, "--out", tmp_path / "figures", "--json")
    assert run("eval", "visual_reasoning", trained, *given) == 0
    said = capsys.readouterr()
    assert "rendering 3 fresh scenes, seed 5" in said.err
    assert json.loads(said.out)["scenes"] == 3
    assert (tmp_path / "figures" / "report.json").is_file()


@pytest.mark.parametrize("experiment", ["means", "noise"])
def test_eval_changes_gamma_and_beta(experiment, data, trained, capsys):
    given = ("visual_reasoning", trained, "--data", data, "--experiment", experiment)
    assert run("eval", *given) == 0
    assert ("γ = 1" in capsys.readouterr().out) == (experiment == "means")
    drawn = {path.name for path in (Path("runs") / experiment).glob("*.png")}
    assert drawn == ({"means.png"} if experiment == "means" else {"means.png", "noise.png"})
    assert run("eval", *given, "--json") == 0
    found = only_json(capsys)
    assert found["experiment"] == experiment
    assert found["noise_gamma"][0] == found["accuracy"]
    assert len(found["noise"]) == (1 if experiment == "means" else 10)


def test_eval_trains_ablations_and_the_data_size_curve(data, eyes, tmp_path, capsys):
    given = ("--data", data, "--recipe", "tiny", "--steps", 2, "--perception", eyes, "--json")
    for experiment, only, names in (
        ("ablations", "gamma_one", {"unchanged", "gamma_one"}),
        ("data_size", 7, {"scenes_7"}),
    ):
        out = tmp_path / experiment
        assert run("eval", "--experiment", experiment, "--only", only, "--out", out, *given) == 0
        found = only_json(capsys)
        assert set(found["settings"]) == names
        assert (out / f"{experiment}.png").is_file()


def test_eval_tells_of_an_unknown_setting_before_it_looks_at_the_pictures(data, capsys):
    for experiment, only, told in (
        ("ablations", "gamma_on", "got 'gamma_on'. Nearest: gamma_one"),
        ("data_size", "all", "--only: expected whole numbers for data_size, got ('all',)"),
    ):
        given = ("--data", data, "--recipe", "tiny", "--only", only)
        assert run("eval", "--experiment", experiment, *given) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "reading the questions" not in said


@pytest.fixture(scope="module")
def conditions(tmp_path_factory) -> Path:
    """Splits of CoGenT's two conditions."""
    out = tmp_path_factory.mktemp("cogent") / "data"
    for seed, split in enumerate(("trainA", "valA", "valB", "testB")):
        given = ("--scenes", 9, "--questions-per-scene", 13, "--workers", 1, "--seed", seed)
        assert run("data", "clevr", out, "--split", split, *given) == 0
    return out


def test_eval_fine_tunes_on_condition_b_and_asks_by_arithmetic(conditions, eyes, tmp_path, capsys):
    given = ("--data", conditions, "--recipe", "tiny", "--steps", 10, "--perception", eyes)
    more = ("--experiment", "cogent", "--seeds", 2, "--out", tmp_path, "--json")
    assert run("eval", *given, *more, "--only", 30) == 0  # without 0: trained on A all the same
    said = capsys.readouterr()
    assert "training on A: 10 steps; each fine-tuning: 2 steps" in said.err
    assert len(json.loads(said.out)["B"][0]["accuracies"]) == 2
    on_a, tuned = (tmp_path / name for name in ("on_a/seed_1", "questions_30/seed_1/run"))
    before, after = (load_bundle(folder).network.state_dict() for folder in (on_a, tuned))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tuned / "config.json").read_text())
    assert (config["train"]["steps"], config["train"]["seed"]) == (2, 1)
    assert run("eval", *given, *more, "--only", 0, 30) == 0
    found = only_json(capsys)
    assert found["questions"] == [0, 30]
    assert all(0 <= row["accuracy"] <= 1 for row in (*found["A"], *found["B"]))
    zero = ("eval", "visual_reasoning", on_a, "--data", conditions, "--experiment", "arithmetic")
    assert run(*zero, "--json") == 0
    found = only_json(capsys)
    assert (found["split"], found["n"]) == ("testB", len(list(ClevrFolder(conditions).questions("testB"))))
    assert {path.name for path in Path("runs/arithmetic").iterdir()} == {
        "zero_shot.csv",
        "zero_shot.json",
        "zero_shot.png",
    }


def test_a_series_refuses_the_results_of_another_budget(data, eyes, tmp_path, capsys):
    given = ("eval", "--experiment", "data_size", "--only", 7, "--out", tmp_path, "--data", data)
    given = (*given, "--recipe", "tiny", "--perception", eyes)
    assert run(*given, "--steps", 2) == 0
    assert re.search("scenes_7 +[0-9.]+ %", capsys.readouterr().out)
    assert run(*given, "--steps", 3) == 2
    assert "train.steps: expected 3, got 2" in capsys.readouterr().err
    assert run(*given, "--steps", 2, "--blind", data) == 2


def test_the_curve_over_the_data_has_the_blind_networks_level(data, eyes, blind, tmp_path, capsys):
    given = ("--experiment", "data_size", "--only", 7, "--out", tmp_path, "--steps", 2, "--blind", blind)
    assert run("eval", "--data", data, "--recipe", "tiny", "--perception", eyes, *given, "--json") == 0
    assert 0 <= only_json(capsys)["blind"] <= 1


def test_ask_answers(data, trained, capsys):
    image = data / "images" / "val" / "CLEVR_val_000002.png"
    question = next(ClevrFolder(data).questions("train"))["question"]
    assert run("ask", image, question, "--model", trained) == 0
    assert re.fullmatch(r"\S+  [\d.]+ %  \(else \S+, [\d.]+ %\)\n", capsys.readouterr().out)
    assert run("ask", image, question, "--model", trained, "--json") == 0
    told = only_json(capsys)
    assert told["probabilities"][told["answer"]] == told["probability"] == max(told["probabilities"].values())


def test_inspect_draws(data, trained, tmp_path, capsys):
    given = ("--data", data, "--split", "val", "--out", tmp_path / "figures", "--points", 40, "--json")
    assert run("inspect", "visual_reasoning", trained, *given) == 0
    files = only_json(capsys)["files"]
    names = {Path(file).name for file in files}
    assert {"histograms.png", "embedding.png", "pool.png", "planes_block1.png"} <= names
    assert all(Path(file).is_file() for file in files)


def test_inspect_goes_from_one_question_to_another(data, trained, tmp_path, capsys):
    asked = [
        question["question"] for question, _ in zip(ClevrFolder(data).questions("train"), "ab", strict=False)
    ]
    given = ("inspect", "visual_reasoning", trained, "--data", data, "--out", tmp_path / "steps", "--json")
    assert run(*given, "--between", *asked, "--picture", 2) == 0
    files = only_json(capsys)["files"]
    assert [Path(file).name for file in files] == ["interpolation.png", "interpolation.csv"]
    assert all(Path(file).is_file() for file in files)
    for wrong, message in (
        (("--between", asked[0]), "--between: expected two questions, got 1"),
        (("--between", *asked, "--picture", 9), "expected a picture from 0 to 8, got 9"),
    ):
        assert run(*given, *wrong) == 2
        assert message in complaint_after_notes(capsys)


def test_perception_is_trained_on_objects_alone(data, tmp_path, capsys, monkeypatch):
    small = TrainConfig(steps=1, batch_size=7, checkpoint_seconds=None)
    monkeypatch.setattr(sights, "PERCEPTION_TRAINING", small)
    out = tmp_path / "sight"
    given = ("--recipe", "perception", "--data", data, "--out", out, "--steps", 2)
    assert run("train", *given, "--train-split", "val", "--json") == 0
    told = only_json(capsys)
    assert {"shape", "color", "all_four"} <= set(told)
    given = ("--recipe", "tiny", "--data", data, "--out", tmp_path / "run", "--steps", 1)
    assert run("train", *given, "--perception", out) == 0


# ---------------------------------------------------------------- what was promised


def test_the_options_are_the_frozen_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = {}
    for name in cli.COMMANDS:
        assert run(name, "--help") == 0
        shown = capsys.readouterr().out
        assert f"Example: torchfilm {name}" in shown
        lines = re.findall(r"^[│ ] (--[a-z-]+|[A-Z]+)\b", shown, flags=re.MULTILINE)
        found[name] = " ".join(line for line in lines if line != "-h")
    assert found == OPTIONS


def test_help_lists_the_commands_with_examples(capsys):
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in cli.COMMANDS)
        assert shown.count("\n  torchfilm ") == 5


def test_the_version_is_told_also_where_no_package_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "distribution", None)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_errors_are_one_line_and_exit_code_2(data, trained, tmp_path, capsys):
    image = data / "images" / "val" / "CLEVR_val_000000.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "small.png")
    tiny = ["train", "--recipe", "tiny", "--data", data]
    new = tmp_path / "new"
    for arguments, pattern in (
        (["evil"], "unknown command 'evil'; nearest: eval"),
        (["eval", "visual"], "unknown system 'visual'; nearest: visual_reasoning"),
        (["data", "clever"], "unknown world 'clever'; nearest: clevr"),
        (["train", "--recipe", "labtop"], "unknown recipe 'labtop'; nearest: laptop, laptop_"),
        (["eval", "--experiment", "x"], "invalid choice 'x'.* Help: torchfilm eval --help"),
        (["ask"], "Missing .*IMAGE.*QUESTION"),
        (["eval", "--unheard-of"], "Unrecognized options: --unheard-of"),
        (["ask", image, "What is a zorp?", "--model", trained], "unknown word 'zorp'; the nearest"),
        (["ask", tmp_path / "no.png", "Is it?", "--model", trained], "no such image"),
        (["ask", tmp_path / "small.png", "What", "--model", trained], "at least 16"),
        (["ask", image, "What", "--model", tmp_path], "found no config.json"),
        (["eval", "visual_reasoning", trained, "--data", tmp_path / "no"], "expected a CLEVR folder"),
        (["eval", "visual_reasoning", trained, "--data", data, "--split", "z"], "Splits there: train, val"),
        (["eval", "--experiment", "ablations"], "expected --data"),
        (
            ["eval", "--experiment", "cogent", "--data", data, "--split", "val"],
            "expected no --split, got 'val'",
        ),
        (["eval", "--experiment", "arithmetic", "--data", data], "got no RUN .the shipped one has seen all"),
        (["eval", "visual_reasoning", trained, "--experiment", "arithmetic"], "got no --data"),
        ([*tiny, "--out", trained, "--perception", trained], r"with resume \(--resume\)"),
        ([*tiny, "--out", new, "--perception", data], "expected a trained perception"),
        (["train", "--recipe", "paper", "--data", data, "--out", new], "train_features.h5"),
        (["data", "clevr", data, "--split", "val", "--scenes", 10], "Nothing was changed"),
        (["serve", "--model", trained, "--port", 70000], "cannot listen on port 70000"),
    ):
        assert run(*arguments) == 2, arguments
        assert re.search(pattern, complaint_after_notes(capsys)), arguments
    assert not new.exists()


def complaint_after_notes(capsys) -> str:
    """The last line on stderr; notes about progress may come before."""
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    *notes, last = said.err.splitlines()
    assert last.startswith("torchfilm: ")
    assert not any(line.startswith("torchfilm: ") for line in notes)
    return last


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "Resume: it differs:\n  a: 1, 2 now\n  b: 3, 5 now\nStart anew.",
            "Resume: it differs: a: 1, 2 now; b: 3, 5 now. Start anew.",
        ),
        ("gamma has 64 channels.\n  x  (2, 1)\nUse dim=-1.", "gamma has 64 channels. x (2, 1). Use dim=-1."),
        ("one sentence\ngoes on", "one sentence goes on"),
    ],
)
def test_an_error_of_several_lines_stays_sentences(text, line, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise ValueError(text)

    monkeypatch.setattr(cli, "parse", fail)
    assert run("ask") == 2
    assert complaint(capsys) == f"torchfilm: {line}"


def test_numbers_that_are_none_are_refused_in_words(capsys):
    for option, said in (
        (("--minutes", "x"), "--minutes: expected a number, got 'x'."),
        (("--steps", "1.5"), "--steps: expected a whole number, got '1.5'."),
        (("--seed", "x"), "--seed: expected a whole number, got 'x'."),
    ):
        assert run("train", *option) == 2
        assert complaint(capsys) == f"torchfilm: Error parsing {said} Help: torchfilm train --help"


@pytest.mark.parametrize(
    ("package", "command", "line"),
    [
        ("tyro", "ask", "the command needs more packages: pip install 'torchfilm[systems,robots,serve]'"),
        ("uvicorn", "serve", "pages need a server: pip install 'torchfilm[serve]'"),
    ],
)
def test_a_missing_extra_is_named(package, command, line, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torchfilm.app.serving", raising=False)
    assert run(command) == 2
    assert complaint(capsys).startswith(f"torchfilm: {line} (ModuleNotFoundError: ")


def test_a_run_that_goes_on_with_another_budget_is_told_what_to_do(data, eyes, trained, capsys):
    given = ("train", "--recipe", "tiny", "--data", data, "--out", trained, "--perception", eyes)
    assert run(*given, "--steps", 5, "--resume") == 2
    said = complaint_after_notes(capsys)
    assert "train.steps: 4 in the run, 5 now. Resume with the run's own config and data, or start a" in said
    assert "To train longer, begin the new run with these weights (--start" in said


def test_an_interrupt_exits_130(monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupt)
    assert run("ask") == 130
    assert complaint(capsys) == "torchfilm: stopped"
