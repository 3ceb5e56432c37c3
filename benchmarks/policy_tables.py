"""The tables of the diffusion policy: what it does when it is told to, and whether it listens."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from table_form import Result, made_by, measured_on, of, table

DEEDS = ("reach", "push")
MANNERS = {
    "plain": "plainly",
    "avoid": "avoid the obstacle",
    "save": "save energy",
    "both": "both",
}


@of("diffusion_policy_laptop")
def policy_success(found: Result) -> str:
    """Success, collisions and energy by deed and manner, over all trainings, and success in each."""
    runs, rows = found["runs"], []
    for name in runs[0]["by_kind"]:
        deed, manner = name.split()
        told, others = ([run[group][name] for run in runs] for group in ("by_kind", "held_out"))
        rows.append(
            [
                f"{deed}, {MANNERS[manner]}",
                _pooled(told, "success"),
                _by_training(told, "success"),
                _pooled(others, "success"),
                _pooled(told, "right"),
                _pooled(told, "collisions"),
                _by_training(told, "collisions"),
                _pooled(others, "collisions"),
                *(f"{statistics.fmean(row['energy'] for row in rows):.2f} J" for rows in (told, others)),
            ]
        )
    head = ["told to", "success", "by training", "in held-out words", "right thing"]
    head += ["collisions", "by training", "in held-out words", "energy", "in held-out words"]
    first = runs[0]
    seeds = ", ".join(map(str, found["seeds"]))
    note = (
        f"{first['scenes']} scenes, half of them for each deed, the obstacle always in the way, played by "
        f"each of {len(runs)} trainings (seeds {seeds}, {found['minutes']:g} minutes of one core each; "
        f"{first['execution']} actions of a chunk executed); `{found['command']}`, {found['date']}.\n"
    )
    return table(head, rows) + "\n" + note + _language(runs)


def policy_reached(found: Result) -> str:
    """Success by deed over all manners and trainings, and collisions when told to avoid, in one line."""
    runs, said, touched = [run["by_kind"] for run in found["runs"]], [], []
    for what in DEEDS:
        done = [[row for name, row in run.items() if name.startswith(what)] for run in runs]
        by_run = [_share(rows, "success") for rows in done]
        pooled = _pooled([row for rows in done for row in rows], "success")
        said.append(f"{what} {pooled} ({min(by_run):.0f} to {max(by_run):.0f})")
        avoid = (f"{what} avoid", f"{what} both")
        told = [row for run in runs for name, row in run.items() if name in avoid]
        touched.append(f"a {what} collides in {_pooled(told, 'collisions')}")
    return (
        f"{', '.join(said)}; told to avoid, {', '.join(touched)} ({found['minutes']:g} min of one core; in "
        f"brackets the least and the most of {len(runs)} seeds)"
    )


def _pooled(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """A share over the episodes of all trainings."""
    return f"{_share(rows, key):.0f} %"


def _by_training(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """The share of each training, a row each, in percent."""
    return ", ".join(f"{_share([row], key):.0f}" for row in rows)


def _share(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """A share over the episodes of all rows, in percent; NaN of none."""
    n = sum(row[key]["n"] for row in rows)
    return 100 * sum(round(row[key]["value"] * row[key]["n"]) for row in rows) / n if n else math.nan


def _language(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the language score says of each training, with its 95 % interval over the scenes."""
    said = []
    for name, words in (
        ("swap", "another's"),
        ("blank", "none"),
        ("paraphrase", "the same in held-out words"),
    ):
        points = [run["language"]["effects"][name]["success"] for run in runs]
        shown = ("{value:+.0f} ({low:+.0f} to {high:+.0f})".format_map(_in_points(one)) for one in points)
        said.append(f"{words} {', '.join(shown)}")
    scenes = runs[0]["language"]["n"]
    return (
        f"Points of success with another instruction, of each training with its 95 % interval over {scenes} "
        f"scenes: {'; '.join(said)}.\n"
    )


def _in_points(one: Mapping[str, float]) -> dict[str, float]:
    return {key: 100 * one[key] for key in ("value", "low", "high")}


REACHED = {
    "reach": "reach",
    "push": "push",
    "reach_held_out": "reach, held-out words",
    "push_held_out": "push, held-out words",
    "collisions_avoid": "a reach told to avoid touches",
    "push_collisions_avoid": "a push told to avoid touches",
    "energy_saved": "energy told to save, of plain",
}
LOST = {
    "language": "lost by another's instruction",
    "language_blank": "by none",
    "language_paraphrase": "by held-out words",
}
COSTS = (
    "parameters",
    "at the paper's size",
    "control step, ms",
    "control step",
    "training step",
)


