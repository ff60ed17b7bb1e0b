"""Imports run one way: leantune_kernels <- nn <- {models, methods} <- model <- loop <- cli (DESIGN, "Tree")."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE, KERNELS = ROOT / "engine" / "leantune", ROOT / "kernels" / "leantune_kernels"

# A module may import from modules of a lower level, and from its own package. models and methods share a level: they
# do not know each other.
LEVELS = {
    "errors": 0,
    "__version__": 0,
    "nn": 1, "checkpoint": 1, "data": 1, "optim": 1,
    "models": 2, "methods": 2,
    "config": 3, "metrics": 3, "display": 3, "model": 3,
    "evaluate": 4, "generate": 4,
    "loop": 5,
    "recipe": 6,
    "commands": 7,
    "cli": 8,
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports at run time, at the top or inside functions (not under TYPE_CHECKING)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def engine_files() -> list[Path]:
    return sorted(p for p in ENGINE.rglob("*.py") if p != ENGINE / "__init__.py")


def unit(name: str) -> str:
    """The part of a dotted name that LEVELS speaks of: leantune.nn.linear -> nn."""
    return name.split(".")[1]


@pytest.mark.parametrize("path", engine_files(), ids=lambda p: str(p.relative_to(ENGINE)))
def test_engine_imports_run_one_way(path):
    own = path.relative_to(ENGINE).parts[0].removesuffix(".py")
    assert own in LEVELS, f"{own} has no level: say in this test where it belongs"
    for name in imports(path):
        if not name.startswith("leantune."):
            continue
        other = unit(name)
        allowed = other == own or LEVELS[other] < LEVELS[own]
        assert allowed, f"{path.name} ({own}) imports {name}, which is not below it"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: str(p.relative_to(KERNELS)))
def test_kernels_do_not_know_the_engine(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "leantune"]


def test_both_roots_are_only_folders():
    assert not (ROOT / "engine" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_leantune_stays_light():
    heavy = {
        "transformers",
        "datasets",
        "pyarrow",
        "pandas",
        "matplotlib",
        "rich",
        "jinja2",
        "huggingface_hub",
        "typer",
    }
    assert not heavy & modules_after("import leantune")


def test_import_leantune_kernels_loads_no_op():
    assert not [m for m in modules_after("import leantune_kernels") if m.startswith(("leantune_kernels.", "torch"))]
