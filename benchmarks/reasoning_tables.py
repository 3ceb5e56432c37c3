"""The tables about visual reasoning: accuracies, the paper's experiments, the laptop recipe's choices."""

import dataclasses
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from policy_tables import policy_reached
from table_form import PENDING, Result, Results, made_by, of, table
from torchfilm.data.clevr.catalogue import family_file
from torchfilm.data.clevr.templates import FAMILIES
from torchfilm.systems.visual_reasoning import RECIPES
from torchfilm.systems.visual_reasoning.robustness import PAPER as PAPER_CHANGED

KINDS = ("exist", "count", "query_attribute", "compare_number", "compare_attribute")
PAPER = {"overall": 97.7, "exist": 99.1, "count": 94.3, "query_attribute": 99.1} | {
    "compare_number": 96.8,
    "compare_attribute": 99.1,
}
"""Percent on CLEVR's test split, full scenes and features (Perez et al. 2018, table 1)."""
NAMES = {
    "laptop_large": "FiLM, wider classifier",
    "laptop": "FiLM",
    "laptop_sa": "stacked attention",
    "laptop_rn": "relation network",
    "laptop_cnn_lstm": "CNN+LSTM",
    "laptop_lstm": "question only",
}


# Accuracy: files visual_reasoning_*.json of one run, or of several in "runs"; one column for each heading.


def runs(results: Results) -> dict[str, list[Result]]:
    """Runs by column, FiLM first; a run is a file with a recipe and accuracies by kind."""
    found: dict[str, list[Result]] = defaultdict(list)
    for name, result in results.items():
        if not name.startswith("visual_reasoning"):
            continue
        members = [{**result, **run} for run in result.get("runs", [result])]
        minutes = [member.get("minutes") for member in members]
        for member in members:
            if {"recipe", "by_kind", "accuracy"} <= set(member):
                found[_column({**member, "minutes": _middle(minutes)})].append(member)
    order = list(NAMES)
    recipes = {column: members[0]["recipe"] for column, members in found.items()}
    minutes = {column: members[0].get("minutes") or 0 for column, members in found.items()}

    def rank(column: str) -> tuple[int, float]:
        recipe = recipes[column]
        return order.index(recipe) if recipe in order else len(order), -minutes[column]

    return {column: found[column] for column in sorted(found, key=rank)}


def _column(result: Result) -> str:
    name = str(result.get("label") or NAMES.get(result["recipe"], result["recipe"]))
    minutes = result.get("minutes")
    if minutes is None or result.get("label"):
        return name
    cores = {None: "", 1: " of one core", 2: " of two cores"}.get(
        result.get("cores"), f" of {result.get('cores')} cores"
    )
    return f"{name}, {_time(minutes)}{cores}"


def _middle(minutes: Sequence[float | None]) -> float | None:
    known = [one for one in minutes if one is not None]
    return statistics.median(known) if known else None


