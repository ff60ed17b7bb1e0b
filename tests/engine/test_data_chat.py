"""Chats: which tokens are trained on, and who wrote the others."""

from typing import Any

import numpy as np
import pytest

from helpers_data import (
    BOS_CHATML,
    CHATML,
    FORGETFUL,
    HEADLESS,
    MARKED,
    PLAIN_TURNS,
    assistant,
    role_texts,
    system,
    tokenizer,
    trained_text,
    user,
    whole_text,
)
from leantune import data
from leantune.errors import ConfigError, DataError

TWO_TURNS: dict[str, Any] = {"messages": [user("hello"), assistant("how are you"), user("today?"), assistant("four")]}


def test_assistant_turns_with_their_end_are_trained() -> None:
    dataset = data.chat([TWO_TURNS], tokenizer())
    assert trained_text(dataset) == "how are you<|im_end|>four<|im_end|>"


def test_last_trains_the_last_turn_alone() -> None:
    dataset = data.chat([TWO_TURNS], tokenizer(), train_on="last")
    assert trained_text(dataset) == "four<|im_end|>"
    assert ("assistant", "how are you") in role_texts(dataset)


def test_all_trains_everything_but_the_first_token() -> None:
    dataset = data.chat([TWO_TURNS], tokenizer(), train_on="all")
    mask = dataset[0].label_mask
    assert not mask[0]
    assert mask[1:].all()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_words_of_the_markup_as_content_are_not_confused_with_it(template: str) -> None:
    record = {"messages": [system("user"), user("assistant"), assistant("assistant\n<|im_start|>user\n")]}
    dataset = data.chat([record], tokenizer(template))
    assert trained_text(dataset) == "assistant\n<|im_start|>user\n<|im_end|>"
    roles = [(role, text) for role, text in role_texts(dataset) if role in ("system", "user")]
    assert roles == [("system", "user"), ("user", "assistant")]


def test_generation_marks_decide_and_the_end_of_turn_after_them_is_trained() -> None:
    marked = data.chat([TWO_TURNS], tokenizer(MARKED))
    plain = data.chat([TWO_TURNS], tokenizer(CHATML))
    assert trained_text(marked) == "how are you<|im_end|>four<|im_end|>"
    assert marked.fingerprint == plain.fingerprint
    last = data.chat([TWO_TURNS], tokenizer(MARKED), train_on="last")
    assert trained_text(last) == "four<|im_end|>"


def test_marks_that_leave_out_a_turn_leave_it_untrained() -> None:
    template = MARKED.replace("== 'assistant'", "== 'assistant' and loop.last")
    assert trained_text(data.chat([TWO_TURNS], tokenizer(template))) == "four<|im_end|>"


def test_a_template_without_end_token_trains_its_white_space_end() -> None:
    dataset = data.chat([{"prompt": "hello", "completion": "four"}], tokenizer(PLAIN_TURNS))
    assert trained_text(dataset) == " four\n\n"


def test_a_template_that_rewrites_turns_is_refused_and_last_still_works() -> None:
    with pytest.raises(DataError, match=r"records\[0\]: .*messages\[1\] differently.*generation.*\"last\""):
        data.chat([TWO_TURNS], tokenizer(FORGETFUL))
    last = data.chat([TWO_TURNS], tokenizer(FORGETFUL), train_on="last")
    assert trained_text(last) == "<think></think>four<|im_end|>"


def test_a_template_that_ignores_the_generation_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="ignores add_generation_prompt"):
        data.chat([TWO_TURNS], tokenizer(HEADLESS))


@pytest.mark.parametrize(("template", "starts"), [(BOS_CHATML, 1), (CHATML, 0)])
def test_only_the_template_writes_the_start_token(template: str, starts: int) -> None:
    dataset = data.chat([TWO_TURNS], tokenizer(template, adds_start=True))
    assert dataset[0].input_ids.tolist().count(0) == starts
    assert whole_text(dataset) == dataset.tokenizer.apply_chat_template(TWO_TURNS["messages"])


def test_pairs_become_a_chat_with_an_optional_system() -> None:
    records: list[dict[str, Any]] = [
        {"prompt": "hello", "completion": "four", "system": "the answer"},
        {"prompt": "hello", "completion": "four", "system": ""},
        {"prompt": "hello", "completion": "four", "system": None},
    ]
    dataset = data.chat(records, tokenizer())
    assert role_texts(dataset)[1] == ("system", "the answer")
    assert [name for name, _ in role_texts(dataset, 1)].count("system") == 0
    assert dataset[1].input_ids.tolist() == dataset[2].input_ids.tolist()


def test_fields_map_columns_to_names() -> None:
    fields = {"question": "prompt", "answer": "completion"}
    mapped = data.chat([{"question": "hello", "answer": "four", "id": 7}], tokenizer(), fields=fields)
    assert mapped.fingerprint == data.chat([{"prompt": "hello", "completion": "four"}], tokenizer()).fingerprint


def test_tools_and_null_content_of_calls_reach_the_template() -> None:
    template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"name": "today"}]}
    record = {"messages": [user("hello"), call], "tools": [{"name": "today"}]}
    dataset = data.chat([record], tokenizer(template))
    assert whole_text(dataset).startswith('{"name": "today"}<|im_start|>user')
    assert trained_text(dataset) == '[{"name": "today"}]<|im_end|>'


