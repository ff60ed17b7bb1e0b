"""A tiny byte-level tokenizer and the chat templates that the data tests use."""

import json
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from leantune.data import Dataset, Tokenizer

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "hello world, how are you today?",
    "the answer is four",
    "system user assistant",
    "prompt: answer",
] * 5

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BOS_CHATML = "{{ bos_token }}" + CHATML
# Marks only the words, as many published templates do; the end of turn comes right after.
MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] }}{% endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Reasoning stays in the last turn only: turns rendered on their own differ from the whole.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADLESS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PLAIN_TURNS = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@lru_cache
def _trained() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def backend(adds_start: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 ids; adds_start: its post-processor puts <s> before a text."""
    made = tokenizers.Tokenizer.from_str(_trained())
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=True)]
    if adds_start:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    made.post_processor = processors.Sequence(steps)
    return made


def tokenizer(template: str | None = CHATML, adds_start: bool = False, eos: str = "<|im_end|>") -> Tokenizer:
    return Tokenizer(
        backend(adds_start),
        {"bos_token": "<s>", "eos_token": eos},
        {} if template is None else {"default": template},
    )


def write_directory(path: Path, template: str | None = CHATML, **config: object) -> Path:
    """A checkpoint directory with the tokenizer's files."""
    path.mkdir(parents=True, exist_ok=True)
    backend().save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "special": True}, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def trained_text(dataset: Dataset, index: int = 0) -> str:
    """The targets of a sample, decoded."""
    sample = dataset[index]
    return dataset.tokenizer.decode(sample.input_ids[sample.label_mask].tolist(), skip_special_tokens=False)


def whole_text(dataset: Dataset, index: int = 0) -> str:
    return dataset.tokenizer.decode(dataset[index].input_ids.tolist(), skip_special_tokens=False)


def role_texts(dataset: Dataset, index: int = 0) -> list[tuple[str, str]]:
    """(role, text) of each run of roles."""
    sample = dataset[index]
    decode = dataset.tokenizer.decode
    return [
        (role, decode(sample.input_ids[start:end].tolist(), skip_special_tokens=False))
        for role, start, end in sample.roles
    ]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}
