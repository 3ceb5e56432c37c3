"""What a system does not read is refused, by one helper for all commands; so are numbers out of range."""

from dataclasses import dataclass
from typing import get_args, get_type_hints

import pytest

from torchfilm.app import cli
from torchfilm.app.commands import evaluate, inspect, make_data, train
from torchfilm.app.options import check_least, check_own

OWN = {"train": train.OWN, "eval": evaluate.OWN, "inspect": inspect.OWN}
GIVEN = {
    "blind": ["r1"],
    "cache": ["a"],
    "between": ["a", "b"],
    "execution": ["4"],
    "families": [],
    "generator_only": [],
    "guidance": ["3"],
    "limit": ["5"],
    "lr": ["0.5"],
    "minutes": ["2"],
    "only": ["a"],
    "picture": ["1"],
    "run": ["r1"],
    "scenes": ["2"],
    "seed": ["2"],
    "seeds": ["2"],
    "steps": ["3"],
}
"""Values that can be read; all other options take any text."""


def refused(capsys, *arguments: str) -> str:
    """The one line of a command that was refused."""
    assert cli.main(arguments) == 2, arguments
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


ALIEN = [
    (command, system, option)
    for command, own in OWN.items()
    for system in own
    for other, options in own.items()
    if other != system
    for option in options
]


@pytest.mark.parametrize(("command", "system", "option"), ALIEN)
def test_an_option_of_another_system_is_refused(command, system, option, capsys):
    flag = f"--{option.replace('_', '-')}"
    said = refused(capsys, command, system, flag, *GIVEN.get(option, ["nope"]))
    assert f"{flag} says nothing to the system '{system}'. Leave it out." in said


def test_the_options_of_systems_are_fields():
    commands = {"train": train.Train, "eval": evaluate.Evaluate, "inspect": inspect.Inspect}
    for name, own in OWN.items():
        known = get_type_hints(commands[name])
        assert {option for options in own.values() for option in options} <= set(known)


def test_options_that_the_recipe_perception_does_not_read_are_refused(capsys):
    for option, value in (("--lr", "0.5"), ("--start", "r1"), ("--scenes", "3"), ("--perception", "r1")):
        said = refused(capsys, "train", "--recipe", "perception", option, value)
        assert f"{option} says nothing to the recipe 'perception'" in said


UNREAD = [
    (experiment, option)
    for experiment, read in evaluate.READ.items()
    for option in sorted({option for options in evaluate.READ.values() for option in options} - set(read))
]


@pytest.mark.parametrize(("experiment", "option"), UNREAD)
def test_an_option_of_another_experiment_is_refused(experiment, option, capsys):
    flag = [] if option == "run" else [f"--{option}"]
    given = [*flag, *GIVEN.get(option, ["nope"])]
    said = refused(capsys, "eval", "visual_reasoning", *given, "--experiment", experiment, "--data", "nope")
    assert f"{(*flag, 'RUN')[0]} says nothing to the experiment '{experiment}'. Leave it out." in said


def test_each_experiment_says_what_it_reads():
    assert tuple(evaluate.READ) == evaluate.EXPERIMENTS["visual_reasoning"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval --data nope --scenes 3", "--scenes says nothing with --data"),
        ("eval --split val", "--split says nothing without --data"),
        ("eval --cache a --images b", "--images says nothing without --data"),
        ("eval --data nope --features b", "--features says nothing to the network over 'maps'"),
        ("inspect --data nope --scenes 3", "--scenes says nothing with --data"),
        ("inspect --cache a", "--cache says nothing without --data"),
        ("inspect --picture 3", "--picture says nothing without --between"),
        ("inspect --between a b --points 9", "--points says nothing with --between"),
        ("train --recipe tiny --data . --features a", "--features says nothing to the recipe over 'maps'"),
        ("train --recipe paper --data . --perception a", "--perception says nothing to the recipe over"),
        (
            "eval --experiment ablations --recipe paper --data . --perception a",
            "--perception says nothing to the recipe over 'features'",
        ),
    ],
)
def test_an_option_that_says_nothing_beside_the_others_is_refused(arguments, message, capsys):
    assert message in refused(capsys, *arguments.split())


def test_each_system_runs_an_experiment_or_refuses_it(capsys):
    every = get_args(get_type_hints(evaluate.Evaluate)["experiment"])
    assert set(every) == {name for names in evaluate.EXPERIMENTS.values() for name in names}
    for system, names in evaluate.EXPERIMENTS.items():
        for name in set(every) - set(names):
            (owner,) = (other for other, found in evaluate.EXPERIMENTS.items() if name in found)
            said = refused(capsys, "eval", system, "--experiment", name)
            assert f"experiment '{name}' is one of {owner}; {system} has accuracy" in said


@dataclass(frozen=True)
class Walk:
    way: str = "home"
    speed: float | None = None
    slow_start: bool = False


def test_own_options_are_those_of_one_kind_alone():
    own = {"car": ("speed", "slow_start"), "bus": ("speed",)}
    check_own(Walk(speed=2.0), own, "bus", "vehicle")
    check_own(Walk(way="out", slow_start=True), own, "car", "vehicle")
    with pytest.raises(ValueError, match=r"--slow-start says nothing to the vehicle 'bus'\. Leave it out"):
        check_own(Walk(slow_start=True), own, "bus", "vehicle")


def test_numbers_below_the_least_are_refused():
    check_least(Walk(), speed=1)
    check_least(Walk(speed=1.0), speed=1)
    for speed in (0.5, float("nan"), float("-inf")):
        with pytest.raises(ValueError, match=rf"--speed: expected 1 or more, got {speed:g}"):
            check_least(Walk(speed=speed), speed=1)


@pytest.mark.parametrize(
    "arguments",
    [
        "eval --limit 0",
        "eval --limit -1",
        "eval --scenes 0",
        "eval --seeds 0 --experiment ablations",
        "eval --seed -1",
        "eval diffusion_policy --seed -1",
        "eval diffusion_policy --scenes 0",
        "eval diffusion_policy --scenes -1 --experiment language",
        "inspect --points 0",
        "inspect diffusion_policy --points 0",
        "inspect --seed -1",
        "inspect --scenes 0",
        "train --scenes 0",
    ],
)
def test_numbers_out_of_range_are_named_before_any_work(arguments, capsys):
    option, number = next(
        (flag, value)
        for flag, value in zip(arguments.split(), arguments.split()[1:], strict=False)
        if flag.startswith("--") and value in ("0", "-1")
    )
    assert f"{option}: expected " in (said := refused(capsys, *arguments.split()))
    assert f"or more, got {number}" in said


def test_guidance_is_finite(capsys):
    for number in ("nan", "inf"):
        said = refused(capsys, "eval", "diffusion_policy", "--guidance", number)
        assert f"--guidance: expected a finite number, got {number}" in said


def test_an_unknown_split_is_noted_before_it_is_made(tmp_path, capsys):
    given = ("--scenes", "2", "--questions-per-scene", "0", "--workers", "1")
    for split in ("trian", "stemA"):
        assert cli.main(["data", "clevr", str(tmp_path), "--split", split, *given]) == 0
        noted = f"the split '{split}' is none of {', '.join(make_data.SPLITS)}" in capsys.readouterr().err
        assert noted == (split == "trian")
