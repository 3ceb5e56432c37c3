"""The READMEs tell the truth: tables are what the results files say, code runs, links lead somewhere."""

import dataclasses
import importlib
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

import torchfilm as tf
from torchfilm.app.cli import parse
from torchfilm.data.clevr.catalogue import KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/torchfilm/systems/*/README.md")]


sys.path.append(str(ROOT / "benchmarks"))  # no package: its files import one another by name

api_tables = importlib.import_module("api_tables")
policy_success = importlib.import_module("policy_success")
policy_tables = importlib.import_module("policy_tables")
reasoning_tables = importlib.import_module("reasoning_tables")
tables = importlib.import_module("tables")


def run(recipe: str, accuracy: float, **more: object) -> dict:
    found = {"recipe": recipe, "accuracy": accuracy, "by_kind": {"count": accuracy / 2}, "seed": 3}
    return found | {"n": 70_000, "scenes": 500, "date": "2026-11-21", "minutes": 15} | more


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_the_tables_are_what_the_results_say(page: Path):
    text = page.read_text(encoding="utf-8")
    assert tables.BLOCK.search(text)
    assert tables.fill(text, tables.load()) == text, "run `python benchmarks/tables.py`"


def test_the_page_of_names_has_every_public_name_once():
    names = [name for group in api_tables.GROUPS.values() for name in group.split()]
    assert sorted(names) == sorted(tf.__all__)


def test_the_page_of_names_has_what_the_public_classes_hold_with_its_module():
    records = [one for name in tf.__all__ if dataclasses.is_dataclass(one := getattr(tf, name))]
    hints = " ".join(str(hint) for one in records for hint in get_type_hints(one).values())
    named = {f"{getattr(tf, name).__module__}.{name}" for name in tf.__all__}
    held = set(re.findall(r"torchfilm\.\w+\.\w+", hints)) - named
    assert {"torchfilm.doctor.Finding", "torchfilm.heard_report.Effect"} <= held
    assert held <= {f"torchfilm.{module}.{kind}" for module, kind in api_tables.HELD.items()}


def test_a_number_changed_by_hand_is_found():
    text = "<!-- table: kinds -->\n| 99.9 |\n<!-- /table -->\n"
    assert tables.fill(text, {}) == "<!-- table: kinds -->\n<!-- /table -->\n"


def test_trainings_of_a_policy_are_pooled_and_shown_apart():
    def played(hits: int, energy: float) -> dict:
        share = {"value": hits / 100, "low": 0.0, "high": 1.0, "n": 100}
        row = {"success": share, "right": share, "collisions": share, "energy": energy}
        return {"reach avoid": row, "push plain": row}

    def trained(hits: int) -> dict:
        success = {"value": -hits / 100, "low": -1.0, "high": -hits / 200, "n": 60}
        effects = {name: {"success": success} for name in ("swap", "blank", "paraphrase")}
        return {
            "by_kind": played(hits, 0.5),
            "held_out": played(hits - 20, 0.75),
            "scenes": 200,
            "execution": 2,
            "language": {"effects": effects, "n": 60},
        }

    runs = [trained(100), trained(70)]
    found = {"runs": runs, "seeds": [3, 5], "minutes": 15, "command": "a", "date": "b"}
    table = policy_tables.policy_success({"diffusion_policy_laptop": found})
    first = "| reach, avoid the obstacle | 85 % | 100, 70 | 65 % | 85 % | 85 % | 100, 70 |"
    assert f"{first} 65 % | 0.50 J | 0.75 J |" in table
    assert "over 60 scenes: another's -100 (-100 to -50), -70 (-100 to -35); none" in table
    assert "2 trainings (seeds 3, 5, 15 minutes of one core each" in table
    said = policy_tables.policy_reached(found)
    assert said.startswith(
        "reach 85 % (70 to 100), push 85 % (70 to 100); told to avoid, a reach collides in 85 %"
    )
    assert said.endswith("(15 min of one core; in brackets the least and the most of 2 seeds)")


def test_what_a_training_took_is_read_from_its_own_files(tmp_path: Path):
    (tmp_path / "understanding").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"train": {"seed": 4, "minutes": 13}, "extra": {}}))
    for folder, seconds in ((tmp_path / "understanding", 120), (tmp_path, 780)):
        lines = [json.dumps({"step": step, "seconds": seconds / (2 - step)}) for step in (0, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert policy_success.training(tmp_path) == (4, 15.0)


def rows_of(*shares: float) -> dict:
    mean = sum(shares) / len(shares)
    return {"accuracy": mean, "sd": 0.01 if len(shares) > 1 else None, "accuracies": list(shares)}


def test_the_experiments_have_the_papers_numbers_and_their_budgets_beside():
    about = {"date": "2026-11-27", "command": "a", "split": "testB", "n": 1000}
    paper = {"before": {"A": 0.983, "B": 0.756}, "after": {"A": 0.808, "B": 0.969}}
    columns = {"questions": [0, 3000], "A": [rows_of(0.9, 0.8), rows_of(0.7, 0.8)]}
    columns["B"] = [rows_of(0.5, 0.6), rows_of(0.9, 0.9)]
    budgets = {"training": "15 minutes", "fine_tuning": "3 minutes"}
    found = reasoning_tables.cogent({"visual_reasoning_cogent": about | columns | budgets | {"paper": paper}})
    assert "| 0 | 85.0 ± 1.0 | 55.0 ± 1.0 |" in found
    assert "98.3 and 75.6 before" in found
    assert "Here: 15 minutes on A, 3 minutes for each fine-tuning over 2 seeds." in found
    sizes = {"settings": {"scenes_250": rows_of(0.5), "scenes_1000": rows_of(0.8)}, "blind": 0.42}
    found = reasoning_tables.data_size({"visual_reasoning_data_size": about | sizes})
    assert "| 1,000 | 80.0 |" in found
    assert "Without the picture: 42.0 %. 2026-11-27" in found
    shares = {"applies": 300, "before": 0.7, "after": 0.8, "all_before": 0.75, "all_after": 0.78}
    shares["paper"] = {"share": 1 / 3, "before": 0.715, "after": 0.807}
    found = reasoning_tables.arithmetic({"visual_reasoning_arithmetic": about | shares})
    assert "| questions to which it applies | 70.0 | 80.0 |" in found
    assert "| the paper, where it applies | 71.5 | 80.7 |" in found
    assert "It applies to 300 of 1,000 questions of the split testB" in found


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match=r"expected a table of .*systems, .*, got 'prices'"):
        tables.fill("<!-- table: prices -->\n<!-- /table -->\n", {})


def test_every_table_says_when_it_is_not_measured():
    for name, make in tables.TABLES.items():
        if name in ("api", "choices"):  # come from the code
            continue
        assert re.search("(?i)not measured yet", make({})), name


def test_the_kinds_are_those_of_an_evaluation():
    assert set(reasoning_tables.KINDS) == set(KINDS) == set(reasoning_tables.PAPER) - {"overall"}


def test_recipes_stand_side_by_side_and_film_comes_first():
    found = reasoning_tables.kinds(
        {
            "visual_reasoning_a": run("laptop_lstm", 0.5),
            "visual_reasoning_b": run("laptop", 0.9, by_kind={"exist": 0.95}),
            "other": {"accuracy": 0.3},
        }
    )
    head, _, overall, exist, count = found.splitlines()[:5]
    assert head == "| % | FiLM, 15 min | question only, 15 min | the paper |"
    assert overall == "| overall | 90.0 | 50.0 | 97.7 |"
    assert exist == "| exist | 95.0 | – | 99.1 |"
    assert count == "| count | – | 25.0 | 94.3 |"
    assert "- FiLM, 15 min: 70,000 questions about 500 scenes; seed 3; 2026-11-21." in found


def test_seeds_of_one_recipe_become_a_mean_with_its_range():
    found = reasoning_tables.kinds(
        {f"visual_reasoning_{i}": run("laptop", a, seed=i) for i, a in enumerate((0.90, 0.92))}
    )
    assert "| overall | 91.0 (90.0 to 92.0) | 97.7 |" in found
    assert "seeds 0, 1, in brackets the least and the most;" in found


def test_several_runs_in_one_file_are_one_column_by_their_own_minutes():
    members = [run("laptop", share, seed=i, minutes=15.0 + i / 100) for i, share in enumerate((0.88, 0.9))]
    found = reasoning_tables.kinds(
        {"visual_reasoning_a": {"recipe": "laptop", "cores": 2, "date": "2026-11-27", "runs": members}}
    )
    assert found.splitlines()[0] == "| % | FiLM, 15 min of two cores | the paper |"
    assert "| overall | 89.0 (88.0 to 90.0) | 97.7 |" in found
    assert "seeds 0, 1, in brackets the least and the most;" in found


def test_families_are_shown_by_what_they_ask():
    shares = {"59": 0.481, "62": 0.483, "88": 0.999, "67": 0.69}
    found = reasoning_tables.families({"visual_reasoning_a": run("laptop", 0.9, by_family=shares)})
    asks = "What is the color of the B that has the same material as the A?"
    assert f"| 59 | same_relate 23 | {asks} | 48.1 |" in found
    assert "| 67 | single_or 3 | How many things are Bs left of the A or Ds left of the C? | 69.0 |" in found
    assert (
        "(59, 62: the same size, material or shape) are right in 48.1 to 48.3 %, the other 1 in 99.9" in found
    )


def test_a_longer_run_of_the_same_recipe_is_a_column_of_its_own():
    found = reasoning_tables.kinds(
        {
            "visual_reasoning_a": run("laptop", 0.9),
            "visual_reasoning_b": run("laptop", 0.95, minutes=180),
        }
    )
    assert found.splitlines()[0] == "| % | FiLM, 3.0 h | FiLM, 15 min | the paper |"


def test_count_errors_are_listed_by_distance():
    errors = {"n": 1100, "wrong": 70, "off_by_one": 0.9, "no_number": 2}
    differences = {"differences": {"-1": 40, "0": 1030, "1": 23, "2": 5}}
    one = run("laptop", 0.9, count_errors=errors | differences)
    found = reasoning_tables.count_errors({"visual_reasoning_a": one})
    assert "| FiLM, 15 min | 1,100 | 70 | 90.0 % | 0 | 0 | 40 | 1,030 | 23 | 5 | 0 | 2 |" in found


def anchors(text: str) -> set[str]:
    """The names by which a page's headings are linked to."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*?)\s*$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    """Links to files that there are not, and to headings that their page does not have."""
    dead = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        there = page.parent / file
        if "://" in link or (there.exists() and not anchor):
            continue
        if anchor and anchor in anchors(text if not file else there.read_text(encoding="utf-8")):
            continue
        dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_link_leads_somewhere(page: Path):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_dead_links_are_found():
    page = ROOT / "docs" / "planted.md"
    text = "# A `b`: c\n[a](glossary.md) [b](nowhere.md) [c](https://x.org/#d) [d](#a-b-c) [e](#b)"
    text += " [f](speed.md#f)"
    assert dead_links(page, text) == ["nowhere.md", "#b", "speed.md#f"]


def code(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


READMES = [
    page for page in PAGES if page.name == "README.md" and code(page)
]  # test_docs.py runs those of docs


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.parent.name)
def test_the_code_in_the_readmes_runs(page: Path):
    if page.parent != ROOT:
        for package in ("diffusers", "gymnasium", "mujoco"):
            pytest.importorskip(package)
    for block in code(page):
        exec(compile(block, str(page), "exec"), {})


def test_the_root_and_a_system_show_code():
    assert {page.parent.name for page in READMES} >= {ROOT.name, "diffusion_policy"}


def commands(text: str) -> list[str]:
    """Lines that are a `torchfilm` command, without what a comment says."""
    return re.findall(r"^ +(torchfilm .*?)(?: +#.*)?$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_command_can_be_understood(page: Path):
    for line in commands(page.read_text(encoding="utf-8")):
        assert parse(shlex.split(line)[1:]) is not None, line


def test_a_command_that_is_misspelt_is_found():
    (line,) = commands("text\n    torchfilm eval --splitt test   # comment\n")
    with pytest.raises(ValueError, match="splitt"):
        parse(shlex.split(line)[1:])


def test_every_dependency_is_named_with_its_reason():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = extras["optional-dependencies"]
    shown = ("systems", "robots", "pusht", "metaworld", "serve")
    lines = [*extras["dependencies"], *(line for extra in shown for line in optional[extra])]
    names = [re.split("[<>=]", line)[0] for line in lines]
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert [name for name in names if not re.search(rf"`{name}` \(", text)] == []


def test_the_glossary_says_each_word_once():
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    words = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:]
    assert len(words) == len(set(words))
