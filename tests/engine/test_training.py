"""The training loop: what a step's loss is, that it does not depend on batching, and that nothing is ever lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import leantune as lt
from leantune.checkpoint.state import latest_state, load_state
from leantune.data.batch import collate
from leantune.optim import Schedule

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


@pytest.fixture
def data(tiny):
    return lt.data.chat(records(24), tiny.tokenizer)


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


def follow_peft(directory, data, start, steps: int, tolerance: float, **settings) -> None:
    """Asserts that losses and rates are those of Hugging Face + PEFT + torch's AdamW, from the adapter in `start`."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = lt.load(directory)
    model.load_adapter(start)
    t = trainer(model, data, schedule="cosine", warmup=3, weight_decay=0.01, max_grad_norm=0.5, **settings)
    t.fit(max_steps=steps)
    assert len(t.history) == steps

    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=t.config.lr, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, steps)
    for number, log in enumerate(t.history):
        epoch, position = t._locate(number)
        loss = theirs(**padded([data[i] for i in t._plan(epoch)[position][0]])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        assert log.lr == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert log.loss == pytest.approx(float(loss.detach()), abs=tolerance), f"step {number + 1}"


# ---- one step --------------------------------------------------------------------------------------------------------


def gradients_of_one_step(directory, data, dropout=0.0, **settings):
    model = prepared(directory, dropout)
    t = trainer(model, data, shuffle=False, **settings)
    seen = {}
    step = t.optimizer.step

    def watch(*arguments):
        seen.update({n: p.grad.clone() for n, p in t.optimizer.parameters.items()})
        step(*arguments)

    t.optimizer.step = watch
    t.fit(max_steps=1)
    return t.history[0], seen


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_do_not_depend_on_batching(tiny_directory, data, dropout):
    """8 samples a step: together, one by one, in pairs, in fours; each relative to the largest gradient's norm."""
    ways = [
        {"batch_size": 8, "accumulation": 1},
        {"batch_size": 1, "accumulation": 8},
        {"batch_size": 2, "accumulation": 4},
        {"batch_size": 4, "accumulation": 2},
    ]
    reference, expected = gradients_of_one_step(tiny_directory, data, dropout, **ways[0])
    for way in ways[1:]:
        log, gradients = gradients_of_one_step(tiny_directory, data, dropout, **way)
        assert log.label_tokens == reference.label_tokens and log.tokens == reference.tokens
        assert log.loss == pytest.approx(reference.loss, rel=1e-5)
        for name, gradient in gradients.items():
            scale = expected[name].norm()
            assert (gradient - expected[name]).norm() <= 1e-5 * scale, f"{name} with {way}"


def test_loss_is_the_mean_over_label_tokens_of_the_step(tiny_directory, data):
    """Not the mean of micro-batch means: labels are unevenly spread over these samples."""
    log, _ = gradients_of_one_step(tiny_directory, data, batch_size=1, accumulation=8)
    model = prepared(tiny_directory)
    total, count = 0.0, 0
    for i in range(8):
        ids = torch.from_numpy(data[i].input_ids).long()
        with torch.no_grad():
            log_probabilities = model(ids[None])[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if data[i].label_mask[t]:
                total -= float(log_probabilities[t - 1, ids[t]])
                count += 1
    assert log.label_tokens == count
    assert log.loss == pytest.approx(total / count, rel=1e-5)


def test_evaluation_does_not_depend_on_batching(tiny, data):
    results = [lt.evaluate(tiny, data, batch_tokens=n) for n in (1, 100, 10_000)]
    for result in results:
        assert result.tokens == data.stats.label_tokens
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


def test_a_micro_batch_without_labels_contributes_nothing(tiny_directory, data, monkeypatch):
    real = collate

    def without(samples, indices):
        batch = real(samples, indices)
        if 1 in indices:
            batch.targets.fill_(-100)
            object.__setattr__(batch, "label_tokens", 0)
        return batch

    monkeypatch.setattr("leantune.loop.collate", without)
    model = prepared(tiny_directory)
    t = trainer(model, data, batch_size=1, accumulation=2, shuffle=False)
    t.fit(max_steps=1)
    assert t.history[0].label_tokens == int(data[0].label_mask.sum())
    with pytest.raises(lt.DataError, match="step 1 has no label token; its samples are records.1."):
        monkeypatch.setattr("leantune.loop.collate", lambda s, i: without(s, [1]))
        trainer(prepared(tiny_directory), data, batch_size=1).fit(max_steps=1)


def test_follows_peft_step_by_step(tiny_directory, data, tmp_path):
    prepared(tiny_directory).save_adapter(tmp_path / "start")
    follow_peft(tiny_directory, data, tmp_path / "start", steps=30, tolerance=1e-4)


def test_follows_peft_on_the_real_model(real_model_directory, tmp_path):
    """30 steps of short samples, fp32: within 1e-3 at every step."""
    model = lt.load(real_model_directory)
    lt.LoRA(rank=16, alpha=32).apply(model)
    model.save_adapter(tmp_path / "start")
    data = lt.data.chat(records(60), model.tokenizer)
    follow_peft(real_model_directory, data, tmp_path / "start", steps=30, tolerance=1e-3, lr=2e-4, batch_size=2)


def test_full_fine_tuning_follows_transformers(tiny_directory, data):
    transformers = pytest.importorskip("transformers")
    model = lt.load(tiny_directory)
    lt.Full().apply(model)
    t = trainer(model, data, lr=1e-3, max_grad_norm=None)
    t.fit(epochs=2)
    assert t.history[-1].loss < t.history[0].loss - 0.5

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for step, log in zip([step for epoch in range(2) for step in t._plan(epoch)], t.history, strict=True):
        loss = theirs(**padded([data[i] for i in step[0]])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert log.loss == pytest.approx(float(loss.detach()), abs=1e-4)
    finals = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, finals[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("policy", ["all", "full"])
def test_policies_train_to_the_same_bits(tiny_directory, data, policy):
    results = []
    for kept in ("selective", policy):
        model = prepared(tiny_directory, dropout=0.1)
        trainer(model, data, policy=kept).fit(max_steps=3)
        results.append(trained(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_a_steady_step_takes_no_new_memory_for_the_arena(tiny_directory, data):
    model = prepared(tiny_directory)
    t = trainer(model, data)
    t.fit(epochs=1)
    held = model.arena.allocated_bytes
    assert held > 0
    t.fit(epochs=3)
    assert model.arena.allocated_bytes == held


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")],
)
def test_schedules_are_hugging_faces(kind, name):
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    mine = Schedule(kind, 0.5, 20, warmup=0.2)
    for step in range(20):
        assert mine.rate(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


# ---- output, resuming, stopping --------------------------------------------------------------------------------------


def test_metrics_and_curve(tiny_directory, data, tmp_path):
    out = tmp_path / "run"
    t = trainer(prepared(tiny_directory), data, out=out, eval_data=data, eval_every=4)
    (epoch,) = t.fit(epochs=1)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "label_tokens",
                             "tokens_per_second", "memory_bytes"}  # fmt: skip
    assert [r["step"] for r in rows if "eval_loss" in r] == [4, 6]
    assert epoch.eval_loss == rows[-1]["eval_loss"] and steps[-1]["epoch"] == 1.0
    labels = sum(r["label_tokens"] for r in steps)
    assert epoch.loss == pytest.approx(sum(r["loss"] * r["label_tokens"] for r in steps) / labels)
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_epochs_yields_each(tiny_directory, data):
    t = trainer(prepared(tiny_directory), data)
    assert [e.epoch for e in t.epochs(3)] == [1, 2, 3]
    assert t.step == 18 and len({log.loss for log in t.history}) == 18


def test_resume_gives_the_bits_of_the_uninterrupted_run(tiny_directory, data, tmp_path):
    settings = {"schedule": "cosine", "warmup": 2, "save_every": 4, "accumulation": 2, "batch_size": 2}
    whole = prepared(tiny_directory, dropout=0.2)
    trainer(whole, data, out=tmp_path / "whole", **settings).fit(epochs=3)
    first = prepared(tiny_directory, dropout=0.2)
    t = trainer(first, data, out=tmp_path / "cut", **settings)
    after = t._after_step

    def die(log, **when):
        after(log, **when)
        if log.step == 11:
            raise SystemExit

    t._after_step = die
    with pytest.raises(SystemExit):
        t.fit(epochs=3)
    second = prepared(tiny_directory, dropout=0.2)
    resumed = trainer(second, data, out=tmp_path / "cut", resume=True, **settings)
    assert resumed.step == 8
    resumed.fit(epochs=3)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(second)[name]), name
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 19))


@pytest.mark.parametrize("change", [{"rank": 8}, {"alpha": 8.0}, {"dropout": 0.5}, {"use_rslora": True}])
def test_resume_with_another_adapter_is_refused(tiny_directory, data, tmp_path, change):
    first, second = lt.load(tiny_directory), lt.load(tiny_directory)
    lt.LoRA(rank=4).apply(first)
    lt.LoRA(**{"rank": 4, **change}).apply(second)
    trainer(first, data, out=tmp_path / "run").fit(max_steps=1)
    with pytest.raises(lt.CheckpointError, match=f"it was made with lora {next(iter(change))}=.*resume with the same"):
        trainer(second, data, out=tmp_path / "run", resume=True)


def test_resume_on_another_base_model_is_refused(tiny_directory, data, tmp_path):
    from helpers_model import tiny_model

    trainer(prepared(tiny_directory), data, out=tmp_path / "run").fit(max_steps=1)
    merged = prepared(tiny_directory)  # same config, same norms: only the matrices differ
    merged.save_merged(tmp_path / "merged")
    others = [
        prepared(tiny_model(tmp_path / "other", rms_norm_eps=1e-3)),
        prepared(tmp_path / "merged"),
        lt.load(tiny_directory, dtype="bfloat16"),
    ]
    lt.LoRA(rank=4).apply(others[2])
    for other in others:
        with pytest.raises(lt.CheckpointError, match="belongs to another base model"):
            trainer(other, data, out=tmp_path / "run", resume=True)


def test_resume_with_another_learning_rate_is_noted(tiny_directory, data, tmp_path, capsys):
    trainer(prepared(tiny_directory), data, out=tmp_path / "run").fit(max_steps=1)
    again = trainer(prepared(tiny_directory), data, out=tmp_path / "run", resume=True, lr=1e-3, progress=True)
    assert "lr was 0.005 until step 1 and is 0.001 from here on" in capsys.readouterr().err
    again.fit(max_steps=2)
    assert again.history[0].lr == 1e-3


def test_a_run_is_saved_after_every_epoch_without_asking(tiny_directory, data, tmp_path):
    t = trainer(prepared(tiny_directory), data, out=tmp_path / "run")
    for epoch, _ in enumerate(t.epochs(2), start=1):
        assert (tmp_path / "run" / f"checkpoint-{6 * epoch}").is_dir() or epoch == 2


def test_a_broken_step_leaves_no_gradient_behind(tiny_directory, data, monkeypatch):
    """A step that dies in its second micro-batch must not leak into the next."""
    model = prepared(tiny_directory)
    t = trainer(model, data, batch_size=2, accumulation=2)
    real, calls = model.loss_sum, []

    def fails_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(model, "loss_sum", fails_once)
    with pytest.raises(MemoryError):
        t.fit(max_steps=1)
    t.fit(max_steps=1)
    clean = prepared(tiny_directory)
    trainer(clean, data, batch_size=2, accumulation=2).fit(max_steps=1)
    assert all(torch.equal(v, trained(clean)[n]) for n, v in trained(model).items())


def test_a_full_disk_stops_the_run_with_its_reason(tiny_directory, data, tmp_path, monkeypatch):
    t = trainer(prepared(tiny_directory), data, out=tmp_path / "run", save_every=1)
    t.fit(max_steps=2)

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(lt.CheckpointError, match="space"):
        t.fit(max_steps=4)
    monkeypatch.undo()
    assert load_state(latest_state(tmp_path / "run"))[1]["step"] == 2
    again = trainer(prepared(tiny_directory), data, out=tmp_path / "run", resume=True, save_every=1)
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", *a, **k: (full if "a" in mode else real)(path, mode, *a, **k)
    )
    with pytest.raises(lt.TrainingError, match="metrics.jsonl: No space left on device; free some space and resume"):
        again.fit(max_steps=4)


def test_an_interrupt_in_the_last_step_does_not_stop_the_next_run(tiny_directory, data):
    t = trainer(prepared(tiny_directory), data)
    after = t._after_step

    def press(log, **when):
        os.kill(os.getpid(), signal.SIGINT)
        after(log, **when)

    t._after_step = press
    t.fit(max_steps=1)
    t._after_step = after
    t.fit(max_steps=3)
    assert t.step == 3


def test_a_merged_adapter_is_not_trained(tiny_directory, data):
    model = prepared(tiny_directory)
    model.merge()
    with pytest.raises(lt.ConfigError, match="call model.unmerge"):
        trainer(model, data)
    with pytest.raises(lt.ConfigError, match="carries a LoRA adapter already"):
        lt.Full().apply(model)


def test_resuming_a_finished_run_does_nothing(tiny_directory, data, tmp_path):
    out = tmp_path / "run"
    trainer(prepared(tiny_directory), data, out=out, eval_data=data).fit(epochs=1)
    before = (out / "metrics.jsonl").read_text()
    again = trainer(prepared(tiny_directory), data, out=out, eval_data=data, resume=True)
    assert again.fit(epochs=1) == []
    assert (out / "metrics.jsonl").read_text() == before


def test_old_checkpoints_are_pruned(tiny_directory, data, tmp_path):
    trainer(prepared(tiny_directory), data, out=tmp_path / "run", save_every=1, keep=3).fit(epochs=1)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (4, 5, 6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulation": 2}, "it was made with accumulation=1, this run has 2; resume with the same accumulation"),
        ({"seed": 1}, "made with seed=0"),
        ({"batch_size": 3}, "made with batch_size=4"),
    ],
)
def test_resume_with_other_settings_is_refused(tiny_directory, data, tmp_path, change, message):
    trainer(prepared(tiny_directory), data, out=tmp_path / "run").fit(max_steps=2)
    with pytest.raises(lt.CheckpointError, match=message):
        trainer(prepared(tiny_directory), data, out=tmp_path / "run", resume=True, **change)


