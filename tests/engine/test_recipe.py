"""Settings of `leantune train`: where they come from, which wins, and what is refused."""

from pathlib import Path

import pytest

from leantune import recipe
from leantune.errors import ConfigError
from leantune.methods import LoRA

GIVEN = {"model": "m", "data": "d.jsonl", "out": "o"}


def toml(path: Path, text: str) -> Path:
    file = path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = "a"\ndata = "d"\nlr = 1e-3\nrank = 4\nfield = { question = "prompt" }\n')
    got = recipe.read(file, {"model": "b", "out": "o", "rank": 2}, ["weight_decay=0.1"])
    assert (got.model, got.data, got.field) == ("b", "d", {"question": "prompt"})
    assert (got.train.lr, got.train.weight_decay, got.train.eps) == (1e-3, 0.1, 1e-8)
    assert isinstance(got.tuning, LoRA) and (got.tuning.rank, got.tuning.alpha) == (2, 32.0)


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("betas=0.9,0.95", "betas", (0.9, 0.95)),
        ("max_grad_norm=none", "max_grad_norm", None),
        ("max-grad-norm = 2", "max_grad_norm", 2.0),
        ("keep=3", "keep", 3),
        ("shuffle=false", "shuffle", False),
        ("policy=full", "policy", "full"),
    ],
)
def test_set_reads_text_as_the_type_of_its_key(assignment: str, key: str, value: object) -> None:
    assert getattr(recipe.read(None, GIVEN, [assignment]).train, key) == value


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("all-linear", "all-linear"),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("re:.*mlp.*", ".*mlp.*"),
        (["k_proj"], ["k_proj"]),
    ],
)
def test_targets(given: object, targets: object) -> None:
    made = recipe.read(None, {**GIVEN, "targets": given})
    assert isinstance(made.tuning, LoRA) and made.tuning.targets == targets


def test_a_recipe_comes_back_from_its_file(tmp_path: Path) -> None:
    assignments = ["max_grad_norm=none", "use_rslora=true", "betas=0.8,0.9", "eps=1e-12", "train_on=last"]
    flags = {
        **GIVEN,
        "data": 'odd "name"\\\n\x7fé.jsonl',
        "field": ["a = b=prompt", "c=completion"],
        "targets": r"re:.*\.q_proj",
        "batch_size": 3,
        "shuffle": False,
        "dtype": "bfloat16",
    }
    made = recipe.read(None, flags, assignments)
    assert made.field == {"a = b": "prompt", "c": "completion"}
    assert recipe.read(toml(tmp_path, made.to_toml()), {}) == made


def test_a_recipe_with_an_adapter_comes_back_from_its_file(tmp_path: Path) -> None:
    made = recipe.read(None, {**GIVEN, "adapter": "a", "seed": 3})
    assert made.tuning is None
    assert recipe.read(toml(tmp_path, made.to_toml()), {}) == made


@pytest.mark.parametrize(
    ("flags", "assignments", "message"),
    [
        ({"rank": 0}, [], "rank=0 must be at least 1"),
        ({"lr": -1.0}, [], "lr=-1.0 must be a positive number"),
        ({"epochs": 0}, [], "epochs=0 must be at least 1"),
        ({"dtype": "int8"}, [], "dtype='int8' is unknown; use float32"),
        ({"method": "lore"}, [], "method='lore' is unknown; use full, lora"),
        ({"method": "full", "rank": 4}, [], "rank is no setting of method='full'"),
        ({"method": "full", "merge": True}, [], "merge=true is for adapters"),
        ({"method": "full", "adapter": "a"}, [], "adapter goes on with an adapter"),
        ({"adapter": "a", "rank": 4}, [], "rank is fixed by the adapter"),
        ({"field": ["question"]}, [], "must be COLUMN=NAME"),
        ({"targets": ""}, [], "targets='' must be text"),
        ({}, ["weight_decay"], "has no value; write --set weight_decay=VALUE"),
        ({}, ["keep=two"], "--set keep='two' must be a whole number"),
        ({}, ["betas=0.9"], "betas='0.9' must be 2 numbers"),
        ({}, ["wieght_decay=1"], r"--set unknown key 'wieght_decay' \(did you mean weight_decay.*keys are accum"),
        ({"lr": 1.0}, ["lr=2"], "lr is given twice"),
        ({}, ["eps=1", "eps=2"], "eps is given twice"),
        ({}, ["use_rslora=1"], "use_rslora='1' must be true or false"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, object], assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.read(None, {**GIVEN, **flags}, assignments)


@pytest.mark.parametrize("missing", GIVEN)
def test_a_missing_setting_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing} is missing; give --{missing}"):
        recipe.read(None, {k: v for k, v in GIVEN.items() if k != missing})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size = 3", r"run.toml: unknown key 'bach_size' \(did you mean batch_size"),
        ("batch-size = 3", r"run.toml: unknown key 'batch-size' \(did you mean batch_size"),
        ("[train]\nlr = 3", "run.toml: unknown key 'train'"),
        ("lr = true", "run.toml: lr=True must be a number"),
        ("epochs = 1.5", "run.toml: epochs=1.5 must be a whole number or none"),
        ("shuffle = 1", "run.toml: shuffle=1 must be true or false"),
        ("model = 3", "run.toml: model=3 must be text"),
        ("field = { question = 3 }", "run.toml: field=.* must be COLUMN=NAME"),
        ("targets = [3]", "run.toml: targets=.* must be text"),
        ("betas = 1", "run.toml: betas=1 must be 2 numbers"),
        ("lr = ", "run.toml: not a TOML file"),
        ('model = "a"', r"data is missing; give --data, or data = \.\.\. in .*run.toml"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.read(toml(tmp_path, text), {})


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml: No such file"):
        recipe.read(tmp_path / "none.toml", {})
