"""The engine through its public interface: samples, order, adapter and hyperparameters as for the others."""

import argparse

import numpy as np
import torch
from workload import Report, Workload, peer_arguments

import leantune as lt
from leantune.data.dataset import Dataset, Draft, assemble


def dataset(work: Workload, order: np.ndarray, tokenizer: lt.data.Tokenizer) -> Dataset:
    """The samples of `order` [steps, sequences], in that order."""
    drafts = []
    for number, index in enumerate(order.reshape(-1)):
        ids, mask = work.sample(int(index))
        roles = np.zeros(len(ids), dtype=np.uint8)
        drafts.append(Draft(ids, mask, roles, number, truncated=False))
    return assemble(drafts, tokenizer, ["sample"], ("workload", False), unlabelled=0, dropped=0)


def build_trainer(args: argparse.Namespace, work: Workload, policy: str) -> lt.Trainer:
    """A trainer whose n-th step is the n-th of the order asked for."""
    model = lt.load(args.model, dtype=torch.float32)
    model.load_adapter(args.adapter)
    order = getattr(work, args.order)
    return lt.Trainer(
        model,
        dataset(work, order, model.tokenizer),
        lr=args.lr,
        schedule="constant",
        batch_size=order.shape[1],
        shuffle=False,
        weight_decay=0.0,
        max_grad_norm=1.0,
        policy=policy,
        progress=False,
    )


def main() -> None:
    parser = peer_arguments(__doc__)
    parser.add_argument("--policy", default="selective", help="what the layers keep for the backward pass")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    work, report = Workload.read(args.workload), Report(args.peer)
    trainer = build_trainer(args, work, args.policy)
    for step, indices in enumerate(getattr(work, args.order), start=1):
        report.count(work.batch(indices))
        with report.timed():
            trainer.fit(max_steps=step)  # counts from the start of the run, so this is one step
        report.losses.append(trainer.history[-1].loss)
    if [log.tokens for log in trainer.history] != report.tokens:
        raise SystemExit("the engine's batches are not those of the workload")
    report.print()


if __name__ == "__main__":
    main()
