"""The house rules: each turns a pitfall of machine-learning repositories into a failure.

Every rule reads syntax trees and returns offences. It runs over the project, and over a planted offence.
"""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "torchfilm"
CORE = {"torch", "numpy", "safetensors", "jaxtyping"}

# Fields of records that others write out whole, by vars(record).
UNREAD_ALLOWED = {
    "Score.correct": "Evaluation writes its scores whole",
}


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders if folder.exists() for path in folder.rglob("*.py"))


SOURCES = python_files(PACKAGE)
TESTS = python_files(ROOT / "tests")
EVERYTHING = [*SOURCES, *TESTS, *python_files(ROOT / "benchmarks", ROOT / "examples")]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


# 1. A comparison as a bare statement asserts nothing.

COMPARISONS = {
    "allclose",
    "array_equal",
    "array_equiv",
    "isclose",
    "equal",
    "is_close",
    "all_close",
    "approx",
}


def dropped_comparisons(module: ast.Module) -> list[ast.AST]:
    def compares(value: ast.expr) -> bool:
        if isinstance(value, ast.Compare):
            return True
        if not isinstance(value, ast.Call):
            return False
        function = value.func
        if isinstance(function, ast.Name):
            return function.id in COMPARISONS
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        exempt = owner == "self" or owner.endswith("testing")
        return isinstance(function, ast.Attribute) and function.attr in COMPARISONS and not exempt

    return [node for node in ast.walk(module) if isinstance(node, ast.Expr) and compares(node.value)]


def test_no_comparison_is_dropped_in_the_tests():
    assert [place(path, node) for path in TESTS for node in dropped_comparisons(tree(path))] == []


def test_a_dropped_comparison_is_found():
    lines = [
        "torch.allclose(a, b)",
        "np.array_equal(a, b)",
        "a == b",
        "assert torch.equal(a, b)",
        "self.equal(a, b)",
    ]
    assert [node.lineno for node in dropped_comparisons(ast.parse("\n".join(lines)))] == [1, 2, 3]


# 2. A promise in __all__ is kept.


def untrue_promises(module: ast.Module) -> set[str]:
    promised, defined = set(), set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            promised |= set(ast.literal_eval(node.value))
    return promised - defined


def test_every_name_in_dunder_all_exists():
    assert {str(path): names for path in SOURCES if (names := untrue_promises(tree(path)))} == {}


def test_an_untrue_promise_is_found():
    assert untrue_promises(ast.parse("from a import b\ndef c(): ...\n__all__ = ['b', 'c', 'd']")) == {"d"}


# 3. A dataclass field that nobody reads is a dead knob.


