"""The demo: SmolLM2-135M-Instruct learns to answer questions about Python's standard library.

It takes a few minutes on two CPU cores; then the result is ready for another tool.

    make demo                                       or
    python examples/demo/run.py [--steps 60] [--check]

Leaves in `runs/demo/`: `adapter/` (PEFT layout), `merged/` (Hugging Face layout), `metrics.jsonl`,
`loss_curve.png` and `demo.json` (losses and answers, before and after).
"""

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path

import build_data
import torch
from fetch_model import DEFAULT_OUT, FetchError, fetch_model
from rich.console import Console
from rich.table import Table
from rich.text import Text

import leantune as lt
from leantune.errors import LeantuneError

SEQUENCES = 16  # a step
EVAL_TOKENS = 2048  # a batch
SHOWN = ("collections.OrderedDict.move_to_end", "shlex.shlex.push_token")  # the first that is held out
SUMMARY = "demo.json"  # also tells a directory of the demo from any other

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_OUT, help="fetched if absent (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="replaced (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help=f"of {SEQUENCES} samples each (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with transformers and peft at the end")
    args = parser.parse_args()
    try:
        demo(args.model, args.out, steps=args.steps)
        if args.check:
            check_interop(args.model, args.out)
    except (FetchError, LeantuneError) as error:
        raise SystemExit(f"demo: {error}") from None


def demo(model_path: Path, out: Path, *, steps: int) -> None:
    start = time.perf_counter()
    console.rule("[bold]1. Model and data")
    clear(out)
    fetch_model(model_path)
    train_path, held_out_path = build_data.write(out.with_name(out.name + "-data"))
    model = lt.load(model_path)
    train = lt.data.chat(str(train_path), model.tokenizer)
    held_out = lt.data.chat(str(held_out_path), model.tokenizer)

    console.rule("[bold]2. Before")
    console.print("measuring the held-out loss and asking a question, then training: about three minutes on two cores")
    shown = pick(held_out_path)
    loss_before, answer_before = measure(model, held_out, shown["prompt"])

    console.rule("[bold]3. Fine-tuning with LoRA")
    lt.LoRA(rank=16, alpha=32).apply(model)
    trainer = lt.Trainer(model, train, lr=5e-4, warmup=5, batch_size=SEQUENCES, out=out)
    trainer.fit(max_steps=steps)

    console.rule("[bold]4. After")
    loss_after, answer_after = measure(model, held_out, shown["prompt"])
    model.save_adapter(out / "adapter")
    model.save_merged(out / "merged")

    summary = {
        "held_out_loss": {"before": loss_before, "after": loss_after},
        "question": shown["prompt"],
        "answer": {"before": answer_before, "after": answer_after, "documentation": shown["completion"]},
        "seconds": round(time.perf_counter() - start, 1),
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_summary(summary, out)


def clear(out: Path) -> None:
    """Makes `out` an empty directory marked as the demo's; replaces an earlier demo's and nothing else."""
    if out.exists() and any(out.iterdir()):
        if not (out / SUMMARY).is_file():
            raise LeantuneError(f"--out {out} exists and is not a demo's directory; choose another")
        console.print(f"replacing {out}, left by an earlier demo")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY).write_text("{}\n", encoding="utf-8")


def pick(held_out_path: Path) -> dict[str, str]:
    """The held-out question to show: a familiar one where this Python's library has it, else the first."""
    records = [json.loads(line) for line in held_out_path.read_text(encoding="utf-8").splitlines()]
    familiar = (record for name in SHOWN for record in records if f"`{name}(" in record["prompt"])
    return next(familiar, records[0])


def measure(model: lt.Model, held_out: lt.data.Dataset, question: str) -> tuple[float, str]:
    """Held-out loss (nats per label token) and the answer to one question, decoded greedily."""
    loss = lt.evaluate(model, held_out, batch_tokens=EVAL_TOKENS).loss
    answer = lt.generate(model, [{"role": "user", "content": question}], max_new_tokens=64)
    console.print(f"held-out loss: [bold]{loss:.4f}[/bold]")
    return loss, answer.strip()


def print_summary(summary: dict, out: Path) -> None:
    loss, answer = summary["held_out_loss"], summary["answer"]
    table = Table(title=Text(summary["question"]), show_lines=True)
    for name in ("", "before", "after"):
        table.add_column(name, overflow="fold")
    table.add_row("held-out loss", f"{loss['before']:.4f}", f"[bold]{loss['after']:.4f}[/bold]")
    table.add_row("answer", Text(answer["before"]), Text(answer["after"]))
    console.print(table)
    console.print(f"documentation: {answer['documentation']}", highlight=False, markup=False)
    console.print(f"took {summary['seconds']:.0f} s; everything is in {out}/")
    console.rule("[bold]Use it in another tool")
    merged, adapter = out / "merged", out / "adapter"
    console.print(
        f"""\
# from this directory, with .venv/bin/python: transformers, the merged model
from transformers import pipeline
chat = pipeline("text-generation", model="{merged}")
print(chat([{{"role": "user", "content": "What does `heapq.merge(*iterables)` do in Python?"}}]))

# peft, the adapter on its base model
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")

# leantune
.venv/bin/leantune generate --model {merged} --prompt 'What does `heapq.merge(*iterables)` do in Python?'
""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@torch.no_grad()
def check_interop(model_path: Path, out: Path) -> None:
    """Loads both results with transformers and peft and compares logits with the engine's (fp32)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between these two libraries, of no use to a user
    console.rule("[bold]Check")
    ours = lt.load(out / "merged")
    ids = torch.tensor([AutoTokenizer.from_pretrained(out / "merged")("def merge(*iterables): ...").input_ids])
    expected = ours(ids)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    for name, other in (("transformers, merged model", merged), ("peft, adapter", adapted)):
        difference = (other(ids).logits - expected).abs().max().item()
        if difference > 1e-3:  # a wrong scale or a permuted weight moves logits by whole units
            raise LeantuneError(f"{name}: logits differ by {difference:.1e}")
        console.print(f"{name}: the same logits, to {difference:.1e} (ok)")


if __name__ == "__main__":
    main()
