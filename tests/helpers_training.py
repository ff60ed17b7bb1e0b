"""Small data, small adapters and small runs, for the tests that train."""

import torch

import leantune as lt

WORDS = [
    "the",
    "answer",
    "is",
    "four",
    "hello",
    "world",
    "how",
    "are",
    "you",
    "today",
    "system",
    "user",
    "assistant",
    "prompt",
]


def records(count: int, seed: int = 0) -> list[dict]:
    """Questions and answers of very different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator))

    return [{"prompt": words(1 + 3 * (i % 5)), "completion": words(1 + 7 * (i % 4))} for i in range(count)]


def prepared(directory, dropout: float = 0.0, rank: int = 4) -> lt.Model:
    model = lt.load(directory)
    lt.LoRA(rank=rank, dropout=dropout).apply(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for linear in model.linears():
            linear.lora.B.copy_(torch.randn(linear.lora.B.shape, generator=generator) * 0.02)
    return model


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trainer(model, data, **settings) -> lt.Trainer:
    defaults = {"lr": 5e-3, "batch_size": 4, "progress": False, "schedule": "constant"}
    return lt.Trainer(model, data, **(defaults | settings))


def padded(samples) -> dict[str, torch.Tensor]:
    """The batch as Hugging Face takes it."""
    shape = (len(samples), max(len(s) for s in samples))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, s in enumerate(samples):
        n = len(s)
        ids[row, :n], mask[row, :n] = torch.from_numpy(s.input_ids).long(), 1
        labels[row, :n] = torch.where(torch.from_numpy(s.label_mask), ids[row, :n], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
