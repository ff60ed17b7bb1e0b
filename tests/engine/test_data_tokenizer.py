"""The tokenizer of a checkpoint directory."""

import json
from pathlib import Path

import pytest
import tokenizers

from helpers_data import CHATML, backend, tokenizer, write_directory
from leantune.data import Tokenizer
from leantune.errors import DataError


def test_directory_gives_ids_specials_and_template(tmp_path: Path) -> None:
    root = write_directory(tmp_path)
    (root / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    read = Tokenizer.from_directory(root)
    assert (read.bos_token, read.bos_token_id) == ("<s>", 0)
    assert (read.eos_token, read.eos_token_id) == ("<|im_end|>", 3)
    assert read.stop_ids == {1, 3}
    assert read.chat_template == CHATML
    assert read.vocab_size == backend().get_vocab_size()
    ids = read.encode("hello world<|im_end|>")
    assert read.decode(ids) == "hello world"
    assert read.decode(ids, skip_special_tokens=False) == "hello world<|im_end|>"
    assert read.id_to_token(3) == "<|im_end|>"


def test_template_file_wins_over_config_and_config_may_list_several(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(write_directory(tmp_path, chat_template="x")).chat_template == CHATML
    root = write_directory(tmp_path / "b", template=None, chat_template="x")
    assert Tokenizer.from_directory(root).chat_template == "x"
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    listed = Tokenizer.from_directory(write_directory(tmp_path / "c", template=None, chat_template=several))
    assert listed.apply_chat_template([]) == "plain"
    assert listed.apply_chat_template([], tools=[{"name": "f"}]) == "tools"
    only = Tokenizer.from_directory(write_directory(tmp_path / "d", template=None, chat_template=several[1:]))
    with pytest.raises(DataError, match="under the name 'default' \\(it has tool_use\\)"):
        only.apply_chat_template([])


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer.json; save"):
        Tokenizer.from_directory(tmp_path)
    root = write_directory(tmp_path)
    (root / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.from_directory(root)
    (root / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config.json: holds a list"):
        Tokenizer.from_directory(root)
    (root / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"tokenizer.json: not a readable tokenizer file"):
        Tokenizer.from_directory(root)


def test_a_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    root = write_directory(tmp_path)
    (root / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"chat_template.jinja: not UTF-8 at byte 3; save the file as UTF-8"):
        Tokenizer.from_directory(root)


@pytest.mark.parametrize(
    "entry", [3, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": "default", "template": None}], False]
)
def test_a_malformed_template_entry_is_named(tmp_path: Path, entry: object) -> None:
    root = write_directory(tmp_path, template=None, chat_template=entry)
    with pytest.raises(DataError, match=r"tokenizer_config.json: chat_template must be a string or a list of"):
        Tokenizer.from_directory(root)


@pytest.mark.parametrize("ids", ["2", [1, "2"], 2.5, {"a": 1}])
def test_malformed_stop_ids_are_named(tmp_path: Path, ids: object) -> None:
    root = write_directory(tmp_path)
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id=.* must be a token id or a list"):
        Tokenizer.from_directory(root)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_directory(tmp_path)
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(13, "Permission denied")  # the superuser may read everything
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=rf"{name}: cannot be read: Permission denied"):
        Tokenizer.from_directory(root)


def test_stored_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    made = backend()
    made.enable_truncation(3)
    made.enable_padding(length=10)
    root = write_directory(tmp_path)
    made.save(str(root / "tokenizer.json"))
    read = Tokenizer.from_directory(root)
    assert read.decode(read.encode("how are you today?")) == "how are you today?"
    (ids, offsets), (short, _) = read.encode_batch(["how are you today?", "four"], add_special_tokens=False)
    assert len(ids) == len(offsets) > 3
    assert len(short) == len(read.encode("four"))


def test_offsets_keep_white_space_and_share_characters() -> None:
    text = "hello  world\n 😀é"
    ((encoded, spans),) = tokenizer(adds_start=True).encode_batch([text], add_special_tokens=True)
    ids, offsets = encoded.tolist(), [tuple(span) for span in spans.tolist()]
    assert ids[0] == 0
    assert offsets[0] == (0, 0)
    pieces = list(dict.fromkeys(offsets[1:]))
    assert "".join(text[start:end] for start, end in pieces) == text
    assert offsets.count((14, 15)) == 4  # the emoji's four bytes
    assert tokenizer(adds_start=True).encode(text, add_special_tokens=False) == ids[1:]


def test_special_token_known_only_as_a_word_is_kept_whole() -> None:
    state = json.loads(backend().to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "</s>"]
    made = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), {"eos_token": "</s>"})
    assert made.encode("four</s>")[-1] == made.eos_token_id == 1
    assert made.special_ids[1]


def test_token_text_is_readable() -> None:
    made = tokenizer()
    texts = [made.token_text(i) for i in made.encode("hello world 😀<|im_end|>")]
    assert texts[-5:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<|im_end|>"]
    assert "".join(texts[:-5]) == "hello world "
    assert made.token_text(10_000) == "<id 10000>"