def fields(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield class and name of each field; a record that writes itself out by asdict(self) reads its own."""
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            for line in node.body if "asdict(self)" not in ast.unparse(node) else ():
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield node.name, line.target.id


def reads(module: ast.Module) -> set[str]:
    attributes = {
        n.attr for n in ast.walk(module) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    }
    return attributes | {
        n.value for n in ast.walk(module) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def unread_fields(modules: list[ast.Module]) -> set[str]:
    read = set().union(*map(reads, modules))
    return {f"{owner}.{name}" for module in modules for owner, name in fields(module) if name not in read}


def test_every_dataclass_field_is_read():
    unread = unread_fields([tree(path) for path in EVERYTHING if path not in TESTS])
    assert unread - set(UNREAD_ALLOWED) == set()
    assert set(UNREAD_ALLOWED) <= unread, "the allow-list names fields that are read by now: shorten it"


def test_an_unread_field_is_found():
    planted = "@dataclass(frozen=True)\nclass Config:\n    used: int\n    dead: int = 3\nprint(config.used)"
    assert unread_fields([ast.parse(planted)]) == {"Config.dead"}
    record = "@dataclass\nclass Record:\n    whole: int\n    def write(self): return asdict(self)"
    assert unread_fields([ast.parse(record)]) == set()


# 4. Imports point one way.

LIBRARY = (
    (
        "extras",
        "freezing",
        "modulation",
        "naming",
        "native",
        "reading",
        "sharding",
        "signatures",
        "snapshot",
        "restoring",
        "version",
        "writing",
    ),
    ("affine", "costs", "intervals"),
    ("onepass",),
    ("functional", "heads"),
    ("absorption", "layers"),
    ("norms",),
    ("adaptive", "conditions", "masks"),
    ("several",),
    ("generator_options", "lookup"),
    ("generator",),
    ("tables",),
    ("mixing",),
    ("fusion",),
    ("channels",),
    ("presets",),
    ("sites",),
    ("applying",),
    ("slots",),
    ("placement",),
    ("filling",),
    ("injection",),
    ("adapter", "checkpointing"),
    ("fold_draft", "fold_quantised", "tracing"),
    ("dataflow",),
    ("fold_rules", "kept"),
    ("fold_check", "fold_report"),
    ("concatenation", "folding", "tabulation"),
    ("modulations",),
    ("counterfactual", "heard_report", "inspection", "pulses", "scoring", "sensitivity", "summary"),
    ("heard_tally", "upstream"),
    ("comparison", "converters", "doctor", "guidance", "heard"),
    ("canvas",),
    ("charts",),
    ("plot",),
)
RANK = {name: rank for rank, names in enumerate(LIBRARY) for name in names}
FACE, SHARED, SYSTEMS, APP = len(LIBRARY), len(LIBRARY) + 1, len(LIBRARY) + 2, len(LIBRARY) + 3
RANK |= {"": FACE, "blocks": SHARED, "data": SHARED, "training": SHARED, "systems": SYSTEMS, "app": APP}
# They import nothing of the library but what packages and files need: useful for any model.
ALONE, FOR_ALL = {"data", "training"}, {"extras", "reading", "writing"}


def module_name(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def own_imports(path: Path, module: ast.Module) -> Iterator[tuple[ast.AST, tuple[str, ...], str]]:
    """Yield each import of ours, also inside functions, as (node, module below torchfilm, name or "")."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torchfilm":
                    yield node, tuple(alias.name.split(".")[1:]), ""
        elif isinstance(node, ast.ImportFrom):
            target = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                target = folder[: len(folder) - node.level + 1] + target
            elif target[0] != "torchfilm":
                continue
            else:
                target = target[1:]
            for alias in node.names:
                below = PACKAGE.joinpath(*target, alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                yield node, (*target, alias.name) if is_module else target, alias.name


def forbidden(source: tuple[str, ...], target: tuple[str, ...], name: str) -> str | None:
    """Return why `source` may not import `name` of `target`, or None where it may."""
    here, there = source[0] if source else "", target[0] if target else ""
    if name.startswith("_"):
        return f"the private name {name}"
    if there not in RANK or here not in RANK:
        return f"a file without a place in the order of imports: {there or here}"
    if here == there == "systems" and len(source) > 1:
        return "another room" if source[1:2] != target[1:2] else None
    if here == there:
        return None
    if here in ALONE and RANK[there] < SHARED and there not in FOR_ALL:
        return f"the library, which {here} does without"
    return None if RANK[there] < RANK[here] else "what is not below it"


def wrong_imports(path: Path, module: ast.Module) -> list[str]:
    source = module_name(path)
    return [
        f"{place(path, node)} imports {reason}"
        for node, target, name in own_imports(path, module)
        if (reason := forbidden(source, target, name))
    ]


def test_imports_point_one_way():
    assert [line for path in SOURCES for line in wrong_imports(path, tree(path))] == []


PLANTED_IMPORTS = [
    ("functional.py", "from .modulation import Modulation", None),
    ("functional.py", "from torchfilm.layers import FiLM", "not below"),
    ("layers.py", "from torchfilm import Modulation", "not below"),
    ("layers.py", "def f():\n    from .generator import Generator", "not below"),
    ("__init__.py", "from .generator import Generator", None),
    ("blocks/residual.py", "from torchfilm import Modulation", None),
    ("blocks/residual.py", "import torchfilm.data.clevr", "not below"),
    ("training/loop.py", "import torch", None),
    ("training/loop.py", "from torchfilm import Modulation", "does without"),
    ("training/loop.py", "from torchfilm.writing import whole", None),
    ("data/clevr/files.py", "from .vocabulary import NULL", None),
    ("data/clevr/files.py", "from torchfilm.training import loop", "not below"),
    (
        "systems/rt1/model.py",
        "from torchfilm.systems.visual_reasoning.model import VisualReasoner",
        "another room",
    ),
    ("systems/rt1/model.py", "from torchfilm.systems.rt1.recipe import RECIPES", None),
    ("systems/rt1/model.py", "from torchfilm.functional import _fit", "private name _fit"),
    ("systems/__init__.py", "from torchfilm.systems import rt1", None),
    ("systems/rt1/model.py", "from torchfilm.app import cli", "not below"),
    ("app/cli.py", "from torchfilm.systems import SYSTEMS", None),
    ("app/cli.py", "from torchfilm.toolbox import hammer", "without a place"),
]


@pytest.mark.parametrize(("path", "line", "reason"), PLANTED_IMPORTS)
def test_a_wrong_import_is_found(path: str, line: str, reason: str | None):
    found = wrong_imports(PACKAGE / path, ast.parse(line))
    assert (len(found) == 0) if reason is None else (len(found) == 1 and reason in found[0])


def test_the_core_needs_its_four_dependencies_alone():
    for path in PACKAGE.glob("*.py"):
        allowed = (
            CORE
            | sys.stdlib_module_names
            | {"annotationlib", "torchfilm"}  # the former is of the standard library from Python 3.14 on
            | {"canvas": {"matplotlib"}, "plot": {"sklearn"}}.get(path.stem, set())
        )
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {(node.module or "").split(".")[0]}
            else:
                continue
            assert names <= allowed, place(path, node)


FRESH = """
import json, logging, os, random, signal, sys, warnings
import jaxtyping, numpy, safetensors, torch

def state():
    return repr([torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.cuda.is_initialized(),
        torch.get_rng_state().sum(), torch.backends.cudnn.benchmark, numpy.geterr(), numpy.get_printoptions(),
        numpy.random.get_state()[1].sum(), random.getstate(), logging.root.level, logging.root.handlers,
        warnings.filters, sorted(os.environ), signal.getsignal(signal.SIGINT), sys.path, sys.excepthook])

before, modules = state(), set(sys.modules)
import torchfilm
new = sorted({name.split(".")[0] for name in set(sys.modules) - modules})
ours = sorted(name for name in sys.modules if name.startswith("torchfilm."))
print(json.dumps({"new": new, "ours": ours, "changed": state() != before}))
"""


def test_importing_the_package_brings_in_the_core_alone_and_changes_nothing_global():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert set(found["new"]) - CORE == {"torchfilm"}
    heavy = {"canvas", "charts", "plot", "blocks", "data", "training", "systems", "app"}
    assert {name.split(".")[1] for name in found["ours"]} <= set(RANK) - heavy
    assert not found["changed"]


# 5. The tree in the README is the file system.


def readme_paths(readme: str) -> list[str]:
    """Return the paths of the README's tree: each line's first word, below the folders above."""
    section = re.split(r"^#+ The tree\s*$", readme, flags=re.MULTILINE)[1]
    block = section.split("```")[1].split("\n", 1)[1]
    paths, above = [], []
    for line in filter(str.strip, block.splitlines()):
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        above = [(depth, folder) for depth, folder in above if depth < indent]
        paths.append("".join(folder for _, folder in above) + name)
        if name.endswith("/"):
            above.append((indent, name))
    return paths


def missing_from(paths: list[str], files: list[str]) -> list[str]:
    """Return the files that the tree neither lists nor covers by a folder without listed contents."""
    folders = [path for path in paths if path.endswith("/")]
    covering = tuple(one for one in folders if not any(p != one and p.startswith(one) for p in paths))
    return [file for file in files if file not in paths and not (covering and file.startswith(covering))]


def test_the_tree_in_the_readme_is_the_file_system():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if not re.search(r"^#+ The tree\s*$", readme, flags=re.MULTILINE):
        pytest.skip("the README has no tree yet")
    paths = readme_paths(readme)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.name != "__init__.py" or path.parent == PACKAGE
    ]
    assert missing_from(paths, files) == []


def test_a_source_distribution_has_what_the_tree_names():
    named = {path.split("/")[0] for path in readme_paths((ROOT / "README.md").read_text(encoding="utf-8"))}
    by_itself = {"README.md", "LICENSE", "pyproject.toml", "MANIFEST.in", "src"}
    given = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").split()
    assert named - by_itself <= set(given)


def test_a_tree_that_is_not_the_file_system_is_found():
    readme = "# The tree\n```\na.md    a page\nsrc/one/\n  two.py   code\n  three/   more\nb/   rest\n```\n"
    paths = readme_paths(readme)
    assert paths == ["a.md", "src/one/", "src/one/two.py", "src/one/three/", "b/"]
    files = ["src/one/two.py", "src/one/four.py", "src/one/three/five.py", "b/c.py", "d.py"]
    assert missing_from(paths, files) == ["src/one/four.py", "d.py"]


# Budgets and names.


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    start = 1 if ast.get_docstring(function) and len(function.body) > 1 else 0
    last = function.body[-1].end_lineno or 0
    return last - function.body[start].lineno + 1


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_file_is_longer_than_500_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in EVERYTHING}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_no_example_is_longer_than_60_lines():
    examples = python_files(ROOT / "examples")
    assert [path.name for path in examples if len(path.read_text().splitlines()) > 60] == []