def test_resume_with_other_data_or_method_is_refused(tiny_directory, tiny, data, tmp_path):
    trainer(prepared(tiny_directory), data, out=tmp_path / "run").fit(max_steps=2)
    other = lt.data.chat(records(24, seed=1), tiny.tokenizer)
    with pytest.raises(lt.CheckpointError, match="training data"):
        trainer(prepared(tiny_directory), other, out=tmp_path / "run", resume=True)
    lt.LoRA(rank=4, targets=["q_proj"]).apply(tiny)
    with pytest.raises(lt.CheckpointError, match=r"made with lora targets='all-linear', this run has \['q_proj'\]"):
        trainer(tiny, data, out=tmp_path / "run", resume=True)
    with pytest.raises(lt.CheckpointError, match="holds no run; start without resume"):
        trainer(prepared(tiny_directory), data, out=tmp_path / "nothing", resume=True)


def test_an_output_directory_with_a_run_is_refused(tiny_directory, data, tmp_path):
    trainer(prepared(tiny_directory), data, out=tmp_path / "run").fit(max_steps=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(lt.CheckpointError, match="holds a run already; choose another directory"):
        trainer(prepared(tiny_directory), data, out=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    trainer(prepared(tiny_directory), data, out=tmp_path / "run", overwrite=True).fit(max_steps=1)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(lt.CheckpointError, match="is a file"):
        trainer(prepared(tiny_directory), data, out=tmp_path / "file")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tiny_directory, data, tmp_path, poison):
    model = prepared(tiny_directory)
    t = trainer(model, data, out=tmp_path / "run")
    t.fit(max_steps=2)
    good = trained(model)
    norm = model.model.norm.weight.data
    norm[3] = poison
    with pytest.raises(
        lt.TrainingError, match=r"step 3: the .* is (nan|inf|-inf) .*no update was made, .*step 2 is in"
    ):
        t.fit(max_steps=4)
    for name, value in trained(model).items():
        assert torch.equal(value, good[name])
    tensors, meta = load_state(latest_state(tmp_path / "run"))
    assert meta["step"] == 2
    assert all(torch.equal(tensors[f"parameter.{name}"], value) for name, value in good.items())


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_directory, data, tmp_path):
    model = prepared(tiny_directory)
    t = trainer(model, data, out=tmp_path / "run")
    after = t._after_step

    def press(log, **when):
        if log.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        after(log, **when)

    t._after_step = press
    with pytest.raises(lt.TrainingInterrupted, match=r"interrupted after step 3, saved in .*checkpoint-3; go on with"):
        t.fit(epochs=2)
    again = trainer(prepared(tiny_directory), data, out=tmp_path / "run", resume=True)
    assert again.step == 3
    again.fit(epochs=2)
    whole = prepared(tiny_directory)
    trainer(whole, data).fit(epochs=2)
    assert all(torch.equal(v, trained(again.model)[n]) for n, v in trained(whole).items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_works_off_the_main_thread(tiny_directory, data):
    t = trainer(prepared(tiny_directory), data)
    thread = threading.Thread(target=t.fit, kwargs={"max_steps": 1})
    thread.start()
    thread.join()
    assert t.step == 1


def test_sigkill_at_any_moment_loses_at_most_the_steps_since_the_last_checkpoint(tiny_directory, data, tmp_path):
    """A run killed again and again ends with the bits of the run left alone."""
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "import leantune as lt\n"
        "directory, out, resume = sys.argv[1:]\n"
        "model = lt.load(directory)\n"
        "lt.LoRA(rank=4, dropout=0.1).apply(model)\n"
        f"data = lt.data.chat({records(24)!r}, model.tokenizer)\n"
        "t = lt.Trainer(model, data, lr=5e-3, batch_size=4, progress=False, out=out, save_every=1,\n"
        "               resume=bool(int(resume)))\n"
        "print('ready', flush=True)\n"
        "t.fit(epochs=12)\n"
    )

    def start(out, resume):
        command = [sys.executable, "-c", code, str(tiny_directory), str(out), str(int(resume))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(out, resume):
        with start(out, resume) as process:
            _, errors = process.communicate()
            assert process.returncode == 0, errors

    finish(tmp_path / "whole", False)
    kills = 0
    for attempt in range(6):
        with start(tmp_path / "cut", (tmp_path / "cut" / "metrics.jsonl").exists()) as process:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            time.sleep(0.05 + 0.1 * attempt)
            if process.poll() is not None:
                break
            process.kill()
            kills += 1
    finish(tmp_path / "cut", True)
    assert kills >= 2
    expected, _ = load_state(tmp_path / "whole" / "checkpoint-72")
    found, _ = load_state(tmp_path / "cut" / "checkpoint-72")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be a positive number"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"accumulation": 1.5}, "accumulation=1.5"),
        ({"schedule": "sawtooth"}, "schedule='sawtooth' is unknown; use constant, linear, cosine"),
        ({"warmup": -1}, "warmup=-1"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"policy": "none"}, "policy='none'"),
        ({"save_every": 3}, "save_every=3 needs out="),
        ({"eval_every": 3}, "eval_every=3 needs eval_data"),
        ({"resume": True}, "resume=True needs out="),
        ({"learning_rate": 1e-3}, "unknown setting 'learning_rate'; settings are lr, batch_size"),
    ],
)
def test_settings_that_cannot_work(tiny_directory, data, settings, message):
    with pytest.raises(lt.ConfigError, match=message):
        trainer(prepared(tiny_directory), data, **settings)


def test_nothing_trainable(tiny, data):
    with pytest.raises(lt.ConfigError, match="apply a method first"):
        trainer(tiny, data)


def test_trainable_half_precision_is_refused(tiny_directory, data):
    model = lt.load(tiny_directory, dtype=torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(lt.ConfigError, match=r"embed_tokens.weight is trainable in torch.bfloat16"):
        trainer(model, data)


def test_data_that_does_not_fit_the_model(tiny_directory, tmp_path):
    from helpers_model import tiny_model

    short = lt.load(tiny_model(tmp_path / "short", max_position_embeddings=8))
    lt.LoRA(rank=2).apply(short)
    with pytest.raises(lt.DataError, match="the model's context is 8; use max_length=8"):
        trainer(short, lt.data.chat(records(4), short.tokenizer))
    small = lt.load(tiny_model(tmp_path / "small", vocab_size=50))
    lt.LoRA(rank=2).apply(small)
    with pytest.raises(lt.DataError, match="the model's vocabulary has 50"):
        trainer(small, lt.data.chat(records(4), small.tokenizer))