@pytest.mark.parametrize("answer", ["😀 vier", "é", " leading", "a\u2028b", "🇩🇪👩‍👩‍👧"])
def test_characters_of_many_bytes_keep_the_spans_right(answer: str) -> None:
    dataset = data.chat([{"prompt": "naïve 😀 日本", "completion": answer}], tokenizer())
    assert trained_text(dataset) == answer + "<|im_end|>"
    assert ("user", "naïve 😀 日本") in role_texts(dataset)


def test_truncation_at_over_and_under_the_limit() -> None:
    length = len(data.chat([TWO_TURNS], tokenizer())[0])
    at = data.chat([TWO_TURNS], tokenizer(), max_length=length)
    assert (at.stats.truncated, at.stats.dropped, len(at[0])) == (0, 0, length)
    over = data.chat([TWO_TURNS], tokenizer(), max_length=length - 1)
    assert (over.stats.truncated, over.stats.dropped, len(over[0])) == (1, 0, length - 1)
    assert over[0].truncated
    short = {"prompt": "hello", "completion": "four"}
    dropped = data.chat([TWO_TURNS, short], tokenizer(), max_length=length - 1, on_long="drop")
    assert (dropped.stats.samples, dropped.stats.dropped, dropped.stats.unlabelled) == (1, 1, 0)
    assert dropped[0].source == "records[1]"


def test_a_sample_that_truncation_leaves_without_label_is_dropped_and_counted() -> None:
    long = {"prompt": "hello " * 50, "completion": "four"}
    short = {"prompt": "hello", "completion": "four"}
    dataset = data.chat([long, short], tokenizer(), max_length=30)
    assert (dataset.stats.samples, dataset.stats.dropped, dataset.stats.unlabelled) == (1, 1, 1)
    with pytest.raises(DataError, match="none of 1 samples keeps a label token within max_length=30"):
        data.chat([long], tokenizer(), max_length=30)
    with pytest.raises(DataError, match="none of 1 samples fits in max_length=30"):
        data.chat([long], tokenizer(), max_length=30, on_long="drop")


def test_samples_without_a_label_token_are_named() -> None:
    with pytest.raises(DataError, match=r"records\[1\]: there is no assistant message"):
        data.chat([TWO_TURNS, {"messages": [user("hello")]}], tokenizer())
    silent = MARKED.replace("{%- generation %}", "{%- if false %}{%- generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    )
    with pytest.raises(DataError, match=r"records\[0\]: no label token in the \d+ tokens"):
        data.chat([TWO_TURNS], tokenizer(silent))


def test_no_template_is_named() -> None:
    with pytest.raises(DataError, match=r"no chat template.*chat_template.jinja"):
        data.chat([TWO_TURNS], tokenizer(None))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"on_long": "cut"}, "on_long='cut'.*truncate, drop"),
        ({"train_on": "user"}, "train_on='user'.*assistant, last, all"),
        ({"fields": {"question": "query"}}, "fields maps 'question' to 'query'"),
        ({"fields": {"a": "prompt", "b": "prompt"}}, "more than one column"),
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data.chat([TWO_TURNS], tokenizer(), **setting)  # type: ignore[arg-type]


def test_samples_are_compact_and_the_fingerprint_covers_tokens_and_masks() -> None:
    records = [TWO_TURNS, {"prompt": "hello", "completion": "four"}]
    dataset = data.chat(records, tokenizer())
    sample = dataset[1]
    assert sample.input_ids.dtype == np.int32
    assert sample.label_mask.dtype == np.bool_
    assert np.shares_memory(sample.input_ids, dataset.input_ids)
    assert dataset[-1].input_ids.tolist() == sample.input_ids.tolist()
    assert [len(s) for s in dataset] == dataset.lengths.tolist()
    assert sample.roles[0][1] == 0
    assert sample.roles[-1][2] == len(sample)
    assert all(a[2] == b[1] for a, b in zip(sample.roles, sample.roles[1:], strict=False))
    with pytest.raises(IndexError):
        dataset[2]
    assert dataset.stats.tokens == dataset.lengths.sum()
    assert dataset.stats.label_tokens == sum(int(s.label_mask.sum()) for s in dataset)
    fingerprints = {data.chat(records, tokenizer(), train_on=t).fingerprint for t in ("assistant", "last", "all")}
    assert len(fingerprints) == 3
    assert data.chat(records, tokenizer()).fingerprint == dataset.fingerprint
    assert data.chat(records[::-1], tokenizer()).fingerprint != dataset.fingerprint


def test_a_template_that_asks_for_the_date_is_told() -> None:
    records = [{"messages": [user("hello"), assistant("four")]}]
    today = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
    assert data.chat(records, tokenizer(today)).dated
    assert not data.chat(records, tokenizer("{# strftime_now #}{{ 'strftime_now' }}" + CHATML)).dated
    assert not data.text([{"text": "hello"}], tokenizer(today)).dated


def test_more_records_than_one_chunk_keep_their_order() -> None:
    records = [{"prompt": "hello", "completion": f"the answer {i}"} for i in range(1100)]
    dataset = data.chat(iter(records), tokenizer())
    assert [trained_text(dataset, i) for i in (0, 600, 1099)] == [f"the answer {i}<|im_end|>" for i in (0, 600, 1099)]
