"""Builds a small real data set from this interpreter's own standard library: questions about its public
functions, classes and methods, answered by the first paragraph of their docstrings.

The sources are parsed, never imported. A top-level module is either trained on or held out, never both.

    python examples/demo/build_data.py --out runs/demo-data
"""

import argparse
import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PAIRS = 200
PAIRS_PER_MODULE = 60  # tkinter alone would otherwise be a seventh of the data
ANSWER_CHARACTERS = range(30, 401)
ANSWER_WORDS = 5
QUESTION_CHARACTERS = 160
NOT_FOR_USERS = {"antigravity", "distutils", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"}
# Paragraphs that hold markup, code, notes to maintainers or a repeated signature do not read as answers.
UNREADABLE = re.compile(
    r">>>|::|:param|@param|XXX|TODO|\binternal|deprecated|\.\. |^\w+\(|->|^[-*(] |^\(|^See\b", re.IGNORECASE
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Pair:
    """One question and its answer; `module` is the top-level module, by which the split is made."""

    module: str
    prompt: str
    completion: str


def build(sources: Iterable[tuple[str, str]], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of (dotted module name, source text), in the order of the sources.

    An answer given twice is kept once, so overridden methods do not repeat it across the split. Modules in
    the order of their names' hashes are held out while they fit into `held_out`, none filling over a quarter.
    """
    seen: set[str] = set()
    by_module: dict[str, list[Pair]] = defaultdict(list)
    for name, text in sources:
        for pair in pairs_of_module(name, text):
            if pair.completion not in seen and len(by_module[pair.module]) < PAIRS_PER_MODULE:
                seen.add(pair.completion)
                by_module[pair.module].append(pair)
    chosen: set[str] = set()
    room = held_out
    for module in sorted(by_module, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if len(by_module[module]) <= min(room, held_out // 4):
            chosen.add(module)
            room -= len(by_module[module])
    train = [pair for module, pairs in by_module.items() if module not in chosen for pair in pairs]
    return train, [pair for module, pairs in by_module.items() if module in chosen for pair in pairs]


def stdlib_sources(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every public pure-Python module of the standard library, sorted by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    public = {name for name in sys.stdlib_module_names if not name.startswith("_")} - NOT_FOR_USERS
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        private = any(part.startswith("_") or part in ("test", "tests") for part in parts)
        if parts and parts[0] in public and not private:
            yield ".".join(parts), path.read_text(encoding="utf-8")


def pairs_of_module(module: str, text: str) -> Iterator[Pair]:
    """The readable pairs of one module: its public functions and classes, and their public methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in some modules
        tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_") and not _takes_self(node):
            yield from _pair(module, node, owner=None)
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, Definition) and not member.name.startswith("_"):
                    yield from _pair(module, member, owner=node)


def _takes_self(node: Definition) -> bool:
    """True for a function outside a class that a decorator turns into something else (`typing.Optional`)."""
    return not isinstance(node, ast.ClassDef) and bool(node.args.args) and node.args.args[0].arg == "self"


def _pair(module: str, node: Definition, owner: ast.ClassDef | None) -> Iterator[Pair]:
    prompt, completion = question(module, node, owner), answer(ast.get_docstring(node))
    if completion and len(prompt) <= QUESTION_CHARACTERS:
        yield Pair(module.split(".")[0], prompt, completion)


def question(module: str, node: Definition, owner: ast.ClassDef | None) -> str:
    """Such as: What does `textwrap.dedent(text)` do in Python?"""
    name = ".".join((module, *([owner.name] if owner else []), node.name))
    if isinstance(node, ast.ClassDef):
        return f"What is the class `{name}` for in Python?"
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return f"What is the attribute `{name}` in Python?"
    bound = owner is not None and "staticmethod" not in decorators
    return f"What does `{name}({signature(node.args, bound=bound)})` do in Python?"


def signature(arguments: ast.arguments, *, bound: bool) -> str:
    """Parameters and defaults without annotations; `bound` leaves out the first (`self`, `cls`)."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if bound and (first := arguments.posonlyargs or arguments.args):
        del first[0]
        # Defaults belong to the last parameters, so a default too many was that of the one removed.
        surplus = len(arguments.defaults) - len(arguments.posonlyargs + arguments.args)
        del arguments.defaults[: max(0, surplus)]
    return ast.unparse(arguments)


def answer(docstring: str | None) -> str | None:
    """The docstring's first paragraph as one clean line, or None where it would not read as an answer."""
    if not docstring:
        return None
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    line = re.sub(r"\s+", " ", paragraph).strip()
    line = re.sub(r":\w+:`", "`", line).replace("``", "`")  # Sphinx markup to Markdown
    if not line or UNREADABLE.search(line) or line.endswith((":", ",", ";")):
        return None
    line = line if line.endswith((".", "!", "?")) else line + "."
    line = line[0].upper() + line[1:]
    return line if len(line) in ANSWER_CHARACTERS and len(line.split()) >= ANSWER_WORDS else None


def write(out: Path) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl` into `out` and prints the counts; returns the two paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = out / "train.jsonl", out / "held_out.jsonl"
    for path, pairs in zip(paths, build(stdlib_sources(), HELD_OUT_PAIRS), strict=True):
        with path.open("w", encoding="utf-8") as file:
            for pair in pairs:
                record = {"prompt": pair.prompt, "completion": pair.completion}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        modules = len({pair.module for pair in pairs})
        print(f"data: {path}: {len(pairs):,} questions and answers from {modules} standard library modules")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the demo's data from the standard library's docstrings.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-data"), help="directory (default: %(default)s)")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
