"""The printed account of a sample agrees with what training gets."""

import io
import re
import subprocess
import sys

from rich.console import Console

from helpers_data import assistant, tokenizer, user
from leantune import data
from leantune.data.inspection import visible

CHAT = {"messages": [user("[bold]hello\tworld"), assistant("four 😀")]}


def printed(dataset: data.Dataset, index: int | list[int], colour: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=colour, no_color=not colour)
    data.inspect(dataset, index, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.match(r"\s+\d+\s+\d+\s", line)]


def test_every_token_has_a_row_with_its_target_and_role() -> None:
    dataset = data.chat([CHAT], tokenizer())
    table = rows(printed(dataset, 0))
    sample = dataset[0]
    assert len(table) == len(sample)
    assert [row[1] for row in table] == [str(i) for i in range(len(sample))]
    assert ["yes" in row for row in table] == sample.label_mask.tolist()
    assert [row[2] for row in table] == [name for name, a, b in sample.roles for _ in range(b - a)]
    tokens = "".join(row[-1] for row in table)
    assert tokens.startswith("<|im_start|>user↵[bold]hello⇥world<|im_end|>↵<|im_start|>assistant↵four·")
    assert "<0xF0><0x9F><0x98><0x80><|im_end|>" in tokens


def test_a_pack_shows_segments_and_positions_that_restart() -> None:
    short = {"prompt": "hello", "completion": "four"}
    dataset = data.chat([CHAT, short], tokenizer())
    text = printed(dataset, [1, 0])
    table = rows(text)
    a, b = len(dataset[1]), len(dataset[0])
    assert [row[0] for row in table] == ["0"] * a + ["1"] * b
    assert [row[1] for row in table] == [str(i) for i in [*range(a), *range(b)]]
    assert "segment 0: sample 1 from records[1]" in text
    assert f"batch: {a + b} tokens, {dataset.stats.label_tokens} targets" in text


def test_summary_legend_and_truncation() -> None:
    dataset = data.text([{"text": "hello world " * 9}], tokenizer(None), max_length=4)
    text = printed(dataset, 0)
    assert "4 tokens, 3 targets (75.0%), truncated" in text
    assert "data set: 1 samples, 4 tokens, 3 targets (75.0%), 1 truncated, 0 dropped" in text
    assert "legend: text" in text
    coloured = printed(dataset, 0, colour=True)
    assert "\x1b[" in coloured


def test_white_space_and_control_characters_are_visible() -> None:
    assert visible("a b\n\t\r\x00é😀") == "a·b↵⇥␍\\x00é😀"


def test_the_package_imports_no_heavy_library() -> None:
    code = (
        "import sys, leantune.data; heavy = {'transformers', 'datasets', 'pyarrow', 'matplotlib', 'rich', "
        "'jinja2', 'huggingface_hub', 'tokenizers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
