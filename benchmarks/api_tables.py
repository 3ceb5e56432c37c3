"""The page of public names: each with the first paragraph of its docstring, linked to its code."""

import ast
import importlib
import inspect
import re
from types import ModuleType

import torchfilm
from table_form import Results, table

GROUPS = dict(re.findall(r"^(\S.*)\n((?: {4}\w.*\n)+)", torchfilm.__doc__ or "", re.MULTILINE))
"""The names below each heading of the package's docstring."""
MODULES = ("functional", "converters", "native", "plot")
HELD = {
    "comparison": "Row",
    "concatenation": "Shifted",
    "doctor": "Finding",
    "fold_report": "FoldedSite",
    "heard_report": "Effect",
    "intervals": "Estimate",
    "naming": "UnknownNameError",
    "pulses": "Pulse",
    "scoring": "Scored",
    "sites": "Preset",
    "summary": "SiteSummary",
}
"""What functions of `tf.` give or raise that has no name there: module -> class."""


def api(results: Results) -> str:
    """A table for each group, what reports hold, and each module beside `tf.`; `results` is not read."""
    sections = []
    for title, names in GROUPS.items():
        sections.append(_section(title, [_row("tf", torchfilm, name) for name in names.split()]))
    held = [_row(f"torchfilm.{name}", _module(name), kind) for name, kind in HELD.items()]
    sections.append(_section("What reports hold", held))
    for name in MODULES:
        rows = [_row(name, _module(name), one) for one in _own(_module(name))]
        sections.append(_section(f"torchfilm.{name}", rows))
    return "\n".join(sections)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"torchfilm.{name}")


def _own(module: ModuleType) -> list[str]:
    """The public functions and classes that a module defines, or imports under a name that it repeats."""
    body = ast.parse(inspect.getsource(module)).body
    imported = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names = [alias.name for alias in imported if alias.asname == alias.name]
    names += [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in names if not name.startswith("_")]


def _row(prefix: str, module: ModuleType, name: str) -> list[str]:
    value = getattr(module, name)
    path = f"src/{value.__module__.replace('.', '/')}.py"
    told = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return [f"[`{prefix}.{name}`](../{path})", told]


def _section(title: str, rows: list[list[str]]) -> str:
    return f"## {title}\n\n{table(['name', 'what it is'], rows, texts=2)}"
