"""LoRA: what it trains, what it refuses, and that others read what it writes."""

import math

import pytest
import torch

import leantune as lt


def randomise(model: lt.Model, seed: int = 0) -> None:
    """B starts at zero, which hides mistakes: give it values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in model.linears():
            if linear.lora is not None:
                linear.lora.B.copy_(torch.randn(linear.lora.B.shape, generator=generator) * 0.1)


IDS = torch.arange(2 * 40).view(2, 40) % 300


def test_initialisation_leaves_the_model_as_it_was(tiny):
    before = tiny(IDS)
    lt.LoRA(rank=8, seed=3).apply(tiny)
    assert torch.equal(tiny(IDS), before)
    lora = tiny.model.layers[0].self_attn.q_proj.lora
    size, bound = lora.A.detach().abs(), 1 / math.sqrt(lora.A.shape[1])
    assert float(size.max()) <= bound and float(size.mean()) == pytest.approx(bound / 2, rel=0.1)
    assert not lora.B.any()
    assert {n for n, p in tiny.named_parameters() if p.requires_grad} == {
        n for n, _ in tiny.named_parameters() if ".lora." in n
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_scale(rslora):
    assert lt.LoRA(rank=16, alpha=8, use_rslora=rslora).scale == (2.0 if rslora else 0.5)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["layers.0.mlp.up_proj"], 1),
        (r"model\.layers\.1\..*_proj", 7),
    ],
)
def test_targets(tiny, targets, count):
    lt.LoRA(rank=2, targets=targets).apply(tiny)
    assert sum(linear.lora is not None for linear in tiny.linears()) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 65}, "rank=65 exceeds out_features=32 of 'model.layers.0.self_attn.k_proj'; use rank <= 32"),
        ({"rank": 65, "targets": ["q_proj"]}, "rank=65 exceeds in_features=64 of 'model.layers.0.self_attn.q_proj'"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (
            {"targets": ["q_proj", "nosuch"]},
            r"targets=\['nosuch'\] match no linear layer; names are down_proj, gate",
        ),
        ({"targets": "("}, "not a valid regular expression"),
        ({"targets": "q_proj"}, "match no linear layer"),  # a string is an expression over the whole path
    ],
)
def test_impossible_settings_are_refused_and_change_nothing(tiny, settings, message):
    with pytest.raises(lt.ConfigError, match=message):
        lt.LoRA(**settings).apply(tiny)
    assert all(linear.lora is None for linear in tiny.linears())


def test_a_second_adapter_is_refused(tiny):
    lt.LoRA(rank=2).apply(tiny)
    with pytest.raises(lt.ConfigError, match="carries a LoRA adapter already"):
        lt.LoRA(rank=2).apply(tiny)


def test_a_tuple_of_targets_is_a_list(tiny, tmp_path):
    assert lt.LoRA(targets=("q_proj",)).targets == ["q_proj"]
    with pytest.raises(lt.ConfigError, match="targets="):
        lt.LoRA(targets=())


def test_a_replaced_layer_is_noticed(tiny):
    tiny.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64)
    with pytest.raises(lt.ConfigError, match=r"q_proj was replaced by a Linear; it must be a leantune.nn.Linear"):
        tiny(IDS)


def test_saving_without_an_adapter(tiny, tmp_path):
    with pytest.raises(lt.ConfigError, match="no adapter to save"):
        tiny.save_adapter(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(tiny_directory, dtype):
    model = lt.load(tiny_directory, dtype=dtype)
    lt.LoRA(rank=4).apply(model)
    randomise(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    original, apart = weight.detach().clone(), model(IDS)
    model.merge()
    assert not torch.equal(weight, original)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(IDS), apart, rtol=tolerance, atol=tolerance)
    once = weight.detach().clone()
    model.merge()  # a second time changes nothing
    assert torch.equal(weight, once)
    model.unmerge()
    assert torch.equal(weight, original)
    assert torch.equal(model(IDS), apart)


def test_few_and_many_tokens_agree(tiny):
    """Folded into the weight (many tokens) or added to the output (few): the same update."""
    lt.LoRA(rank=4).apply(tiny)
    randomise(tiny)
    ids = torch.arange(120) % 300
    together = tiny(ids[None])[0]
    for n in (1, 5, 20):
        torch.testing.assert_close(tiny(ids[None, :n])[0], together[:n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"targets": ["q_proj", "down_proj"], "alpha": 5.5}])
def test_peft_and_transformers_read_what_we_write(tiny_directory, tmp_path, settings):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = lt.load(tiny_directory)
    lt.LoRA(rank=4, **settings).apply(model)
    randomise(model)
    model.save_adapter(tmp_path / "adapter")
    model.save_merged(tmp_path / "merged")
    expected = model(IDS)

    def hf(directory):
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    adapted = peft.PeftModel.from_pretrained(hf(tiny_directory), tmp_path / "adapter")
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(hf(tmp_path / "merged")(IDS).logits, expected, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("hello world").input_ids == model.tokenizer.encode("hello world")
    again = lt.load(tmp_path / "merged")
    torch.testing.assert_close(again(IDS), expected, rtol=0, atol=1e-5)


def test_we_read_what_peft_writes(tiny_directory, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True, init_lora_weights=False,
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 9}, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "theirs")
    model = lt.load(tiny_directory)
    model.load_adapter(tmp_path / "theirs")
    expected = adapted(IDS).logits
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    model.save_adapter(tmp_path / "ours")  # and back, patterns included
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(back(IDS).logits, expected, rtol=0, atol=1e-4)


def test_a_portable_adapter_computes_the_same(tiny_directory, tmp_path):
    model = lt.load(tiny_directory)
    lt.LoRA(rank=4, use_rslora=True).apply(model)
    randomise(model)
    model.save_adapter(tmp_path / "portable", portable=True)
    again = lt.load(tiny_directory)
    again.load_adapter(tmp_path / "portable")
    assert (again.method.alpha, again.method.use_rslora) == (again.method.rank, False)
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_merged_checkpoint_is_rounded_once(tiny_directory, tmp_path):
    model = lt.load(tiny_directory)
    lt.LoRA(rank=4).apply(model)
    randomise(model)
    model.save_merged(tmp_path / "half", dtype=torch.bfloat16)
    linear = model.model.layers[0].mlp.gate_proj
    exact = linear.weight.double() + linear.lora.scale * linear.lora.B.double() @ linear.lora.A.double()
    stored = lt.load(tmp_path / "half", dtype=torch.bfloat16).model.layers[0].mlp.gate_proj.weight
    assert (stored == exact.float().to(torch.bfloat16)).float().mean() > 0.999


def test_merged_output_never_overwrites_unasked(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(lt.CheckpointError, match="out"):
            tiny.save_merged(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "precious.txt").read_text() == "x"


def test_adapter_of_another_model_is_refused(tiny_directory, tmp_path):
    from helpers_model import tiny_model

    wide = lt.load(tiny_model(tmp_path / "wide", intermediate_size=128))
    lt.LoRA(rank=2).apply(wide)
    wide.save_adapter(tmp_path / "adapter")
    model = lt.load(tiny_directory)
    with pytest.raises(lt.CheckpointError, match="belongs to another base model"):
        model.load_adapter(tmp_path / "adapter")
    assert all(linear.lora is None for linear in model.linears())
