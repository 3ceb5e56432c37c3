"""Fill the tables of the READMEs from the results files, so that no number in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; what has not been measured is left empty.

    python benchmarks/tables.py            rewrite the READMEs
    python benchmarks/tables.py --check    exit 1 if a table is not what the results say
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import api_tables
import library_tables
import placement_tables
import policy_tables
import reasoning_tables
import speed_tables
from table_form import PENDING, Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SYSTEMS = ROOT / "src" / "torchfilm" / "systems"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "alternatives.md",
    ROOT / "docs" / "api.md",
    ROOT / "docs" / "placement.md",
    ROOT / "docs" / "speed.md",
    *(SYSTEMS / name / "README.md" for name in ("visual_reasoning", "diffusion_policy")),
)
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def load(folder: Path = RESULTS) -> Results:
    """Every results file by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


TABLES: dict[str, Callable[[Results], str]] = {
    one.__name__: one
    for one in (
        api_tables.api,
        library_tables.library_limits,
        library_tables.library_speed,
        library_tables.library_speed_elsewhere,
        placement_tables.placement_reasoning,
        placement_tables.placement_policy,
        placement_tables.starts,
        reasoning_tables.systems,
        reasoning_tables.kinds,
        reasoning_tables.types,
        reasoning_tables.families,
        reasoning_tables.count_errors,
        speed_tables.reasoning_speed,
        speed_tables.laptop_speed,
        speed_tables.generation_speed,
        speed_tables.seeing_speed,
        speed_tables.gru_speed,
        speed_tables.executor_agreement,
        reasoning_tables.choices,
        reasoning_tables.means,
        reasoning_tables.noise,
        reasoning_tables.ablations,
        reasoning_tables.fusion_reasoning,
        reasoning_tables.data_size,
        reasoning_tables.cogent,
        reasoning_tables.arithmetic,
        policy_tables.policy_success,
        policy_tables.policy_depth,
        policy_tables.policy_alternatives,
        policy_tables.policy_tokens,
        policy_tables.policy_speed,
    )
}


def fill(text: str, results: Results) -> str:
    """The text with every table made anew. Raises ValueError for a table that nobody makes."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"expected a table of {', '.join(TABLES)}, got {match[2]!r}")
        table = TABLES[match[2]](results)
        return f"{match[1]}{'' if table == PENDING else table}{match[3]}"

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
