"""Fill the tables of the READMEs from the results files, so that no number in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; what has not been measured says so.

    python benchmarks/tables.py            rewrite the READMEs
    python benchmarks/tables.py --check    exit 1 if a table is not what the results say
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchfilm.systems.visual_reasoning import RECIPES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "src/torchfilm/systems/visual_reasoning/README.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PENDING = "Not measured yet.\n"

KINDS = ("exist", "count", "query_attribute", "compare_number", "compare_attribute")
PAPER = {"overall": 97.7, "exist": 99.1, "count": 94.3, "query_attribute": 99.1} | {
    "compare_number": 96.8,
    "compare_attribute": 99.1,
}
"""Percent on CLEVR's test split, full scenes and features (Perez et al. 2018, table 1)."""
NAMES = {
    "laptop": "FiLM",
    "laptop_sa": "stacked attention",
    "laptop_rn": "relation network",
    "laptop_cnn_lstm": "CNN+LSTM",
    "laptop_lstm": "question only",
}

Result = Mapping[str, Any]
Results = Mapping[str, Result]


def load(folder: Path = RESULTS) -> Results:
    """Every results file by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first columns, so many, are text, the others are numbers."""
    rule = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


# Accuracy: files visual_reasoning_*.json, one per run; runs of one recipe and budget are one column.


def runs(results: Results) -> dict[str, list[Result]]:
    """Runs by column, FiLM first; a run is a file with a recipe and accuracies by kind."""
    found: dict[str, list[Result]] = defaultdict(list)
    for name, result in results.items():
        if name.startswith("visual_reasoning") and {"recipe", "by_kind", "accuracy"} <= set(result):
            found[_column(result)].append(result)
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
    return name if minutes is None or result.get("label") else f"{name}, {_time(minutes)}"


def _time(minutes: float) -> str:
    return f"{minutes:g} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _percent(shares: Sequence[float | None]) -> str:
    """Mean of the runs in percent, with the standard deviation where there are several."""
    given = [100 * share for share in shares if share is not None]
    if not given:
        return "–"
    spread = f" ± {statistics.stdev(given):.1f}" if len(given) > 1 else ""
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
    names = {"blind beside it": "blind", "most frequent answer of the type": "mode"}
    return {name: key for name, key in names.items() if any(key in r for r in _first(columns))}


def _share(result: Result, group: str, name: str) -> float | None:
    return result.get("accuracy") if name == "overall" else result.get(group, {}).get(name)


def _about(columns: Mapping[str, Sequence[Result]]) -> str:
    lines = []
    for column, members in columns.items():
        asked = ", ".join(f"{r['n']:,}" for r in members[:1])
        scenes = f" about {members[0]['scenes']:,} scenes" if "scenes" in members[0] else ""
        seeds = ", ".join(str(r["seed"]) for r in members)
        interval = members[0].get("interval")
        sure = (
            f", 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} (scenes resampled)"
            if interval and len(members) == 1
            else ""
        )
        lines.append(f"- {column}: {asked} questions{scenes}; seed {seeds}{sure}; {members[0]['date']}.\n")
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
    rows = [[family, f"{100 * share:.1f}"] for family, share in (*ranked[:5], *ranked[-5:])]
    return (
        f"{len(found)} families, all in the results file; the hardest and the easiest five, by index:\n\n"
        + table(["family", next(iter(columns)) + ", %"], rows)
    )


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
    return table(["system", "paper", "what it does", "reached here", "the paper"], [line], texts=5)


# Speed.


def reasoning_speed(results: Results) -> str:
    found = results.get("reasoning_speed")
    if found is None:
        return PENDING
    rows = []
    for batch, answer in found["answering"].items():
        ms, rate = answer["ms_per_answer"], answer["answers_per_second"]
        for kind in ("padded", "packed"):
            rows.append(
                [
                    f"answer, batch {batch}, {kind}",
                    f"{ms[f'generator_{kind}']:.1f}",
                    f"{ms['network']:.1f}",
                    f"{rate[kind]:.2f}",
                ]
            )
    training = found["training"]
    for kind, rate in training["questions_per_second"].items():
        rows.append([f"train, batch {training['batch']}, {kind}", "–", "–", f"{rate:.2f}"])
    head = [
        "the paper's configuration",
        "generator, ms a question",
        "network, ms a question",
        "questions a second",
    ]
    note = (
        f"Mean length of the questions {found['mean_length']:.1f} tokens, padded to {found['places']}; "
        f"parameters {found['parameters']['generator']:,} and {found['parameters']['network']:,}. "
    )
    return table(head, rows) + "\n" + note + _machine(found)


