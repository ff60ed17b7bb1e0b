"""Hugging Face + PEFT as its users run it: padded batches, the model's own loss, AdamW as it comes.

Or tuned by hand (`--tuned`): vocabulary product on label tokens only, fused AdamW; wants batches of like
length.
"""

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM
from workload import Report, Workload, peer_arguments

IGNORED = -100


def padded(batch: list[tuple[np.ndarray, np.ndarray]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, int64 [sequences, longest], padded on the right."""
    longest = max(len(ids) for ids, _ in batch)
    shape = (len(batch), longest)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (ids, mask) in enumerate(batch):
        tokens = torch.from_numpy(ids.astype(np.int64))
        input_ids[row, : len(ids)] = tokens
        labels[row, : len(ids)] = torch.where(torch.from_numpy(mask), tokens, IGNORED)
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def label_row_loss(model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same mean loss, with the vocabulary product only for rows that predict a label."""
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    targets = inputs["labels"][:, 1:]
    rows = targets != IGNORED
    logits = causal_lm.lm_head(hidden.last_hidden_state[:, :-1][rows])
    return F.cross_entropy(logits, targets[rows])


def main() -> None:
    parser = peer_arguments(__doc__)
    parser.add_argument("--tuned", action="store_true", help="the hand-tuned variant")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers in the backward")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    base.config.use_cache = False
    if args.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.0, fused=args.tuned or None)
    pad_id = base.config.pad_token_id or 0

    work, report = Workload.read(args.workload), Report(args.peer)
    for indices in getattr(work, args.order):
        batch = work.batch(indices)
        report.count(batch)
        with report.timed():
            inputs = padded(batch, pad_id)
            loss = label_row_loss(model, inputs) if args.tuned else model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report.losses.append(loss.item())
    report.print()


if __name__ == "__main__":
    main()
