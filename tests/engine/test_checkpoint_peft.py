"""Adapters between leantune and PEFT, both ways, and what must be refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from leantune.checkpoint.peft import AdapterFile, as_portable, load_adapter, save_adapter, write_lora_adapter
from leantune.errors import CheckpointError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NEEDED_KEYS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
}
IDS = torch.arange(12).view(2, 6)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def base_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def random_pairs(ranks: dict[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) for the modules of the model whose path ends with a key of `ranks`, or is one."""
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for path, module in base_model().named_modules():
        for suffix, rank in ranks.items():
            if path == suffix or path.endswith(f".{suffix}"):
                a = torch.randn(rank, module.in_features, generator=generator)
                pairs[path] = (a, torch.randn(module.out_features, rank, generator=generator))
                break
    return pairs


def write(directory: Path, modules: dict[str, tuple[torch.Tensor, torch.Tensor]], **edits: Any) -> Path:
    arguments: dict[str, Any] = {
        "rank": 4,
        "alpha": 8,
        "use_rslora": False,
        "dropout": 0.1,
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "org/name",
    }
    write_lora_adapter(directory, modules=modules, **(arguments | edits))
    return directory


def peft_logits(directory: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(base_model(), directory)
    with torch.no_grad():
        return model(IDS).logits


def our_logits(adapter: AdapterFile) -> torch.Tensor:
    """The base model with scale * B A added to the weights, as an engine would merge."""
    model = base_model()
    with torch.no_grad():
        for path, pair in adapter.tensors.items():
            delta = pair["lora_B"] @ pair["lora_A"]
            model.get_parameter(f"{path}.weight").add_(adapter.scale_for(path) * delta)
        return model(IDS).logits


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"ranks": {"q_proj": 4, "down_proj": 4}},
    "rslora": {"ranks": {"q_proj": 4, "down_proj": 4}, "use_rslora": True},
    "fractional alpha": {"ranks": {"q_proj": 4, "down_proj": 4}, "alpha": 2.5},
    "patterns": {
        "ranks": {"layers.0.self_attn.q_proj": 2, "q_proj": 4, "down_proj": 3},
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 3, "q_proj": 4},
        "alpha_pattern": {r"model.layers.\d+.mlp.down_proj": 32},
        "use_rslora": True,
    },
    "targets by expression": {
        "ranks": {"model.layers.1.self_attn.v_proj": 4},
        "target_modules": r"model\.layers\.1\..*v_proj",
    },
    "head": {"ranks": {"lm_head": 4}, "target_modules": ["lm_head"]},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_peft_computes_the_same_from_what_we_write(tmp_path: Path, variant: dict[str, Any]) -> None:
    options = dict(variant)
    write(tmp_path / "out", random_pairs(options.pop("ranks")), **options)
    expected = our_logits(load_adapter(tmp_path / "out"))
    assert (expected - base_model()(IDS).logits).abs().max() > 0.01, "the adapter does nothing"
    torch.testing.assert_close(peft_logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)
    save_adapter(tmp_path / "portable", as_portable(load_adapter(tmp_path / "out")))
    torch.testing.assert_close(peft_logits(tmp_path / "portable"), expected, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "portable" / "adapter_config.json").read_text()).keys() == NEEDED_KEYS


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(gate|up)_proj", "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"target_modules": ["k_proj"], "alpha_pattern": {r".*0.*k_proj": 3, "k_proj": 5}},
        {"target_modules": ["o_proj"], "init_lora_weights": "gaussian", "layers_to_transform": [1]},
    ],
)
def test_we_compute_the_same_from_what_peft_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base_model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(our_logits(load_adapter(tmp_path)), expected, rtol=0, atol=1e-4)


