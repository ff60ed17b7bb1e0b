"""Chat templates: renderings equal those of transformers, and a hostile template is an error, not a hang."""

from typing import Any

import pytest

from helpers_data import BOS_CHATML, CHATML, FORGETFUL, MARKED, assistant, backend, system, tokenizer, user
from leantune.data.template import ChatTemplate
from leantune.errors import DataError

FEATURES = """{%- set ns = namespace(count=0, roles=[]) -%}
{% for message in messages %}
    {% if message.role == 'system' and not loop.first %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
{{ loop.index }}/{{ loop.length }} {{ message['role'] | upper }}: {{ message.content | trim }}{{ '-' * 3 }}
    {%- if loop.last %}{% break %}{% endif %}
{% endfor %}
{{ ns.count }} {{ messages | tojson }}
{{ {'b': '<é>', 'a': [1, none, true]} | tojson(indent=2, sort_keys=true) }}
{{ strftime_now('%Y') }} {{ bos_token }}{{ eos_token }} {{ dict(a=1).items() | list }} {{ range(3) | list }}
{%- for key, value in {'x': 1, 'y': 2}.items() %} {{ key }}={{ value }}{% endfor %}
{%- for m in messages if m.role == 'user' %} <{{ m.content }}>{% else %} nobody{% endfor %}
{%- if tools is none %} no tools{% endif %}{% if add_generation_prompt %} go{% endif %}
{%- macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('é') }}
{{ undefined_name }}|{{ messages[-1].content[:3] }}"""

CHATS = [
    [user("hello")],
    [system("  be <b>kind</b> & 'brief'\n"), user("hello"), assistant("four 😀")],
    [user("a"), assistant("b"), system("c"), user("d"), {**assistant("e"), "reasoning": "so"}],
]
REASONING = "{% for m in messages %}{{ m.content }}[{{ m.reasoning_content }}|{{ m.thinking }}]{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, BOS_CHATML, MARKED, FORGETFUL, FEATURES, REASONING])
@pytest.mark.parametrize("chat", CHATS, ids=["one", "three", "five"])
def test_renderings_equal_transformers(template: str, chat: list[dict[str, str]]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )
    for prompt in (False, True):
        ours = tokenizer(template).apply_chat_template(chat, prompt)
        assert ours == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer(template).encode(
        tokenizer(template).apply_chat_template(chat), add_special_tokens=False
    ) == theirs.apply_chat_template(chat, return_dict=False)


def test_generation_spans_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="<|im_end|>", chat_template=MARKED
    )
    # No character of several tokens at the end of a span: transformers masks all but the first of its tokens.
    chat = [user("hello"), assistant("how are you"), user("😀?"), assistant("é 😀 four")]
    out = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    text, spans = tokenizer(MARKED).render_with_generation_spans(chat)
    assert [text[start:end] for start, end in spans] == ["how are you", "é 😀 four"]
    ((_, offsets),) = tokenizer(MARKED).encode_batch([text], add_special_tokens=False)
    ours = [int(any(start >= s and start < e for s, e in spans)) for start, _ in offsets]
    assert ours == out["assistant_masks"]


def test_generation_marks_that_are_captured_are_refused() -> None:
    template = "{% set x %}head{% generation %}hello{% endgeneration %}{% endset %}{{ 'longer' }}{{ x }}"
    with pytest.raises(DataError, match="outside of macros"):
        tokenizer(template).render_with_generation_spans([])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__() }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ self.__init__.__globals__ }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "begins with an underscore"),
        ("{% set ns = namespace() %}{% set ns.__call__ = 1 %}", "begins with an underscore"),
        ("{% for i in range(999999999) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loop turns"),
        (
            "{% set s = 'a' * 99999 %}{% for i in s %}{% for j in s %}{% endfor %}{% endfor %}",
            "loop turns and calls",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
            "loop turns and calls",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 9999999999 }}", "repeats a value 9999999999 times"),
        ("{{ 9999999999 * [1] }}", "repeats a value"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "out of bounds"),
        ("{% for i in range(999) %}{{ 'a' * 99999 }}{% endfor %}", "writes more than"),
        ("{{ raise_exception('roles must alternate') }}", "template failed: roles must alternate"),
        ("{{ messages[7].role }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for %}", "does not compile: line 1"),
        ("{{ x | no_such_filter }}", "does not compile: line 1"),
        ("{% generation %}", "does not compile"),
        ("{% include 'a' %}", "template failed"),
    ],
)
def test_hostile_and_broken_templates_are_errors(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenizer(template).apply_chat_template([user("hello")])


def test_a_failed_rendering_leaves_nothing_behind() -> None:
    template = ChatTemplate("before{% generation %}x{% endgeneration %}{{ 1 / d }}")
    with pytest.raises(DataError):
        template.render({"d": 0})
    variables: dict[str, Any] = {"d": 2}
    assert template.render(variables) == ("beforex0.5", [(6, 7)])
