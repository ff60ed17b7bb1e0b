"""The training loop: epochs of steps, each one update from the mean loss over all of the step's label tokens."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from leantune import display, metrics
from leantune.checkpoint.atomic import sweep
from leantune.checkpoint.state import latest_state, load_state, prune, save_state
from leantune.config import DEFAULT_BATCH_TOKENS, TrainConfig
from leantune.data.batch import PackedBatch, Step, collate, plan_epoch
from leantune.data.dataset import Dataset
from leantune.errors import CheckpointError, ConfigError, DataError, TrainingError
from leantune.evaluate import check_fits, evaluate
from leantune.nn import Decoder
from leantune.optim import AdamW, Schedule

# Settings that may differ between a run and its resumption: these do not change what a step computes,
_FREE = ("eval_every", "save_every", "keep", "out", "policy")
# and these do, in a way one may want after looking at the loss; the change is noted.
_NOTED = ("lr", "schedule", "warmup", "weight_decay", "max_grad_norm")
# Without save_every, a checkpoint is written at the end of an epoch and whenever so many seconds have passed.
_SAVE_SECONDS = 600.0


class TrainingInterrupted(TrainingError):
    """Ctrl-C: the run stopped after a whole step; the message says how to go on."""


@dataclass(frozen=True)
class StepLog:
    """One optimizer step. loss: nats per label token. grad_norm: before clipping. memory_bytes: resident."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    label_tokens: int
    tokens_per_second: float
    memory_bytes: int


@dataclass(frozen=True)
class EpochResult:
    """One epoch. loss: mean over the label tokens it trained on. eval_loss: the last evaluation's, if there was one."""

    epoch: int
    loss: float
    steps: int
    tokens: int
    seconds: float
    eval_loss: float | None


