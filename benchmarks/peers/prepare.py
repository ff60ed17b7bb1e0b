"""Tokenises the data once for all peers, plans the steps, and writes one initial adapter for all of them."""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from workload import Workload, plan

from leantune.data import Tokenizer, auto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--field", action="append", default=[], metavar="COLUMN=ROLE")
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--workload", type=Path, required=True, help="file to write")
    parser.add_argument("--adapter", type=Path, required=True, help="directory to write")
    args = parser.parse_args()

    fields = dict(pair.split("=", 1) for pair in args.field) or None
    tokenizer = Tokenizer.from_directory(args.model)
    data = auto(str(args.data), tokenizer, max_length=args.max_length, fields=fields)
    given, alike = plan(data.lengths, steps=args.steps, sequences=args.sequences, seed=args.seed)
    Workload(data.input_ids, data.label_mask, data.offsets, given, alike).write(args.workload)

    torch.manual_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, lora).save_pretrained(str(args.adapter))


if __name__ == "__main__":
    main()
