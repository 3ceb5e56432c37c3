"""The tables of the diffusion policy: what it does when it is told to, and whether it listens."""

from collections.abc import Mapping
from typing import Any

from table_form import PENDING, Results, measured_on, table

MANNERS = {
    "plain": "plainly",
    "avoid": "avoid the obstacle",
    "save": "save energy",
    "both": "both",
}


def policy_success(results: Results) -> str:
    """Success, collisions and energy by deed and manner, of one training or several taken together."""
    found = results.get("diffusion_policy_laptop")
    if found is None:
        return PENDING
    rows = []
    for name, row in found["by_kind"].items():
        deed, manner = name.split()
        rows.append(
            [
                f"{deed}, {MANNERS[manner]}",
                _share(row["success"], with_interval=True),
                _share(row["right"]),
                _share(row["collisions"]),
                f"{row['energy']:.2f} J",
                _share(found["held_out"][name]["success"]),
            ]
        )
    head = ["told to", "success", "right thing", "collisions", "energy", "success, held-out wording"]
    note = (
        f"{found['scenes']} scenes, half of them for each deed, the obstacle always in the way; training "
        f"seed {found['training_seed']}, {found['minutes']:g} minutes of one core; `{found['command']}`, "
        f"{found['date']}.\n"
    )
    return table(head, rows) + "\n" + note + _language(found)


def _language(found: Mapping[str, Any]) -> str:
    """What the language score says, in one sentence for each change of the instruction."""
    if "language" not in found:
        return ""
    effects = found["language"]["effects"]
    said = []
    for name, words in (
        ("swap", "another's"),
        ("blank", "none"),
        ("paraphrase", "the same in held-out words"),
    ):
        success = effects[name]["success"]
        low, high = (100 * success[end] for end in ("low", "high"))
        said.append(f"{words} {100 * success['value']:+.0f} ({low:+.0f} to {high:+.0f})")
    return f"Points of success with another instruction: {', '.join(said)}.\n"


def _share(one: Mapping[str, float], *, with_interval: bool = False) -> str:
    interval = f" ({100 * one['low']:.0f} to {100 * one['high']:.0f})" if with_interval else ""
    return f"{100 * one['value']:.0f} %{interval}"


def policy_alternatives(results: Results) -> str:
    """FiLM against the alternatives: means over the seeds and their range, costs, and what others claimed."""
    found = results.get("diffusion_policy_alternatives")
    if found is None:
        return PENDING
    rows = []
    for name, row in found["rows"].items():
        claimed = found["claimed"].get(name)
        rows.append(
            [
                name.replace("_", " "),
                *(_ranged(row[key]) for key in ("reach", "push", "reach_held_out", "collisions_avoid")),
                *(_ranged(row[key]) for key in ("energy_saved", "language")),
                f"{100 * row['parameters_added']:+.1f} %",
                f"{row['milliseconds_added']:+.2f}",
                f"{row['time']:.2f}",
                "–" if claimed is None else f"{claimed[0]:g} %, {claimed[1]:g} ms, {claimed[2]:+g} %",
            ]
        )
    head = ["", "reach %", "push %", "reach, held-out wording %", "collisions when told to avoid %"]
    head += ["energy when told to save, % of plain", "lost by another's instruction, points"]
    head += ["parameters", "ms", "time", "claimed elsewhere"]
    budget = f"{found['minutes']:g} minutes" if found["minutes"] else f"{found['steps']:,} steps"
    note = (
        f"{budget} of one core each, {max(row['seeds'] for row in found['rows'].values())} seeds, "
        f"{found['scenes']} scenes; {found['date']}: `{found['command']}`.\n"
    )
    return table(head, rows) + "\n" + note


def _ranged(one: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * one[key]:.0f}" for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


WAYS = {
    "original": "Mish and Linear in every block, at every step: the original's form",
    "tables": "the steps' part from a table, the observation's once a chunk",
    "blocks": "γ and β in hand: what is left when generators cost nothing",
    "reasoning": "as the tables, and a reasoning vector in every block",
    "reasoning, condition": "as the tables, and a reasoning vector on the condition alone",
}


def policy_speed(results: Results) -> str:
    """One control step at the paper's size, against the original's form in the same process."""
    found = results.get("policy_speed")
    if found is None:
        return PENDING
    ways = found["candidates"]
    rows = [[text, f"{ways[name]['ms']:.0f}", f"{ways[name]['ratio']:.3f}"] for name, text in WAYS.items()]
    share = f"The generators are {100 * found['generators_share']:.1f} % of a step.\n"
    return table(["", "ms", "ratio"], rows) + "\n" + share + measured_on(found)
