"""The kernels inside torch.compile: raw functions become one opaque operator, which no graph breaks on.

While a graph is traced, Op.pick gives a `Traced` op in place of an implementation. Its raw functions record a call of
`leantune_kernels::call`, whose arguments are the function's name, its tensors, its numbers and how they lie in the
arguments. When the graph runs, the operator calls the implementation that dispatch picks then. For the tracer it knows
shapes and dtypes of the results from the reference implementation, run on tensors without data; or, for a function
whose reference looks into its tensors, from `<function>_shapes` beside it. The op's own autograd.Function is traced
around it, so there is nothing to write for an op, unless its raw functions write to their arguments (see Effects).

The operator itself changes nothing: what a raw function would overwrite is copied before and returned, and the graph
copies it back. Compilers remove the second copy where the memory was new.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from leantune_kernels.checks import FLOATS


class Effects(NamedTuple):
    """What a raw function does beyond returning new tensors."""

    writes: tuple[int, ...]  # positions of the arguments that it overwrites, tensors or lists of them
    returns: bool = False  # whether the graph needs what it returns, too


class Traced:
    """The raw functions of an op while a graph is traced."""

    def __init__(self, package: str, effects: dict[str, Effects]) -> None:
        self.package, self.effects = package, effects

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def recorded(*args: Any, **options: Any) -> Any:
            effects = self.effects.get(name, Effects((), returns=True))
            return call(f"{self.package}:{name}", effects, args, options)

        return recorded


def call(target: str, effects: Effects, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """Records a call of the raw function `target`, "package:name", in the graph, and makes its effects the graph's."""
    tensors: list[torch.Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    written: list[int] = []
    words = []
    for i, value in enumerate(args):
        before = len(tensors)
        words.append(_flatten(value, tensors, ints, floats))
        if i in effects.writes:
            written.extend(range(before, len(tensors)))
    for name, value in options.items():
        words.append(name + "=" + _flatten(value, tensors, ints, floats))
    results = torch.ops.leantune_kernels.call(target, " ".join(words), tensors, ints, floats, written, effects.returns)
    for new, index in zip(results, written, strict=False):
        tensors[index].copy_(new)
    return _returned(results[len(written) :], [tensors[index] for index in written])


# ---- the operator ----------------------------------------------------------------------------------------------------

torch.library.define(
    "leantune_kernels::call",
    "(str target, str layout, Tensor[] tensors, SymInt[] ints, float[] floats, int[] written, bool returns)"
    " -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("leantune_kernels::call", "CompositeExplicitAutograd")
def _run(
    target: str,
    layout: str,
    tensors: list[torch.Tensor],
    ints: list[int],
    floats: list[float],
    written: list[int],
    returns: bool,
) -> list[torch.Tensor]:
    given, copies = _with_copies(tensors, written, torch.clone)
    args, options = _arguments(layout, given, ints, floats)
    package, name = _module(target)
    # Ids or codes may come first; what dispatch looks at beside the device is the dtype of a float tensor.
    implementation = package.OP.pick(next((t for t in given if t.dtype in FLOATS), given[0]))
    # Not every raw function has an implementation of its own: the op's package has those that are built from others.
    function = getattr(implementation, name, None) or getattr(package, name)
    result = function(*args, **options)
    return copies + (_encoded(result, copies, given) if returns else [])


@torch.library.register_fake("leantune_kernels::call")  # type: ignore[untyped-decorator]
def _shapes(
    target: str,
    layout: str,
    tensors: list[torch.Tensor],
    ints: list[int],
    floats: list[float],
    written: list[int],
    returns: bool,
) -> list[torch.Tensor]:
    given, copies = _with_copies(tensors, written, torch.empty_like)
    if not returns:
        return copies
    args, options = _arguments(layout, given, ints, floats)
    package, name = _module(target)
    reference = importlib.import_module(f"{package.__name__}.reference")
    result = (getattr(reference, f"{name}_shapes", None) or getattr(reference, name))(*args, **options)
    if any(part is t for part in _parts(result) for t in tensors):
        raise AssertionError(f"{target} returns an argument, which it writes to, but its op's `effects` do not name it")
    return copies + _encoded(result, copies, given)


def _with_copies(
    tensors: Sequence[torch.Tensor], written: Sequence[int], copy: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors with copies in place of those to be overwritten, and these copies."""
    given = list(tensors)
    for index in written:
        given[index] = copy(tensors[index])
    return given, [given[index] for index in written]


@cache
def _module(target: str) -> tuple[ModuleType, str]:
    package, _, name = target.partition(":")
    return importlib.import_module(package), name


# ---- arguments and results as lists of tensors and numbers -----------------------------------------------------------


def _flatten(value: Any, tensors: list[torch.Tensor], ints: list[Any], floats: list[Any]) -> str:
    """`value` as one word, without its tensors and numbers, which go to the lists in order."""
    if value is None:
        return "N"
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return "T"
    if isinstance(value, bool):
        return "B1" if value else "B0"
    if isinstance(value, (int, torch.SymInt)):
        if value >= 2**63:  # a seed; an operator's numbers have 63 bits
            ints.extend((value // 2**32, value % 2**32))
            return "L"
        ints.append(value)
        return "I"
    if isinstance(value, (float, torch.SymFloat)):
        floats.append(value)
        return "F"
    if isinstance(value, str):
        return f"S{value}"
    if isinstance(value, torch.dtype):
        return "D" + str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        parts = list(value)
    elif is_dataclass(value):
        parts = [getattr(value, f.name) for f in fields(value)]
    else:
        raise TypeError(f"a {type(value).__name__} cannot be an argument of a kernel inside torch.compile")
    kind, inside = type(value), [_flatten(part, tensors, ints, floats) for part in parts]
    return "(" + ",".join([f"{kind.__module__}:{kind.__qualname__}", *inside]) + ")"


Lists = dict[str, Iterator[Any]]
Maker = Callable[[Lists], Any]  # makes a value of what the lists hold next


def _arguments(
    layout: str, tensors: Sequence[torch.Tensor], ints: Sequence[int], floats: Sequence[float]
) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the named arguments that `_flatten` made words of."""
    lists = {"T": iter(tensors), "I": iter(ints), "F": iter(floats)}
    made = [(name, maker(lists)) for name, maker in _plan(layout)]
    return [value for name, value in made if not name], {name: value for name, value in made if name}


@lru_cache(4096)
def _plan(layout: str) -> list[tuple[str, Maker]]:
    """(name, or "" for a positional argument; what makes its value) of each argument."""
    plan = []
    for word in layout.split():
        name, _, rest = word.rpartition("=")
        tokens = rest.replace("(", ",(,").replace(")", ",),").split(",")
        plan.append((name, _maker(iter([token for token in tokens if token]))))
    return plan


def _maker(tokens: Iterator[str]) -> Maker:
    token = next(tokens)
    kind, rest = token[0], token[1:]
    if kind in "TIF":
        return lambda lists: next(lists[kind])
    if kind == "L":
        return lambda lists: next(lists["I"]) * 2**32 + next(lists["I"])
    if kind == "(":
        return _container(tokens)
    constants: dict[str, Callable[[], Any]] = {
        "N": lambda: None,
        "B": lambda: rest == "1",
        "S": lambda: rest,
        "D": lambda: getattr(torch, rest),
    }
    value = constants[kind]()
    return lambda _: value


def _container(tokens: Iterator[str]) -> Maker:
    module, _, name = next(tokens).partition(":")
    kind: Any = getattr(importlib.import_module(module), name)
    parts: list[Maker] = []
    for token in tokens:
        if token == ")":
            break
        parts.append(_maker(itertools.chain([token], tokens)))
    if kind in (tuple, list, torch.Size):
        return lambda lists: kind([part(lists) for part in parts])
    return lambda lists: kind(*[part(lists) for part in parts])


# Results are led by a tensor without elements, whose shape says what they are: [0, 1 for one result or 2 for several
# or 0 for None, then for each what it is]: NOTHING, NEW, or ALIAS + i for the i-th overwritten argument.
NOTHING, NEW, ALIAS = 0, 1, 2


def _encoded(result: Any, copies: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    several, parts = isinstance(result, (tuple, list)), _parts(result)
    kinds: list[int] = []
    new: list[torch.Tensor] = []
    for part in parts:
        which = [i for i, copied in enumerate(copies) if part is copied]
        kinds.append(NOTHING if part is None else ALIAS + which[0] if which else NEW)
        if kinds[-1] == NEW:
            new.append(_of_its_own(part, [*given, *new]))
    marker = torch.empty(0, 2 if several else len(parts), *kinds, device=given[0].device)
    return [marker, *new]


def _parts(result: Any) -> list[Any]:
    if isinstance(result, (tuple, list)):
        return list(result)
    return [] if result is None else [result]


def _of_its_own(result: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Dense, and in memory that no argument and no other result has: what an operator may return."""
    memory = result.untyped_storage()._cdata
    if any(memory == t.untyped_storage()._cdata for t in others):
        return result.clone(memory_format=torch.contiguous_format)
    return result.contiguous()


def _returned(results: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> Any:
    if not results:
        return None
    shape, new = results[0].shape, list(results[1:])
    parts: list[torch.Tensor | None] = []
    for kind in shape[2:]:
        if kind == NOTHING:
            parts.append(None)
        elif kind == NEW:
            parts.append(new.pop(0))
        else:
            parts.append(written[kind - ALIAS])
    return tuple(parts) if shape[1] == 2 else parts[0] if parts else None
