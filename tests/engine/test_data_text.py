"""Completions, plain text, and the choice between the kinds of data."""

import numpy as np
import pytest
from tokenizers import processors

from helpers_data import CHATML, assistant, role_texts, tokenizer, trained_text, user, whole_text
from leantune import data
from leantune.data import Tokenizer
from leantune.errors import ConfigError, DataError

PAIR = {"prompt": "prompt:", "completion": " answer"}


@pytest.mark.parametrize("adds_start", [False, True])
def test_completion_and_end_token_are_trained(adds_start: bool) -> None:
    dataset = data.completion([PAIR], tokenizer(None, adds_start, eos="</s>"))
    assert whole_text(dataset) == "<s>" * adds_start + "prompt: answer</s>"
    assert trained_text(dataset) == " answer</s>"
    expected = [("prompt", "prompt:"), ("completion", " answer"), ("template", "</s>")]
    assert role_texts(dataset) == [("template", "<s>")] * adds_start + expected


def test_a_token_across_the_boundary_is_prompt() -> None:
    # " answer" is one token; with the space in the prompt it begins before the boundary.
    plain = tokenizer(None)
    assert " answer" in [plain.token_text(i) for i in plain.encode("prompt: answer")]
    dataset = data.completion([{"prompt": "prompt: ", "completion": "answer is four"}], plain)
    assert trained_text(dataset) == " is four<|im_end|>"


def test_a_completion_lost_to_the_boundary_is_named() -> None:
    with pytest.raises(DataError, match=r"records\[0\]: the token ' answer' has the end of the prompt"):
        data.completion([{"prompt": "prompt: ", "completion": "answer"}], tokenizer(None))


def test_bytes_of_one_character_share_its_side() -> None:
    dataset = data.completion([{"prompt": "é", "completion": "😀"}], tokenizer(None))
    assert trained_text(dataset) == "😀<|im_end|>"
    assert int(dataset[0].label_mask.sum()) == 5  # four bytes and the end


def test_start_and_end_in_the_text_are_not_doubled() -> None:
    record = {"prompt": "<s>prompt:", "completion": " answer</s>"}
    dataset = data.completion([record], tokenizer(None, adds_start=True, eos="</s>"))
    assert whole_text(dataset) == "<s>prompt: answer</s>"
    assert trained_text(dataset) == " answer</s>"


def test_an_end_token_from_the_tokenizer_is_trained_and_not_doubled() -> None:
    plain = tokenizer(None, eos="</s>")
    plain.backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    dataset = data.completion([PAIR], plain)
    assert whole_text(dataset) == "<s>prompt: answer</s>"
    assert trained_text(dataset) == " answer</s>"


def test_no_end_token_is_named() -> None:
    without = Tokenizer(tokenizer().backend, {}, {})
    with pytest.raises(DataError, match=r"records\[0\]: .*no end-of-text token.*eos_token"):
        data.completion([PAIR], without)


def test_text_trains_all_but_the_first_token() -> None:
    dataset = data.text([{"text": "hello world"}], tokenizer(None, eos="</s>"))
    assert whole_text(dataset) == "hello world</s>"
    assert dataset[0].label_mask.tolist() == [False] + [True] * (len(dataset[0]) - 1)
    started = data.text([{"text": "hello world"}], tokenizer(None, adds_start=True))
    assert trained_text(started) == "hello world<|im_end|>"


def test_truncated_text_has_no_end_token() -> None:
    dataset = data.text([{"text": "hello world " * 20}], tokenizer(None), max_length=8)
    assert len(dataset[0]) == 8
    assert dataset[0].truncated
    assert dataset.stats.truncated == 1
    assert dataset.tokenizer.eos_token_id not in dataset[0].input_ids


def test_truncation_inside_the_prompt_drops() -> None:
    records = [{"prompt": "hello" * 30, "completion": " four"}, PAIR]
    dataset = data.completion(records, tokenizer(None), max_length=10)
    assert (dataset.stats.samples, dataset.stats.unlabelled) == (1, 1)


def test_auto_picks_by_keys_and_template() -> None:
    chat = {"messages": [user("hello"), assistant("four")]}
    assert trained_text(data.auto([chat], tokenizer())) == "four<|im_end|>"
    assert whole_text(data.auto([PAIR], tokenizer(CHATML))).startswith("<|im_start|>user\nprompt:")
    assert whole_text(data.auto([PAIR], tokenizer(None))) == "prompt: answer<|im_end|>"
    assert whole_text(data.auto([{"text": "hello"}], tokenizer())) == "hello<|im_end|>"
    fields = {"question": "prompt", "answer": "completion"}
    mapped = data.auto([{"question": "hello", "answer": "four"}], tokenizer(), fields=fields)
    assert trained_text(mapped) == "four<|im_end|>"


def test_auto_keeps_the_first_record_of_an_iterator() -> None:
    assert len(data.auto(iter([PAIR, PAIR, PAIR]), tokenizer())) == 3


def test_auto_names_what_it_cannot_use() -> None:
    with pytest.raises(DataError, match=r"records\[0\]: the record has 'answer', 'question'.*question=prompt"):
        data.auto([{"question": "hello", "answer": "four"}], tokenizer())
    with pytest.raises(DataError, match="there is no record"):
        data.auto([], tokenizer())
    with pytest.raises(DataError, match=r"records\[1\]: no 'prompt'"):
        data.auto([PAIR, {"text": "hello"}], tokenizer(None))
    with pytest.raises(ConfigError, match="train_on='last' is for chat data"):
        data.auto([{"text": "hello"}], tokenizer(), train_on="last")


def test_no_sample_is_padded_or_supervised_at_its_start() -> None:
    records = [{"text": "hello " * n} for n in (1, 5, 9)]
    dataset = data.text(records, tokenizer(None))
    assert len(np.unique(dataset.lengths)) == 3
    assert not any(sample.label_mask[0] for sample in dataset)
