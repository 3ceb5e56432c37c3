"""The tables of the diffusion policy: what it does when it is told to, and whether it listens."""

from collections.abc import Mapping
from typing import Any

from table_form import PENDING, Results, table

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