class Trainer:
    """Trains what a method left trainable.

    model: from leantune.load, with a method applied. data: from leantune.data. eval_data: measured every `eval_every`
    steps (default: after each epoch) and at the end. progress: a bar (terminal) or lines. resume: go on from the newest
    checkpoint in `out`. overwrite: start anew in an `out` that holds a run. Further settings: see TrainConfig.

    The loss of a step is the sum over its label tokens divided by their number, whatever the micro-batches. Raises
    ConfigError or DataError for settings and data that cannot work, before any step.
    """

    def __init__(
        self,
        model: Decoder,
        data: Dataset,
        *,
        eval_data: Dataset | None = None,
        progress: bool = True,
        resume: bool = False,
        overwrite: bool = False,
        **settings: Any,
    ) -> None:
        self.model, self.data, self.eval_data = model, data, eval_data
        self.config = TrainConfig.of(settings)
        check_fits(model, data)
        if eval_data is not None:
            check_fits(model, eval_data)
        elif self.config.eval_every is not None:
            raise ConfigError(f"eval_every={self.config.eval_every} needs eval_data")
        if any(linear.base is not None for linear in model.updated()):
            raise ConfigError("the adapter is merged into the weights; call model.unmerge() before training it")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigError("no parameter is trainable; apply a method first, such as leantune.LoRA().apply(model)")
        half = [name for name, p in trainable.items() if p.dtype != torch.float32]
        if half:
            raise ConfigError(f"{half[0]} is trainable in {trainable[half[0]].dtype}; convert it to float32 first")
        c = self.config
        longest = int(data.lengths.argmax())
        if c.batch_tokens is not None and data.lengths[longest] > c.batch_tokens:
            raise DataError(
                f"{data[longest].source} has {data.lengths[longest]} tokens and batch_tokens={c.batch_tokens}; "
                "raise batch_tokens or lower max_length"
            )
        self.optimizer = AdamW(trainable, c.betas, c.eps, c.weight_decay)
        self.step = 0  # optimizer steps done
        self.history: list[StepLog] = []
        self.out = None if c.out is None else Path(c.out)
        self._display = display.choose(progress)
        self._last_eval: float | None = None
        self._stop_asked = False
        self._total = 0  # steps planned for the run
        self._saved_at = time.monotonic()
        self._steps_in: dict[int, int] = {}
        self._current_plan: tuple[int, list[Step]] | None = None
        if self.out is None and resume:
            raise ConfigError("resume=True needs out=, the directory of the run to go on with")
        if self.out is not None:
            self._open(self.out, resume, overwrite)

    # ---- running -----------------------------------------------------------------------------------------------------

    def fit(self, epochs: int | None = None, max_steps: int | None = None) -> list[EpochResult]:
        """Trains for `epochs`, or until `max_steps` optimizer steps, whichever comes first (default: one epoch).

        Counts are of the whole run: a resumed trainer does what is left of them. Raises TrainingError where a loss or
        gradient is not finite, TrainingInterrupted on Ctrl-C.
        """
        for name, value in (("epochs", epochs), ("max_steps", max_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if epochs is None:
            epochs = 1 if max_steps is None else None
        total = self._total_steps(epochs, max_steps)
        return list(self._run(total))

    def epochs(self, n: int) -> Iterator[EpochResult]:
        """Trains `n` epochs and yields after each: `for epoch in trainer.epochs(3): print(epoch.loss)`."""
        if n < 1:
            raise ConfigError(f"n={n} must be at least 1")
        yield from self._run(self._total_steps(n, None))

    def _run(self, total: int) -> Iterator[EpochResult]:
        schedule = Schedule(self.config.schedule, self.config.lr, total, self.config.warmup)
        if self.step >= total:
            return
        if self._total not in (0, total) and self.step:
            self._display.note(
                f"the run was planned for {self._total} steps and is {total} now: the {schedule.kind} schedule "
                "goes on as if it had been so from the start"
            )
        self._total = total
        self._display.start(total, self.step)
        try:
            while self.step < total:
                yield self._epoch(schedule)
            if self.out is not None:
                with self._interrupts():
                    self._save()
                    metrics.draw_curve(self.out)
        finally:
            self._display.stop()

    def _epoch(self, schedule: Schedule) -> EpochResult:
        number, position = self._locate(self.step)
        plan = self._plan(number)
        loss, labels, tokens, steps, begin = 0.0, 0, 0, 0, time.perf_counter()
        self.model.train()
        with self._interrupts():
            for i in range(position, len(plan)):
                if self.step >= schedule.total:
                    break
                log = self._train_step(plan[i], schedule.rate(self.step), number + (i + 1) / len(plan))
                loss, labels = loss + log.loss * log.label_tokens, labels + log.label_tokens
                tokens, steps = tokens + log.tokens, steps + 1
                self._after_step(log, last=self.step == schedule.total, epoch_done=i + 1 == len(plan))
        self.model.eval()
        seconds = time.perf_counter() - begin
        return EpochResult(number + 1, loss / labels, steps, tokens, seconds, self._last_eval)

    def _train_step(self, step: Step, lr: float, epoch: float) -> StepLog:
        begin = time.perf_counter()
        batches = [collate(self.data, indices).to(self.model.device) for indices in step]
        labels = sum(b.label_tokens for b in batches)
        if labels == 0:
            sources = ", ".join(self.data[i].source for b in batches for i in b.indices[:3])
            raise DataError(f"step {self.step + 1} has no label token; its samples are {sources}")
        loss = self._accumulate(batches, labels)
        norm = self.optimizer.gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            self._not_finite(f"step {self.step + 1}: {what}", "no update was made, ", batches)
        self.optimizer.step(lr, norm, self.config.max_grad_norm or None)
        self.step += 1
        tokens = sum(b.tokens for b in batches)
        seconds = time.perf_counter() - begin
        return StepLog(
            self.step,
            round(epoch, 6),
            loss,
            lr,
            norm,
            tokens,
            labels,
            tokens / seconds,
            metrics.memory_bytes(),
        )

    def _accumulate(self, batches: list[PackedBatch], labels: int) -> float:
        """Puts the gradients of the step's mean loss in place and returns that loss."""
        for p in self.optimizer.parameters.values():
            p.grad = None  # a step that was broken off may have left some
        total, first_token = 0.0, 0
        for batch in batches:
            key = (self.config.seed, self.step, first_token)
            first_token += batch.tokens
            if batch.label_tokens == 0:
                continue
            self.model.policy = self.config.policy
            packed = self.model.packed(batch.cu_seqlens, batch.position_ids, dropout_key=key)
            loss = self.model.loss_sum(batch.input_ids, batch.targets, packed)
            (loss / labels).backward()
            total += float(loss.detach())
        return total / labels

    def _after_step(self, log: StepLog, last: bool, epoch_done: bool) -> None:
        self.history.append(log)
        if self.out is not None:
            self._metrics.write(asdict(log))
        self._display.step(asdict(log))
        c = self.config
        if epoch_done and not last:
            self._display.note(f"epoch {round(log.epoch)} done at step {self.step}")
        at = epoch_done if c.eval_every is None else self.step % c.eval_every == 0
        if self.eval_data is not None and (at or last):
            self._evaluate()
        due = epoch_done or time.monotonic() - self._saved_at > _SAVE_SECONDS
        if c.save_every is not None:
            due = self.step % c.save_every == 0
        if due and not last and self.out is not None:
            self._save()
        if self._stop_asked and not last:
            self._stop()

    def _evaluate(self) -> None:
        assert self.eval_data is not None
        result = evaluate(self.model, self.eval_data, self.config.batch_tokens or DEFAULT_BATCH_TOKENS)
        if not math.isfinite(result.loss):
            self._not_finite(f"step {self.step}: the evaluation loss is {result.loss}")
        self._last_eval = result.loss
        if self.out is not None:
            row = {"step": self.step, "eval_loss": result.loss, "eval_perplexity": result.perplexity}
            self._metrics.write({**row, "eval_tokens": result.tokens})
        self._display.note(f"step {self.step}: evaluation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")

    # ---- the order of steps ------------------------------------------------------------------------------------------

    def _plan(self, epoch: int) -> list[Step]:
        if self._current_plan is None or self._current_plan[0] != epoch:
            c = self.config
            plan = plan_epoch(
                self.data.lengths, batch_size=c.batch_size, batch_tokens=c.batch_tokens, accumulation=c.accumulation,
                shuffle=c.shuffle, seed=c.seed, epoch=epoch,
            )  # fmt: skip
            self._current_plan = epoch, plan
            self._steps_in[epoch] = len(plan)
        return self._current_plan[1]

    def _steps(self, epoch: int) -> int:
        if epoch not in self._steps_in:
            self._plan(epoch)
        return self._steps_in[epoch]

    def _locate(self, step: int) -> tuple[int, int]:
        """(epoch, position within it) of the step after `step` steps."""
        epoch = 0
        while step >= self._steps(epoch):
            step -= self._steps(epoch)
            epoch += 1
        return epoch, step

    def _total_steps(self, epochs: int | None, max_steps: int | None) -> int:
        in_epochs = None if epochs is None else sum(self._steps(e) for e in range(epochs))
        counts = [n for n in (in_epochs, max_steps) if n is not None]
        largest = max(int(self.data.lengths[m].sum()) for step in self._plan(0) for m in step)
        self.model.arena.capacity = max(self.model.arena.capacity, largest)
        return min(counts)

    # ---- stopping and going on ---------------------------------------------------------------------------------------

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C asks the run to stop after the step under way; a second one stops it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(signum: int, frame: Any) -> None:
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True
            self._display.note("stopping after this step (Ctrl-C again: at once)")

        self._stop_asked = False
        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _stop(self) -> None:
        self._stop_asked = False
        if self.out is None:
            raise TrainingInterrupted(
                f"interrupted after step {self.step}; nothing was saved, as no out= directory was given "
                "(the model in memory holds that step's weights)"
            )
        path = self._save()
        metrics.draw_curve(self.out)
        raise TrainingInterrupted(
            f"interrupted after step {self.step}, saved in {path}; go on with the same command and --resume, "
            "or Trainer(..., resume=True)"
        )

    def _not_finite(self, what: str, done: str = "", batches: Sequence[PackedBatch] = ()) -> None:
        for p in self.optimizer.parameters.values():
            p.grad = None
        sources = ", ".join(self.data[i].source for b in batches for i in b.indices[:3])
        where = f" (samples {sources}, ...)" if sources else ""
        kept = f"the model in memory holds the weights after step {self.step}"
        if self.out is not None:
            # Nothing is pruned: an earlier checkpoint may be the better one to go on from.
            kept = f"the state after step {self.step} is in {self._save(pruning=False)}"
        raise TrainingError(
            f"{what}{where}; {done}{kept}. Resume with a lower lr (now {self.config.lr}) or more "
            "warmup, or look at these samples"
        )

    def _open(self, out: Path, resume: bool, overwrite: bool) -> None:
        check_output(out, resume, overwrite)
        state = latest_state(out) if resume else None
        if resume and state is None:
            self._display.note(f"{out} holds no complete checkpoint: the run starts from the beginning")
        if overwrite:
            self._clear(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create out={str(out)!r}: {error.strerror}") from error
        sweep(out)
        if state is not None:
            self._restore(state)
        self._metrics = metrics.MetricsFile(out, self.step)

    def _clear(self, out: Path) -> None:
        from leantune.checkpoint.atomic import remove_directory

        for path in out.glob("checkpoint-*"):
            remove_directory(path)
        (out / metrics.FILE_NAME).unlink(missing_ok=True)

    def _meta(self) -> dict[str, Any]:
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()}
        return {
            "step": self.step,
            "total_steps": self._total,
            "threads": torch.get_num_threads(),
            "optimizer_steps": self.optimizer.steps,
            "model": _fingerprint(self.model),
            "method": _described(self.model.method),
            "settings": {k: v for k, v in settings.items() if k not in _FREE},
            "data": self.data.fingerprint,
            "trainable": {name: list(p.shape) for name, p in sorted(self.optimizer.parameters.items())},
        }

    def _save(self, pruning: bool = True) -> Path:
        assert self.out is not None
        path = self.out / f"checkpoint-{self.step}"
        parameters = {f"parameter.{name}": p.detach() for name, p in self.optimizer.parameters.items()}
        save_state(path, parameters | self.optimizer.state(), self._meta())
        if pruning:
            prune(self.out, self.config.keep)
        self._saved_at = time.monotonic()
        return path

    def _restore(self, path: Path) -> None:
        tensors, meta = load_state(path)
        mine = self._meta()
        if meta["model"] != mine["model"]:
            raise CheckpointError(f"{path}: it belongs to another base model than the one loaded now")
        if meta["data"] != mine["data"]:
            dated = "; the chat template writes today's date into it, so set the clock back or start anew"
            raise CheckpointError(
                f"{path}: its training data or tokenizer differ from those given now{dated if self.data.dated else ''}"
            )
        before, now = ((m["method"] or {}) | m["settings"] for m in (meta, mine))
        for name in sorted(before.keys() | now.keys()):
            old, new = before.get(name), now.get(name)
            if old == new:
                continue
            if name not in _NOTED:
                raise CheckpointError(
                    f"{path}: it was made with {name}={old!r}, this run has {new!r}; resume with the same {name}"
                )
            self._display.note(f"{name} was {old!r} until step {meta['step']} and is {new!r} from here on")
        if meta["trainable"] != mine["trainable"]:
            raise CheckpointError(
                f"{path}: it trains other parameters than this run; apply the method it was made with"
            )
        if meta["threads"] != mine["threads"]:
            self._display.note(
                f"the run used {meta['threads']} threads, now it is {mine['threads']}: the vendor's products may round "
                "differently, so the bits can differ from those of a run left alone"
            )
        with torch.no_grad():
            for name, p in self.optimizer.parameters.items():
                p.copy_(tensors[f"parameter.{name}"])
        self.optimizer.load_state(tensors, meta["optimizer_steps"])
        self.step, self._total = meta["step"], meta["total_steps"]


def check_output(out: Path, resume: bool, overwrite: bool) -> None:
    """CheckpointError if a run cannot begin, or go on, in `out`; touches nothing."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"out={str(out)!r} is a file; give a directory")
    begun = (out / metrics.FILE_NAME).exists()
    if resume and not begun:
        raise CheckpointError(f"resume: {out} holds no run; start without resume")
    if not (resume or overwrite) and (begun or any(out.glob("checkpoint-*"))):
        raise CheckpointError(
            f"out={str(out)!r} holds a run already; choose another directory, go on with resume (--resume), or "
            "replace it with overwrite=True (--overwrite)"
        )


def _described(method: Any) -> dict[str, Any] | None:
    """A method and its settings, as JSON gives them back; None where parameters were unfrozen by hand."""
    if method is None:
        return None
    return {"method": method.name} | {f"{method.name} {name}": value for name, value in asdict(method).items()}


def _fingerprint(model: Decoder) -> str:
    """SHA-256 of the config and of a few numbers from every frozen tensor: cheap, and another model's differ."""
    digest = hashlib.sha256(json.dumps(model.config.raw, sort_keys=True).encode())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            flat = p.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
