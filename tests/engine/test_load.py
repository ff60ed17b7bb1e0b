"""Loading: every way a checkpoint can be wrong gives an error that names the thing and the fix."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import leantune as lt
from leantune.models import families


@pytest.fixture
def broken(tiny_directory, tmp_path):
    """A copy of the tiny model to damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for source in tiny_directory.iterdir():
        (copy / source.name).write_bytes(source.read_bytes())
    return copy


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            f"model_type='mamba' is not supported; leantune loads {', '.join(families())}",
        ),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_act": "tanhshrink"}, "hidden_act='tanhshrink' is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive integer"),
        ({"num_attention_heads": "4", "head_dim": None}, "num_attention_heads='4' must be a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a positive integer"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"vocab_size": -1}, "vocab_size=-1 must be a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        (
            {"intermediate_size": 97},
            r"gate_proj.weight has shape \[96, 64\], config.json asks for \[97, 64\]",
        ),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.*and 6 more"),
        ({"num_hidden_layers": 1}, r"model.layers.1.* is not part of a llama model"),
        ({"attention_bias": True}, r"lacks model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_config_that_is_wrong_or_disagrees_with_the_tensors(broken, changes, message):
    edit_config(broken, **changes)
    with pytest.raises(lt.LeantuneError, match=message):
        lt.load(broken)


def test_untied_without_a_head(broken):
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    edit_config(broken, tie_word_embeddings=False)
    with pytest.raises(lt.CheckpointError, match="lacks lm_head.weight; if head and embedding are shared"):
        lt.load(broken)


def test_a_quantised_tensor(broken):
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(lt.CheckpointError, match=r"up_proj.weight is stored as torch.int8; quantised"):
        lt.load(broken)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_truncated_or_empty_file(broken, name):
    whole = (broken / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", None):
        if content is None:
            (broken / name).unlink()
        else:
            (broken / name).write_bytes(content)
        with pytest.raises(lt.CheckpointError, match=name if name in ("config.json",) else "safetensors"):
            lt.load(broken)


def test_no_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    model = lt.load(broken)  # logits need none
    assert model(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, model.config.vocab_size)
    with pytest.raises(lt.DataError, match=r"tokenizer.json"):
        lt.data.chat([{"prompt": "a", "completion": "b"}], model.tokenizer)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(lt.CheckpointError, match="nothing-here"):
        lt.load(tmp_path / "nothing-here")


def test_dtype_and_device_are_checked(tiny_directory):
    for dtype in (torch.int8, "int8"):
        with pytest.raises(lt.ConfigError, match=r"dtype=.*int8 is not supported; use one of float32, bfloat16"):
            lt.load(tiny_directory, dtype=dtype)
    assert lt.load(tiny_directory, dtype="bfloat16").model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(lt.ConfigError, match="sees no CUDA device"):
            lt.load(tiny_directory, device="cuda")


def test_weights_stay_in_the_file(tiny_directory):
    """fp32 weights of an fp32 checkpoint are windows on the mapped file, not copies."""
    model = lt.load(tiny_directory)
    address = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    with open("/proc/self/maps") as maps:
        inside = [
            line for line in maps
            if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
        ]  # fmt: skip
    assert "model.safetensors" in inside[0]


def test_the_old_rope_fields_are_read(broken):
    edit_config(broken, rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    rope = lt.load(broken).config.rope
    assert (rope.theta, rope.kind, rope.factor) == (5000.0, "linear", 2.0)
