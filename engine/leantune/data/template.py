"""Chat templates: Jinja source from a checkpoint, which is foreign code, rendered in a sandbox.

The environment is the one that checkpoints are written for (trim_blocks, lstrip_blocks, loop controls,
`tojson` that does not escape HTML, `raise_exception`, `strftime_now`, `{% generation %}`), so that renderings
agree byte for byte with `transformers`. Jinja's sandbox blocks attributes that lead out of it; besides, one
rendering may take a bounded number of steps and write a bounded text.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from leantune.data.tokenizer import Span
from leantune.errors import DataError

MAX_STEPS = 1_000_000  # loop turns and calls in one rendering; long real chats take thousands
MAX_CHARS = 1 << 24  # length of a rendered text, and of any string or list made by repetition
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """One compiled chat template. Rendering is serialised by a lock, since the sandbox counts steps.

    has_generation_marks: it marks what the model writes. dated: it asks for today's date, so a rendering may
    differ from day to day.

    Raises DataError for a template that does not compile.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.has_generation_marks = _GENERATION.search(source) is not None
        self._environment = _Sandbox()
        self._lock = threading.Lock()
        try:
            tree = self._environment.parse(source)
            self.dated = any(node.name == "strftime_now" for node in tree.find_all(nodes.Name))
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "bounded", [], [], None, None)
            code = self._environment.compile(tree)
        except Exception as error:  # foreign code: any failure of it is a fault of the template
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            raise DataError(f"the chat template does not compile: {line}{_reason(error)}") from error
        self._template = self._environment.template_class.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, variables: dict[str, Any]) -> tuple[str, list[Span]]:
        """The text, and the span of each generation block in it.

        Raises DataError for whatever the template does wrong or refuses.
        """
        env = self._environment
        with self._lock:
            env.start()
            try:
                for chunk in self._template.generate(**variables):
                    env.write(chunk)
            except Exception as error:  # foreign code: any failure of it is a fault of the template or the data
                raise DataError(f"the chat template failed: {_reason(error)}") from error
            text, spans = "".join(env.chunks), list(env.spans)
        for start, block in spans:
            if not text.startswith(block, start):
                raise DataError(
                    "the chat template changes or moves the text of a generation block after the block; "
                    "write {% generation %} outside of macros, {% set %} and filters"
                )
        return text, [(start, start + len(block)) for start, block in spans]


class _GenerationMarks(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the text that the model is to write."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it per instance)
    environment: "_Sandbox"

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        block = caller()
        # Chunks are taken up as they are produced, so what is written so far is the offset of this block.
        self.environment.spans.append((self.environment.written, block))
        return block


class _Namespace(Namespace):
    """`namespace(...)` without names that begin with an underscore, which could shadow interpreter hooks."""

    def __init__(self, **values: Any) -> None:
        for name in values:
            _check_name(name)
        super().__init__(**values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, loopcontrols])
        self.filters.update(tojson=_to_json, bounded=self.bounded)
        self.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace)
        self.start()

    def start(self) -> None:
        self.chunks: list[str] = []
        self.written = 0
        self.steps = 0
        self.spans: list[tuple[int, str]] = []

    def write(self, chunk: str) -> None:
        self.chunks.append(chunk)
        self.written += len(chunk)
        if self.written > MAX_CHARS:
            raise SecurityError(f"it writes more than {MAX_CHARS} characters")

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} loop turns and calls")

    def bounded(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise SecurityError(f"{left} ** {right} is out of bounds")
        for items, count in ((left, right), (right, left)):
            if isinstance(items, (str, list, tuple)) and len(items) * count > MAX_CHARS:
                raise SecurityError(f"it repeats a value {count} times")
        return super().call_binop(context, operator, left, right)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(format: str) -> str:  # the name is the one templates use as a keyword
    return datetime.now().strftime(format)


def _reason(error: Exception) -> str:
    kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
    return f"{kind}{error}"