def laptop_speed(results: Results) -> str:
    found = results.get("laptop_speed")
    if found is None:
        return PENDING
    rows = []
    for batch, answer in found["answering"].items():
        ms = answer["ms_per_answer"]
        rows.append(
            [
                f"answer, batch {batch}",
                *(f"{ms[part]:.2f}" for part in ("perception", "generator", "whole")),
                f"{answer['answers_per_second']:,.0f}",
            ]
        )
    training, names = found["training"], {"float32_eager": "float32, eager"}
    compiled = ", compiled" if found["training"]["compile"] else ""
    names["as_recipe"] = f"{training['precision']}{compiled}"
    for kind, rate in training["questions_per_second"].items():
        rows.append([f"train, batch {training['batch']}, {names[kind]}", *["–"] * 3, f"{rate:,.0f}"])
    head = ["the laptop configuration", "perception, ms", "generator, ms", "whole, ms", "questions a second"]
    note = f"Parameters: {', '.join(f'{part} {number:,}' for part, number in found['parameters'].items())}. "
    return table(head, rows) + "\n" + note + _machine(found)


def generation_speed(results: Results) -> str:
    found = results.get("generation_speed")
    if found is None:
        return PENDING
    rows = [
        [
            size,
            one["objects"],
            f"{one['scene_ms']:.1f}",
            f"{one['render_ms']:.1f}",
            f"{one['images_per_second']:,.0f}",
        ]
        for size, one in found["by_size"].items()
    ]
    asked = "; ".join(
        f"{rate['median']:,.0f} a second, {rate['slowest']:,.0f} to {rate['fastest']:,.0f} ({recipe} scenes)"
        for recipe, rate in found["questions_per_second"].items()
    )
    head = ["image", "objects", "scene, ms", "rendering, ms", "images a second"]
    return table(head, rows) + f"\nQuestions: {asked}. " + _machine(found)


def seeing_speed(results: Results) -> str:
    found = results.get("seeing_speed")
    if found is None:
        return PENDING
    rows = [
        [batch, *(f"{rates[layout]:,.0f}" for layout in ("channels_first", "channels_last"))]
        for batch, rates in found["images_per_second_by_batch"].items()
    ]
    return table(["batch", "channels first, images a second", "channels last"], rows) + "\n" + _machine(found)


def gru_speed(results: Results) -> str:
    found = results.get("gru_speed")
    if found is None:
        return PENDING
    rows = [
        [task, *(f"{found[task][key]:.1f}" for key in ("nn_gru_ms", "ours_ms", "ratio"))]
        for task in ("training", "answering")
    ]
    note = f"Batch {found['batch']}, width {found['width']}, words of {found['word_dim']}. "
    return table(["packed GRU", "nn.GRU, ms", "ours, ms", "ratio"], rows) + "\n" + note + _machine(found)


def executor_agreement(results: Results) -> str:
    found = results.get("clevr_executor_agreement")
    if found is None:
        return PENDING
    names = {
        "our_executor_on_the_public_generators_questions": "our executor on the public generator's questions",
        "the_public_engine_on_our_questions": "the public engine on our questions",
    }
    rows = [
        [text, *(f"{found[key][what]:,}" for what in ("scenes", "questions", "families", "disagreements"))]
        for key, text in names.items()
    ]
    return table(["who answers what", "scenes", "questions", "families", "disagreements"], rows)


def choices(results: Results) -> str:
    """Fields of network and training in which the laptop's recipe is not the paper's; from code."""
    paper, laptop = RECIPES["paper"], RECIPES["laptop"]
    rows = []
    for one, other in ((paper.config, laptop.config), (paper.training, laptop.training)):
        theirs, ours = dataclasses.asdict(one), dataclasses.asdict(other)
        rows += [[f"`{n}`", f"{v}", f"{ours[n]}"] for n, v in theirs.items() if ours[n] != v]
    return table(["field", "paper", "laptop"], rows, texts=3)


def _machine(found: Result) -> str:
    return f"CPU time on {found['machine']}; torch {found['torch']}; {found['date']}: `{found['command']}`.\n"


TABLES: dict[str, Callable[[Results], str]] = {
    one.__name__: one
    for one in (
        systems,
        kinds,
        types,
        families,
        count_errors,
        reasoning_speed,
        laptop_speed,
        generation_speed,
        seeing_speed,
        gru_speed,
        executor_agreement,
        choices,
    )
}


def fill(text: str, results: Results) -> str:
    """The text with every table made anew. Raises ValueError for a table that nobody makes."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"expected a table of {', '.join(TABLES)}, got {match[2]!r}")
        return f"{match[1]}{TABLES[match[2]](results)}{match[3]}"

    return BLOCK.sub(made, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    results, stale = load(), []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text, results)
        if filled != text:
            stale.append(str(page.relative_to(ROOT)))
            if not given.check:
                page.write_text(filled, encoding="utf-8")
    if stale:
        print(("not what the results say: " if given.check else "rewritten: ") + ", ".join(stale))
    return 1 if stale and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