def _time(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _percent(shares: Sequence[float | None]) -> str:
    """Mean of the runs in percent, with the least and the most where there are several."""
    given = [100 * share for share in shares if share is not None]
    if not given:
        return "–"
    spread = f" ({min(given):.1f} to {max(given):.1f})" if len(given) > 1 else ""
    return f"{statistics.fmean(given):.1f}{spread}"


def _accuracies(results: Results, group: str, names: Sequence[str], last: Mapping[str, float]) -> str:
    columns = runs(results)
    if not columns:
        return PENDING
    head = ["%", *columns, *_beside(columns), *(["the paper"] if last else [])]
    rows = []
    for name in ("overall", *names):
        row = [name.replace("_", " ")]
        row += [_percent([_share(r, group, name) for r in members]) for members in columns.values()]
        for other in _beside(columns).values():
            row.append(_percent([_share(r[other], group, name) for r in _first(columns) if other in r][:1]))
        rows.append([*row, *([f"{last[name]:.1f}"] if last else [])])
    return table(head, rows) + "\n" + _about(columns)


def _first(columns: Mapping[str, Sequence[Result]]) -> Sequence[Result]:
    return next(iter(columns.values()))


def _beside(columns: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    """Baselines that the first column's files carry with them: heading and key."""
    names = {"question only, shipped with the first": "blind", "most frequent answer of the type": "mode"}
    return {name: key for name, key in names.items() if any(key in r for r in _first(columns))}


def _share(result: Result, group: str, name: str) -> float | None:
    return result.get("accuracy") if name == "overall" else result.get(group, {}).get(name)


def _about(columns: Mapping[str, Sequence[Result]]) -> str:
    lines = []
    for column, members in columns.items():
        asked = ", ".join(f"{r['n']:,}" for r in members[:1])
        scenes = f" about {members[0]['scenes']:,} scenes" if "scenes" in members[0] else ""
        seeds = f"seed{'s' if len(members) > 1 else ''} {', '.join(str(r['seed']) for r in members)}"
        range_of = ", in brackets the least and the most" if len(members) > 1 else ""
        interval = members[0].get("interval")
        sure = (
            f", 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} (scenes resampled)"
            if interval and len(members) == 1
            else ""
        )
        steps = ", ".join(f"{r['steps']:,}" for r in members if "steps" in r)
        trained = f" ({steps} steps)" if steps else ""
        lines.append(
            f"- {column}: {asked} questions{scenes}; {seeds}{trained}{range_of}{sure}; "
            f"{members[0]['date']}.\n"
        )
    return "".join(lines)


def kinds(results: Results) -> str:
    return _accuracies(results, "by_kind", KINDS, PAPER)


def types(results: Results) -> str:
    columns = runs(results)
    named = _first(columns)[0].get("by_type", {}) if columns else {}
    return _accuracies(results, "by_type", list(named), {}) if named else PENDING


def families(results: Results) -> str:
    """The hardest and the easiest families of the first column."""
    columns = runs(results)
    found = _first(columns)[0].get("by_family", {}) if columns else {}
    if not found:
        return PENDING
    ranked = sorted(found.items(), key=lambda item: item[1])
    rows = [
        [family, " ".join(map(str, family_file(int(family)))), _wording(int(family)), f"{100 * share:.1f}"]
        for family, share in (*ranked[:5], *ranked[-5:])
    ]
    head = ["family", "template file, place", "asks, with A, B, C, D for things", next(iter(columns)) + ", %"]
    return (
        f"{len(found)} families, all in the results file; the hardest and the easiest five, by index:\n\n"
        + table(head, rows, texts=3)
        + _colours(found)
    )


def _wording(index: int) -> str:
    """A family's first wording, things by letters, relations by one of them."""
    text = re.sub(r"\[[^]]*\] |\{other\}", "", FAMILIES[index].texts[0])
    text = re.sub(r"\{([nN])(\d)\}", lambda m: "ABCD"[int(m[2])] + ("s" if m[1] == "N" else ""), text)
    for mark, word in (("another", "another"), ("t", "thing"), ("T", "things")):
        text = text.replace(f"{{{mark}}}", word)
    return re.sub(r"\{r\d\}", "left of", text)


def _colours(found: Mapping[str, float]) -> str:
    """What the families that ask for a colour have, those that name a thing by what it shares apart."""
    asking = {f.index: f.same for f in FAMILIES if f.terminal == "query_color" and str(f.index) in found}
    same, others = ([i for i, by in asking.items() if (by is not None) == wanted] for wanted in (True, False))
    if not same or not others:
        return ""
    low, high = (_range(found, same), _range(found, others))
    return (
        f"\nOf those that ask for a color, the {len(same)} that name the thing by what it shares "
        f"with another ({', '.join(map(str, same))}: the same size, material or shape) are right in {low} %, "
        f"the other {len(others)} in {high} %.\n"
    )


def _range(found: Mapping[str, float], families: Sequence[int]) -> str:
    """From the least to the most of some families, in percent."""
    shares = [100 * found[str(index)] for index in families]
    return f"{min(shares):.1f} to {max(shares):.1f}"


def count_errors(results: Results) -> str:
    columns = {
        c: m[0]["count_errors"] for c, m in runs(results).items() if m[0].get("count_errors", {}).get("wrong")
    }
    if not columns:
        return PENDING
    steps = range(-3, 4)
    head = [
        "counts",
        "asked",
        "wrong",
        "off by one",
        *(f"{d:+d}" if d else "right" for d in steps),
        "no number",
    ]
    rows = [
        [
            column,
            f"{e['n']:,}",
            f"{e['wrong']:,}",
            f"{100 * e['off_by_one']:.1f} %",
            *(f"{e['differences'].get(str(d), 0):,}" for d in steps),
            str(e["no_number"]),
        ]
        for column, e in columns.items()
    ]
    return table(head, rows)


# The paper's experiments: files visual_reasoning_EXPERIMENT.json, written by experiment.py.


@of("visual_reasoning_means")
def means(found: Result) -> str:
    names = {
        "accuracy": "unchanged",
        "gamma_mean": "γ by its mean",
        "beta_mean": "β by its mean",
        "both_mean": "both by their means",
        "gamma_one": "γ = 1",
        "beta_zero": "β = 0",
    }
    rows = [
        [names[k], f"{100 * found[k]:.1f}", f"{PAPER_CHANGED[k]:.1f}" if k in PAPER_CHANGED else "–"]
        for k in names
    ]
    return table(["at test time", "%", "the paper"], rows) + "\n" + _asked(found)


@of("visual_reasoning_noise")
def noise(found: Result) -> str:
    kinds = ("noise_gamma", "noise_beta", "noise_both")
    rows = [
        [f"{sd:g}", *(f"{100 * found[kind][i]:.1f}" for kind in kinds)] for i, sd in enumerate(found["noise"])
    ]
    return table(["SD of the noise", "on γ, %", "on β, %", "on both, %"], rows) + "\n" + _asked(found)


def ablations(results: Results) -> str:
    found = results.get("visual_reasoning_ablations")
    if found is None:
        return PENDING
    later = results.get("visual_reasoning_ablations_later", {}).get("settings", {})
    rows = [
        [
            name.replace("_", " "),
            _spread(row),
            _spread(later[name]) if name in later else "–",
            f"{row['paper']:.1f}" if row.get("paper") else "–",
        ]
        for name, row in found["settings"].items()
    ]
    note = made_by(found) + (made_by(results["visual_reasoning_ablations_later"]) if later else "")
    return table(["network", "%", "later, %", "the paper"], rows) + "\n" + note


@of("fusion_reasoning")
def fusion_reasoning(found: Result) -> str:
    """FiLM against the alternatives in the laptop's network: what they answer, and what they cost."""
    base = found["rows"][0]
    rows = []
    for row in found["rows"][1:]:
        rows.append(
            [
                row["name"].replace("_", " "),
                _percent(row["score"]["by_seed"]),
                f"{100 * row['added'] / (row['parameters'] - row['added']):+.0f} %",
                f"{100 * (row['flops'] / base['flops'] - 1):+.1f} %",
                f"{row['ratio']:.2f}",
                f"{row['kept'] / 1e6:.1f}",
            ]
        )
    seeds = len(found["rows"][1]["score"]["by_seed"])
    head = ["the question arrives by", "right, %", "parameters", "FLOPs", "time", "MB kept for backward"]
    note = (
        f"{found['questions']:,} held-out questions after {found['steps']:,} steps, "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds (mean, least and most)'}; relative to "
        "the network without the question: parameters with the question's encoder, and a forward pass of 64 "
        f"questions in eval mode; {made_by(found)}"
    )
    return table(head, rows) + "\n" + note


@of("visual_reasoning_data_size")
def data_size(found: Result) -> str:
    settings = found["settings"]
    rows = [[f"{int(name.removeprefix('scenes_')):,}", _spread(row)] for name, row in settings.items()]
    blind = found.get("blind")
    beside = "" if blind is None else f"Without the picture: {100 * blind:.1f} %. "
    seeds = _seeds(list(settings.values()))
    seen = f"{beside}Means{seeds}; " if seeds else beside
    return table(["scenes trained on", "%"], rows, texts=0) + "\n" + seen + made_by(found)


@of("visual_reasoning_arithmetic")
def arithmetic(found: Result) -> str:
    """Zero-shot answers by sums of gamma and beta."""
    paper = found["paper"]
    rows = [
        ["questions to which it applies", *(f"{100 * found[k]:.1f}" for k in ("before", "after"))],
        ["all questions", *(f"{100 * found[k]:.1f}" for k in ("all_before", "all_after"))],
        ["the paper, where it applies", *(f"{100 * paper[k]:.1f}" for k in ("before", "after"))],
    ]
    share = f"It applies to {found['applies']:,} of "
    return table(["%", "as they are", "by arithmetic"], rows) + "\n" + share + _asked(found)


@of("visual_reasoning_cogent")
def cogent(found: Result) -> str:
    columns = zip(found["questions"], found["A"], found["B"], strict=True)
    rows = [[f"{asked:,}", _spread(a), _spread(b)] for asked, a, b in columns]
    before, after = found["paper"]["before"], found["paper"]["after"]
    theirs = (
        f"The paper: {100 * before['A']:.1f} and {100 * before['B']:.1f} before, "
        f"{100 * after['A']:.1f} and {100 * after['B']:.1f} after fine-tuning on 30,000 questions. Here: "
        f"{found['training']} on A, {found['fine_tuning']} for each fine-tuning"
        f"{_seeds(found['A'])}.\n"
    )
    return table(["questions of B", "on A, %", "on B, %"], rows, texts=0) + "\n" + theirs + made_by(found)


def _spread(row: Mapping[str, Any]) -> str:
    sd = row.get("sd")
    return f"{100 * row['accuracy']:.1f}" + (f" ± {100 * sd:.1f}" if sd is not None else "")


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    number = len(rows[0]["accuracies"])
    return f" over {number} seeds" if number > 1 else ""


def _asked(found: Result) -> str:
    return f"{found['n']:,} questions of the split {found['split']}; {made_by(found)}"


def systems(results: Results) -> str:
    """One line per system."""
    columns = runs(results)
    reached = (
        f"{_percent([r['accuracy'] for r in _first(columns)])} % ({next(iter(columns))})"
        if columns
        else "not measured yet"
    )
    link = "[visual_reasoning](src/torchfilm/systems/visual_reasoning/README.md)"
    line = [
        link,
        "FiLM, Perez et al. 2018",
        "answers questions about pictures",
        reached,
        f"{PAPER['overall']} % (full CLEVR)",
    ]
    lines = [line]
    policy = results.get("diffusion_policy_laptop")
    if policy is not None:
        link = "[diffusion_policy](src/torchfilm/systems/diffusion_policy/README.md)"
        does = "moves an arm as it is told, where and how"
        reached = policy_reached(policy)
        lines.append([link, "Diffusion Policy, Chi et al. 2023", does, reached, "other tasks"])
    return table(["system", "paper", "what it does", "reached here", "the paper"], lines, texts=5)


def choices(results: Results) -> str:
    """Fields of network and training in which the laptop's recipe is not the paper's; from code."""
    paper, laptop = RECIPES["paper"], RECIPES["laptop"]
    rows = []
    for one, other in ((paper.config, laptop.config), (paper.training, laptop.training)):
        theirs, ours = dataclasses.asdict(one), dataclasses.asdict(other)
        rows += [[f"`{n}`", f"{v}", f"{ours[n]}"] for n, v in theirs.items() if ours[n] != v]
    return table(["field", "paper", "laptop"], rows, texts=3)