def test_no_function_body_is_longer_than_60_lines():
    bodies = [(path, node) for path in EVERYTHING for node in functions(tree(path))]
    assert [f"{place(path, node)} {node.name}" for path, node in bodies if body_lines(node) > 60] == []


def test_no_function_has_more_than_eight_arguments():
    heads = [(path, node) for path in SOURCES for node in functions(tree(path))]
    assert [f"{place(path, node)} {node.name}" for path, node in heads if num_arguments(node) > 8] == []


def test_no_module_is_a_dumping_ground():
    names = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert [
        str(path) for path in EVERYTHING if names & set(path.relative_to(ROOT).with_suffix("").parts)
    ] == []


def test_nothing_prints_outside_the_app():
    calls = [(path, node) for path in SOURCES if "app" not in path.parts for node in ast.walk(tree(path))]
    prints = [(p, n) for p, n in calls if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
    assert [place(path, node) for path, node in prints] == []


def test_no_file_carries_the_name_of_a_module_of_the_standard_library():
    names = [path for path in PACKAGE.glob("*.py") if path.stem in sys.stdlib_module_names]
    assert names == []


def test_the_budgets_count_what_they_should():
    planted = 'def f(self, a, *, b):\n    """Text.\n\n    More."""\n    x = 1\n\n    return x\n'
    (function,) = functions(ast.parse(planted))
    assert body_lines(function) == 3
    assert num_arguments(function) == 2
