"""What the pages promise: their code runs, their links lead somewhere, their tables are those of the code."""

import re
from pathlib import Path

import pytest

from torchfilm.converters import LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def dead_links(page: Path, text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    return [link for link in targets if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path):
    names: dict[str, object] = {}
    for code in blocks(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page: Path):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_the_table_of_layouts_is_that_of_the_code():
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    rows = [
        f"| `{name}` | {layout.order} | {' '.join(layout.trunk) or '-'} | {layout.where} |"
        for name, layout in LAYOUTS.items()
    ]
    table = text.split("<!-- table: layouts -->")[1].split("<!-- /table -->")[0]
    assert table.strip().splitlines()[2:] == rows


def test_code_and_dead_links_are_found():
    page = ROOT / "docs" / "planted.md"
    text = "[a](glossary.md) [b](nowhere.md) [c](https://x.org)\n```python\nx = 1\n```\n```\nno\n```\n"
    assert blocks(text) == ["x = 1\n"]
    assert dead_links(page, text) == ["nowhere.md"]