def test_only_the_keys_and_names_that_every_release_knows(tmp_path: Path) -> None:
    write(tmp_path / "a", random_pairs({"q_proj": 4}), alpha=32.0)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config.keys() == NEEDED_KEYS
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    assert config["inference_mode"] is True and config["fan_in_fan_out"] is False
    assert type(config["lora_alpha"]) is int and config["lora_alpha"] == 32
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert names(tmp_path / "a") == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == [
            f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
            for layer in (0, 1)
            for part in "AB"
        ]
    write(
        tmp_path / "b",
        random_pairs({"q_proj": 4}),
        use_rslora=True,
        alpha_pattern={"q_proj": 9},
        rank_pattern={"v": 2},
    )
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config.keys() - NEEDED_KEYS == {"use_rslora", "alpha_pattern", "rank_pattern"}


def test_first_hit_of_a_pattern_wins_and_needs_a_whole_name() -> None:
    config = {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q": 1, "a.q_proj": 2, "q_proj": 3},
        "alpha_pattern": {"v.*": 5},
    }
    adapter = AdapterFile(config, {})
    assert [adapter.rank_for(m) for m in ("x.a.q_proj", "x.ba.q_proj", "q_proj", "x.k")] == [2, 3, 3, 8]
    assert [adapter.alpha_for(m) for m in ("x.v_proj", "xv", "k")] == [5, 16, 16]
    assert adapter.scale_for("q_proj") == 16 / 3
    assert AdapterFile(config | {"use_rslora": True}, {}).scale_for("x") == 16 / 8**0.5


def test_misreadings_of_other_loaders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="leantune"):
        write(tmp_path / "plain", random_pairs({"q_proj": 4}))
        assert caplog.text == ""
        write(
            tmp_path / "b",
            random_pairs({"q_proj": 4}),
            use_rslora=True,
            alpha_pattern={"a": 1},
            rank_pattern={"b": 1},
        )
    assert all(word in caplog.text for word in ("use_rslora", "alpha_pattern", "rank_pattern", "vLLM", "llama.cpp"))


