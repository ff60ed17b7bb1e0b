"""The engine against Hugging Face + PEFT: same checkpoint, samples, adapter, learning rate and precision.

    python benchmarks/bench_train.py --model runs/models/smollm2-135m-instruct --data gsm8k_train.jsonl \\
        --field question=prompt --field answer=completion --json runs/bench.json
    python benchmarks/bench_train.py ... --loss-parity

Every measurement is a process of its own, so that peak memory is that peer's alone; the peers take turns,
round after round, so that a machine that drifts drifts for all. Figures are medians over all rounds, of real
tokens (padding does not count) per second; each process's first step is a warm-up and reported apart.

Two orders of the same shuffled data are used. `given` is the order as it comes, 8 sequences a step. `alike`
sorts a window of 64 steps by length first, as length-grouped samplers do, so that batches need little
padding, and takes every k-th batch of it. Only the tuned peers use `alike`, since only padded batches gain by
it; their losses belong to other batches and are not compared. `--loss-parity` runs all on `given`.

The dense products are timed between the steps of an engine run of their own: both see the same machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

# Nothing large is imported here: Linux counts a parent's memory into the peak of the processes it starts.
PEERS_FOLDER = Path(__file__).parent / "peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """One row of the table: the script in `peers/` that runs it, its arguments and its order of samples."""

    script: str
    arguments: tuple[str, ...] = ()
    order: str = "given"


PEERS = {
    "hf": Peer("hf_peft.py"),
    "hf-ckpt": Peer("hf_peft.py", ("--gradient-checkpointing",)),
    "hf-tuned": Peer("hf_peft.py", ("--tuned",), order="alike"),
    "hf-tuned-ckpt": Peer("hf_peft.py", ("--tuned", "--gradient-checkpointing"), order="alike"),
    "leantune-full": Peer("leantune_run.py", ("--policy", "full")),
    "leantune": Peer("leantune_run.py", ("--policy", "selective")),
    "dense": Peer("dense_products.py"),
}
LOSS_REFERENCE = "hf"
SPEED_REFERENCE = "dense"

Runs = dict[str, list[dict[str, Any]]]  # peer name -> one report a round


def main() -> None:
    args = parse_arguments()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="leantune-bench-") as scratch:
        prepare(args, Path(scratch), console)
        runs: Runs = {name: [] for name in args.peers}
        for number in range(1, args.rounds + 1):
            for name in args.peers:
                console.print(f"[dim]round {number}/{args.rounds}: {name}[/dim]")
                runs[name].append(run_peer(name, args, Path(scratch)))
    summary = summarise(runs)
    if not args.loss_parity:
        print_speed(summary, console)
        print_dense_share(runs, console)
    worst = print_losses(runs, console, every_step=args.loss_parity)
    if args.json:
        write_results(args, runs, summary)
        console.print(f"written: {args.json}, {args.json.with_suffix('.md')}")
    if args.loss_parity and worst > args.tolerance:
        raise SystemExit(f"loss parity: {worst:.2e} is beyond {args.tolerance:.0e}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face checkpoint directory")
    add("--data", type=Path, required=True, help="training data, as `leantune train --data` takes it")
    add("--field", action="append", default=[], metavar="COLUMN=ROLE", help="column to role; repeatable")
    add("--steps", type=int, help="steps a process, the first a warm-up (default: 4; 30 with --loss-parity)")
    add("--rounds", type=int, help="measurements of each peer (default: 3; 1 with --loss-parity)")
    add("--sequences", type=int, default=8, help="sequences a step (default: %(default)s)")
    add("--max-length", type=int, default=2048, help="tokens a sample may have (default: %(default)s)")
    add("--rank", type=int, default=16, help="LoRA rank, on all linear layers (default: %(default)s)")
    add("--alpha", type=float, default=32, help="LoRA alpha (default: %(default)s)")
    add("--lr", type=float, default=2e-4, help="learning rate, constant (default: %(default)s)")
    add("--threads", type=int, default=2, help="compute threads of every peer (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the sample order and the adapter (default: %(default)s)")
    add(
        "--peers",
        type=lambda text: text.split(","),
        help=f"comma-separated, of {', '.join(PEERS)} (default: all)",
    )
    add("--loss-parity", action="store_true", help="compare losses, step by step, instead of speed")
    add("--tolerance", type=float, default=1e-3, help="--loss-parity fails above it (default: %(default)s)")
    add("--json", type=Path, help="file for all results; the tables go beside it as .md")
    args = parser.parse_args()
    args.steps = args.steps or (30 if args.loss_parity else 4)
    args.rounds = args.rounds or (1 if args.loss_parity else 3)
    args.peers = args.peers or ([LOSS_REFERENCE, "leantune"] if args.loss_parity else list(PEERS))
    if unknown := [name for name in args.peers if name not in PEERS]:
        parser.error(f"--peers {unknown[0]}: choose from {', '.join(PEERS)}")
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first step is a warm-up; use 2 or more")
    return args


def prepare(args: argparse.Namespace, scratch: Path, console: Console) -> None:
    """Tokenises and plans once, so that all peers see identical ids, labels and initial weights."""
    console.print("[dim]preparing: tokens, steps, initial adapter[/dim]")
    names = ("model", "data", "max_length", "steps", "sequences", "rank", "alpha", "seed")
    command = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    command += [f"--field={pair}" for pair in args.field]
    run_script("prepare.py", [*command, *shared_paths(scratch)], args.threads)


def run_peer(name: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    peer = PEERS[name]
    command = [f"--peer={name}", f"--model={args.model}", f"--lr={args.lr}", f"--threads={args.threads}"]
    command += [f"--order={'given' if args.loss_parity else peer.order}", *peer.arguments]
    report = json.loads(run_script(peer.script, [*command, *shared_paths(scratch)], args.threads))
    seconds = report["seconds"][1:]
    report["tokens_per_second"] = sum(report["tokens"][1:]) / sum(seconds)
    return report


def shared_paths(scratch: Path) -> list[str]:
    return [f"--workload={scratch / 'workload.npz'}", f"--adapter={scratch / 'adapter'}"]


def run_script(script: str, arguments: list[str], threads: int) -> str:
    """Runs a script of `peers/` in a process of its own and returns the last line it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(PEERS_FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{script} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def summarise(runs: Runs) -> dict[str, dict[str, float]]:
    """Medians over the rounds. `of_dense` compares within a round, where the machine has drifted least."""
    summary = {}
    for name, reports in runs.items():
        speeds = [report["tokens_per_second"] for report in reports]
        summary[name] = {
            "tokens_per_second": median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "peak_gb": median(report["peak_bytes"] for report in reports) / 1e9,
            "first_step_seconds": median(report["seconds"][0] for report in reports),
        }
        for key, reference in (("of_hf", LOSS_REFERENCE), ("of_dense", SPEED_REFERENCE)):
            if reference in runs:
                others = [report["tokens_per_second"] for report in runs[reference]]
                summary[name][key] = median(a / b for a, b in zip(speeds, others, strict=True))
        if LOSS_REFERENCE in runs:
            peak = median(report["peak_bytes"] for report in runs[LOSS_REFERENCE]) / 1e9
            summary[name]["memory_of_hf"] = summary[name]["peak_gb"] / peak
    return summary


def speed_rows(summary: dict[str, dict[str, float]]) -> list[list[str]]:
    """Header and rows of the table of speed and memory."""
    rows = [["peer", "tok/s", "range", "/ hf", "/ dense", "GB", "/ hf", "warm-up s"]]
    for name, row in summary.items():
        memory = name != SPEED_REFERENCE  # its buffers are not what a training step needs
        rows.append(
            [
                name,
                f"{row['tokens_per_second']:.0f}",
                f"{row['slowest']:.0f}-{row['fastest']:.0f}",
                f"{row['of_hf']:.2f}" if "of_hf" in row else "-",
                f"{row['of_dense']:.2f}" if "of_dense" in row else "-",
                f"{row['peak_gb']:.1f}" if memory else "-",
                f"{row['memory_of_hf']:.2f}" if memory and "memory_of_hf" in row else "-",
                f"{row['first_step_seconds']:.1f}",
            ]
        )
    return rows


def print_speed(summary: dict[str, dict[str, float]], console: Console) -> None:
    header, *rows = speed_rows(summary)
    table = Table(title="real tokens per second and peak resident memory", box=SIMPLE)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_dense_share(runs: Runs, console: Console) -> None:
    """Prints the engine's speed as a share of the dense products', from steps of both taken in turn."""
    reports = runs.get(SPEED_REFERENCE)
    if reports:
        share = median(sum(run["seconds"][1:]) / sum(run["engine_seconds"][1:]) for run in reports)
        console.print(f"engine and dense products step by step in turns: {share:.2f} of their speed")


def print_losses(runs: Runs, console: Console, *, every_step: bool) -> float:
    """Prints losses and their largest differences from `hf`; returns the largest (0.0 without `hf`)."""
    same = [name for name in runs if runs[name][0]["losses"] and (every_step or PEERS[name].order == "given")]
    if LOSS_REFERENCE not in same or len(same) < 2:
        return 0.0
    losses = {name: runs[name][0]["losses"] for name in same}
    difference = {name: max_difference(losses[name], losses[LOSS_REFERENCE]) for name in same}
    table = Table(title="loss of every step, same batches", box=SIMPLE)
    table.add_column("step", justify="right")
    for name in same:
        table.add_column(name, justify="right")
    for step, values in enumerate(zip(*losses.values(), strict=True), start=1):
        table.add_row(str(step), *(f"{value:.6f}" for value in values))
    table.add_section()
    table.add_row("max |difference|", *(f"{difference[name]:.1e}" for name in same))
    console.print(table)
    return max(difference.values())


def max_difference(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


def write_results(args: argparse.Namespace, runs: Runs, summary: dict[str, dict[str, float]]) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    results = {"settings": settings, "machine": machine, "summary": summary, "runs": runs}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    header, *rows = speed_rows(summary)
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    args.json.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
