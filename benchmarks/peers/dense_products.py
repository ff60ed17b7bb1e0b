"""The step's dense products alone: what any implementation has to compute, and nothing else.

For every frozen linear layer the forward and the input-gradient product at the step's real token count, and
the vocabulary product forth and back on the rows that carry a label; `torch.mm` into buffers allocated
beforehand. Each is timed right after the engine took the same step, as the machine's speed drifts.
"""

import json
import time
from pathlib import Path

import torch
from leantune_run import build_trainer
from workload import Report, Workload, peer_arguments

VOCABULARY_ROWS = 256  # logits of so many rows at a time, as the engine does


def linear_shapes(config: dict) -> list[tuple[int, int]]:
    """(out_features, in_features) of a Llama layer's q, k, v, o, gate, up and down."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]


class DenseProducts:
    """Weights of the model's shapes, each with its own memory, and buffers for the largest step."""

    def __init__(self, config: dict, max_tokens: int) -> None:
        shapes = linear_shapes(config)
        self.layers = [[torch.randn(shape) for shape in shapes] for _ in range(config["num_hidden_layers"])]
        self.head = torch.randn(config["vocab_size"], config["hidden_size"])
        widths = {width for shape in shapes for width in shape}
        self.inputs = {width: torch.randn(max_tokens, width) for width in widths}
        self.outputs = {width: torch.empty(max_tokens, width) for width in widths}
        self.logits = torch.randn(VOCABULARY_ROWS, config["vocab_size"])

    @torch.no_grad()
    def step(self, tokens: int, label_tokens: int) -> None:
        for layer in self.layers:
            for weight in layer:
                self._product(weight.T, tokens)
        for start in range(0, label_tokens, VOCABULARY_ROWS):
            rows = min(VOCABULARY_ROWS, label_tokens - start)
            hidden = self.head.shape[1]
            torch.mm(self.inputs[hidden][:rows], self.head.T, out=self.logits[:rows])
            torch.mm(self.logits[:rows], self.head, out=self.outputs[hidden][:rows])
        for depth, layer in reversed(list(enumerate(self.layers))):
            # Nothing below the first layer's q, k and v is trained, so their input gradient is not needed.
            for weight in layer if depth else layer[3:]:
                self._product(weight, tokens)

    def _product(self, weight: torch.Tensor, tokens: int) -> None:
        width_in, width_out = weight.shape
        torch.mm(self.inputs[width_in][:tokens], weight, out=self.outputs[width_out][:tokens])


def main() -> None:
    args = peer_arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    config = json.loads((Path(args.model) / "config.json").read_text(encoding="utf-8"))
    work, report = Workload.read(args.workload), Report(args.peer)
    for indices in getattr(work, args.order):
        report.count(work.batch(indices))
    trainer = build_trainer(args, work, policy="selective")
    products = DenseProducts(config, max(report.tokens))
    for number, (tokens, label_tokens) in enumerate(zip(report.tokens, report.label_tokens, strict=True)):
        start = time.perf_counter()
        trainer.fit(max_steps=number + 1)
        report.engine_seconds.append(time.perf_counter() - start)
        with report.timed():
            products.step(tokens, label_tokens)
    report.print()


if __name__ == "__main__":
    main()