def test_portable_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT reads the same products from the portable form; nothing in it is left for a loader to misread."""
    options = dict(VARIANTS["patterns"])
    modules = random_pairs(options.pop("ranks"))
    write(tmp_path / "plain", modules, **options)
    caplog.clear()
    write(tmp_path / "portable", modules, **options, portable=True)
    assert caplog.text == ""
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config.keys() == NEEDED_KEYS and config["r"] == config["lora_alpha"] == 4
    deltas = [
        {
            name: module.get_delta_weight("default")
            for name, module in peft.PeftModel.from_pretrained(base_model(), tmp_path / form).named_modules()
            if hasattr(module, "get_delta_weight")
        }
        for form in ("plain", "portable")
    ]
    assert len(deltas[0]) == len(modules)
    torch.testing.assert_close(deltas[0], deltas[1])
    with pytest.raises(CheckpointError, match="r=0 must be a positive integer"):
        write(tmp_path / "none", modules, rank=0, portable=True)
    with pytest.raises(CheckpointError, match="the adapter has no tensors"):
        write(tmp_path / "none", {}, portable=True)


def test_existing_directory(tmp_path: Path) -> None:
    write(tmp_path / "a", random_pairs({"q_proj": 4}), alpha=1)
    with pytest.raises(CheckpointError, match="--overwrite"):
        write(tmp_path / "a", random_pairs({"q_proj": 4}), alpha=2)
    assert load_adapter(tmp_path / "a").config["lora_alpha"] == 1
    write(tmp_path / "a", random_pairs({"q_proj": 4}), alpha=2, overwrite=True)
    assert load_adapter(tmp_path / "a").config["lora_alpha"] == 2


@pytest.mark.parametrize(
    "edits, message",
    [
        (
            {"target_modules": ["v_proj"]},
            r"target_modules=\['v_proj'\] does not match 'model.layers.0.self_attn.q_proj'",
        ),
        ({"target_modules": "q_proj"}, "PEFT would ignore its tensors"),
        ({"target_modules": "all-linear"}, "PEFT would ignore its tensors"),
        (
            {"rank": 8},
            r"'model.layers.0.self_attn.q_proj' has lora_A \[4, 16\] and lora_B \[16, 4\], but .* rank 8",
        ),
        ({"rank": 0}, "r=0 must be a positive integer"),
        ({"alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern key '\(' is no regular expression"),
        ({"modules": {}}, "the adapter has no tensors"),
    ],
)
def test_what_is_not_written(tmp_path: Path, edits: dict[str, Any], message: str) -> None:
    options = {"modules": random_pairs({"q_proj": 4})} | edits
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "a", options.pop("modules"), **options)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "edits, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not read"),
        ({"peft_type": None}, "peft_type=None is not read"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices=.* is not supported"),
        ({"target_parameters": ["experts.up"]}, "target_parameters=.* is not supported"),
        ({"key_of_the_future": 3}, "key_of_the_future=3 is not supported"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4' changes the base weights",
        ),
        ({"r": "4"}, "r='4' must be a positive integer"),
        ({"r": True}, "r=True must be a positive integer"),
        ({"lora_alpha": None}, "lora_alpha=None must be a finite number"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1 must be a positive integer"),
        ({"lora_alpha": 10**400}, "lora_alpha=10+ must be a finite number"),
        ({"lora_alpha": "32"}, "lora_alpha='32' must be a finite number"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1' must be a finite number"),
        ({"lora_dropout": None}, "lora_dropout=None must be a finite number"),
        ({"lora_dropout": 1}, "lora_dropout=1 must be at least 0 and less than 1"),
        ({"use_rslora": "no"}, "use_rslora='no' must be true or false"),
        ({"target_modules": None}, "target_modules=None must be the names"),
        ({"target_modules": []}, r"target_modules=\[\] must be the names"),
        ({"target_modules": ["q_proj", 3]}, r"target_modules=\['q_proj', 3\] must be the names"),
        ({"target_modules": {"q_proj": 1}}, "target_modules={'q_proj': 1} must be the names"),
        ({"target_modules": "q_proj("}, r"target_modules='q_proj\(' is no regular expression"),
        ({"target_modules": "a{99999999999999999999}"}, "target_modules='a.*' is no regular expression"),
        ({"alpha_pattern": {"(?i)q": 1}}, "alpha_pattern key .* is no regular expression"),
        ({"rank_pattern": [4]}, r"rank_pattern=\[4\] must map module names to numbers"),
        ({"rank_pattern": {"q_proj": 5}}, "the config gives rank 5"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, edits: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a", random_pairs({"q_proj": 4})) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(path.parent)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_keys_that_must_be_there(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a", random_pairs({"q_proj": 4})) / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {key}=None"):
        load_adapter(path.parent)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (f"{Q0}.lora_A.weight", None, f"{Q0}.lora_A.weight is missing"),
        (f"{Q0}.lora_B.weight", None, f"{Q0}.lora_B.weight is missing"),
        (f"{Q0}.lora_A.weight", torch.ones(3, 16), r"lora_A \[3, 16\] and lora_B \[16, 4\]"),
        (f"{Q0}.lora_B.weight", torch.ones(16), r"lora_B of .* is \[16\] torch.float32, not a matrix"),
        (f"{Q0}.lora_A.weight", torch.ones(4, 16).int(), "torch.int32, not a matrix of floating-point"),
        (f"{Q0}.lora_A.default.weight", torch.ones(4, 16), "unexpected tensor '.*lora_A.default.weight'"),
        (
            "base_model.model.lm_head.weight",
            torch.ones(1),
            "unexpected tensor 'base_model.model.lm_head.weight'",
        ),
        ("base_model.model.embed.lora_embedding_A", torch.ones(1), "unexpected tensor '.*lora_embedding_A'"),
        (f"{Q0}.lora_magnitude_vector", torch.ones(1), "unexpected tensor '.*lora_magnitude_vector'"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    path = write(tmp_path / "a", random_pairs({"q_proj": 4})) / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    tensors |= {name: tensor} if tensor is not None else {}
    save_file({key: value for key, value in tensors.items() if tensor is not None or key != name}, path)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(path.parent)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter directory .*nowhere does not exist"):
        load_adapter(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path)
    folder = write(tmp_path / "a", random_pairs({"q_proj": 4}))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        load_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"a pickle, which can run code .*save_pretrained"):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not valid JSON"):
        load_adapter(folder)
