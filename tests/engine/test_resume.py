"""What a run writes, and that nothing of it is lost: resuming, stopping, killing, full disks."""

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
from helpers_training import prepared, records, trained, trainer
from leantune.checkpoint.state import latest_state, load_state


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
    next(t.epochs(2))
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


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


def test_an_evaluation_that_is_not_finite_stops_the_run(tiny_directory, data, tmp_path, monkeypatch):
    t = trainer(prepared(tiny_directory), data, out=tmp_path / "run", eval_data=data, eval_every=2)
    bad = lt.EvalResult(float("nan"), float("nan"), 1)
    monkeypatch.setattr("leantune.loop.evaluate", lambda *arguments: bad)
    with pytest.raises(lt.TrainingError, match=r"^step 2: the evaluation loss is nan; the state after step 2 is in"):
        t.fit(max_steps=4)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_directory, data, tmp_path):
    before = signal.getsignal(signal.SIGINT)
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
    assert signal.getsignal(signal.SIGINT) is before


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