@of("diffusion_policy_alternatives")
def policy_alternatives(found: Result) -> str:
    """FiLM against the alternatives: means over the seeds and their range, and costs."""
    rows: dict[str, Mapping[str, Any]] = {name.replace("_", " "): row for name, row in found["rows"].items()}
    tables = [
        table(
            ["%", *columns.values()],
            [[name, *(_ranged(row[key]) for key in columns)] for name, row in rows.items()],
        )
        for columns in (REACHED, LOST)
    ]
    costs = [[name, *_costs(row)] for name, row in rows.items()]
    budget = f"{found['minutes']:g} minutes" if found["minutes"] else f"{found['steps']:,} steps"
    note = (
        f"{budget} of one core each, {of_seeds(rows)}, {found['scenes']} scenes in four manners; "
        + made_by(found)
    )
    return "\n".join([*tables, table(["relative to no instruction", *COSTS], costs), note])


def of_seeds(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How many seeds the numbers of all rows are of."""
    most = max(row["seeds"] for row in rows.values())
    return "one seed" if most == 1 else f"{most} seeds (their mean, least and most)"


def _costs(row: Mapping[str, Any]) -> list[str]:
    paper = row["parameters_added_paper"]
    return [
        f"{100 * row['parameters_added']:+.1f} %",
        "–" if paper is None else f"{100 * paper:+.2f} %",
        f"{row['milliseconds_added']:+.1f}",
        f"{row['time']:.2f}",
        f"{row['training_time']:.2f}",
    ]


def _ranged(one: Mapping[str, float]) -> str:
    mean, low, high = (f"{round(100 * one[key])}" for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


@of("policy_depth")
def policy_depth(found: Result) -> str:
    """Which part of the instruction explains how much of each site's gamma and beta."""
    columns = [(name, part) for name in ("gamma", "beta") for part in ("which", "what", "how")]
    rows = [
        [f"`{site}`", *(f"{100 * shares[name][part]:.0f}" for name, part in columns)]
        for site, shares in found["sites"].items()
    ]
    symbols = {"gamma": "γ", "beta": "β"}
    note = f"{found['instructions']:,} instructions; `{found['command']}`, {found['date']}.\n"
    return table(["%", *(f"{symbols[name]}: {part}" for name, part in columns)], rows) + "\n" + note


WAYS = {
    "original": "Mish and Linear in every block, at every step: the original's form",
    "tables": "the steps' part from a table, the observation's once a chunk",
    "blocks": "γ and β in hand: what is left when generators cost nothing",
    "reasoning": "as the tables, and a reasoning vector in every block",
    "reasoning, condition": "as the tables, and a reasoning vector on the condition alone",
    "folded": "one reasoning vector that stays, folded into the weights",
    "packed": "as the tables, with the convolutions' weights packed",
    "packed, reasoning": "packed, and a reasoning vector in every block",
}


@of("policy_tokens")
def policy_tokens(found: Result) -> str:
    """How many words that matter each fusion carries, at one time each or everywhere."""
    fusions = list(dict.fromkeys(row["fusion"] for row in found["rows"]))
    by = {(row["place"], row["words"], row["fusion"]): row["obeyed"] for row in found["rows"]}
    where = {"time": "one part of the time", "action": "one number, at all times"}
    rows = []
    for place, words in dict.fromkeys((row["place"], row["words"]) for row in found["rows"]):
        shares = [[100 * share for share in by[place, words, fusion]] for fusion in fusions]
        said = [
            f"{statistics.fmean(one):.0f}"
            + (f" ({min(one):.0f} to {max(one):.0f})" if max(one) - min(one) > 1 else "")
            for one in shares
        ]
        rows.append([where[place], str(words), *said])
    note = (
        f"{found['steps']:,} steps of {found['batch_size']}, {found['seeds']} seeds (mean, least and most); "
        + made_by(found)
    )
    head = ["each word sets", "words", *(f"{fusion.replace('_', ' ')}, %" for fusion in fusions)]
    return table(head, rows) + "\n" + note


@of("policy_speed")
def policy_speed(found: Result) -> str:
    """One control step at the paper's size, against the original's form in the same process."""
    ways = found["candidates"]
    rows = [[text, f"{ways[name]['ms']:.0f}", f"{ways[name]['ratio']:.3f}"] for name, text in WAYS.items()]
    share = f"The generators, alone, take {100 * found['generators_share']:.2f} % of a step with tables.\n"
    return table(["", "ms", "ratio"], rows) + "\n" + share + measured_on(found)
