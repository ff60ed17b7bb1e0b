"""The engine computes what transformers computes: logits, loss and every gradient, over the whole config space."""

import random

import pytest
import torch

import leantune as lt
from leantune.nn.decoder import IGNORED

transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")

TOLERANCE = 1e-4


def random_config(seed: int) -> dict:
    """Every field of LlamaConfig that changes the computation takes each of its kinds of values over the seeds."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    head_dim = draw.choice([4, 6, 8, 16])
    theta = draw.choice([100.0, 10000.0, 500000.0])
    ropes = [
        {"rope_type": "default", "rope_theta": theta},
        {"rope_type": "linear", "rope_theta": theta, "factor": draw.choice([2.0, 3.5])},
        {"rope_type": "llama3", "rope_theta": theta, "factor": 8.0, "low_freq_factor": draw.choice([1.0, 1.5]),
         "high_freq_factor": 4.0, "original_max_position_embeddings": draw.choice([16, 64])},
    ]  # fmt: skip
    return {
        "vocab_size": draw.choice([67, 128, 301]),
        "hidden_size": heads * draw.choice([8, 10]),
        "intermediate_size": draw.choice([31, 48, 64]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": draw.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new"]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-2]),
        "max_position_embeddings": 256,
        "tie_word_embeddings": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "rope_parameters": ropes[seed % 3],
        "initializer_range": 0.2,  # large weights: an error in any part shows in the logits
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def reference(tmp_path, seed: int, **saving):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**random_config(seed))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # biases and norm weights start at 0 and 1, where mistakes hide
                p.add_(torch.randn_like(p) * 0.3)
                assert "norm" in name or "bias" in name
    model.save_pretrained(tmp_path, **saving)
    return model


@pytest.mark.parametrize("seed", range(18))
def test_logits_and_gradients_match_transformers(tmp_path, seed):
    hf = reference(tmp_path, seed)
    model = lt.load(tmp_path)
    torch.manual_seed(seed + 1)
    ids = torch.randint(0, model.config.vocab_size, (2, 37))
    torch.testing.assert_close(model(ids), hf(ids).logits, rtol=0, atol=TOLERANCE)

    labels = ids.clone()
    labels[:, : 5 + seed] = IGNORED
    expected = hf(ids, labels=labels).loss
    expected.backward()
    lt.Full().apply(model)
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    packed = model.packed(torch.tensor([0, 37, 74], dtype=torch.int32), torch.arange(37).repeat(2))
    loss = model.loss_sum(ids.flatten(), targets.flatten(), packed) / int((targets != IGNORED).sum())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    theirs = dict(hf.named_parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(
            p.grad, theirs[name].grad, rtol=1e-3, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("policy", ["all", "full"])
def test_policies_give_the_same_bits(tmp_path, policy):
    reference(tmp_path, 0)
    results = []
    for kept in ("selective", policy):
        model = lt.load(tmp_path)
        lt.LoRA(rank=4).apply(model)
        for linear in model.linears():
            torch.nn.init.normal_(linear.lora.B, generator=torch.Generator().manual_seed(0))
        model.policy = kept
        ids = torch.arange(60) % model.config.vocab_size
        packed = model.packed(torch.tensor([0, 20, 60], dtype=torch.int32), torch.arange(60) % 20)
        model.loss_sum(ids, ids.roll(-1), packed).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_packed_equals_one_by_one(tiny):
    """No sequence sees another, positions restart: packing changes no logit."""
    lengths = [1, 7, 20, 3]
    ids = torch.arange(sum(lengths)) * 7 % tiny.config.vocab_size
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        together = tiny.head(tiny.hidden(ids, tiny.packed(cu, positions)))
        for i, n in enumerate(lengths):
            alone = tiny(ids[cu[i] : cu[i + 1]][None])[0]
            torch.testing.assert_close(together[cu[i] : cu[i + 1]], alone, rtol=1e-5, atol=1e-5, msg=f"length {n}")


def test_sharded_bf16_checkpoint(tmp_path):
    hf = reference(tmp_path, 4).to(torch.bfloat16)
    directory = tmp_path / "sharded"
    hf.save_pretrained(directory, max_shard_size="3KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    ids = torch.arange(30)[None]
    expected = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    for dtype in (None, torch.bfloat16):  # widened at load, or kept narrow and widened when used
        model = lt.load(directory, dtype=dtype)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == (dtype or torch.float32)
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=TOLERANCE)


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n",
    "Überraschung: 3.14159 × 2 = 🙂",
    "a",
]


def test_real_model_logits(real_model_directory):
    model = lt.load(real_model_directory)
    hf = transformers.AutoModelForCausalLM.from_pretrained(real_model_directory, dtype=torch.float32)
    for prompt in PROMPTS:
        ids = torch.tensor([model.tokenizer.encode(prompt)])
        with torch.no_grad():
            torch.testing.assert_close(model(ids), hf(ids).logits, rtol=0, atol=TOLERANCE)


def test_generation_is_greedy_transformers(real_model_directory):
    model = lt.load(real_model_directory)
    hf = transformers.AutoModelForCausalLM.from_pretrained(real_model_directory, dtype=torch.float32)
    ids = model.tokenizer.encode("Water boils at")
    theirs = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=10, repetition_penalty=1.0)
    pieces = []
    mine = lt.generate(model, "Water boils at", max_new_tokens=10, on_text=pieces.append)
    assert mine == model.tokenizer.decode(theirs[0, len(ids) :].tolist())
    assert "".join(pieces) == mine
