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


def api(results: Results) -> str:
    """A table for each group, then one for each module beside `tf.`; `results` is not read."""
    sections = [_section(title, "tf", torchfilm, names.split()) for title, names in GROUPS.items()]
    for name in MODULES:
        module = importlib.import_module(f"torchfilm.{name}")
        sections.append(_section(f"torchfilm.{name}", name, module, _own(module)))
    return "\n".join(sections)


def _own(module: ModuleType) -> list[str]:
    """The public functions and classes that a module defines, or imports under a name that it repeats."""
    body = ast.parse(inspect.getsource(module)).body
    imported = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names = [alias.name for alias in imported if alias.asname == alias.name]
    names += [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in names if not name.startswith("_")]


def _section(title: str, prefix: str, module: ModuleType, names: list[str]) -> str:
    rows = []
    for name in names:
        value = getattr(module, name)
        path = f"src/{value.__module__.replace('.', '/')}.py"
        told = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        rows.append([f"[`{prefix}.{name}`](../{path})", told])
    return f"## {title}\n\n{table(['name', 'what it is'], rows, texts=2)}"
