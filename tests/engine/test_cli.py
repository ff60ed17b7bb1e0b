"""The command line on a tiny model: what each command writes, prints and refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from helpers_model import tiny_model
from leantune import LoRA
from leantune.cli import app
from leantune.config import TrainConfig
from leantune.recipe import Recipe

ROOT = Path(__file__).parents[2]
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
RECORDS = [
    {"question": "hello?", "answer": "the answer is four"},
    {"question": "how are you today?", "answer": "hello world"},
    {"question": "who are you", "answer": "the user"},
    {"question": "what is the answer", "answer": "four today"},
]
FIELDS = ["--field", "question=prompt", "--field", "answer=completion"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a data file."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return folder


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    """A run of six steps that kept its state after each second one."""
    out = work / "finished"
    result = train(work, out, "--max-steps", 6, "--dropout", 0.1, "--save-every", 2, "--set", "keep=9", "--merge",
                   "--eval-data", work / "data.jsonl", "--eval-every", 3)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"--adapter {out / 'adapter'}" in result.stdout
    return out


@pytest.fixture(autouse=True)
def _plain_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEANTUNE_DEBUG", raising=False)


def leantune(*arguments: object, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def train_arguments(work: Path, out: Path) -> list[object]:
    return ["train", "--model", work / "base", "--data", work / "data.jsonl", *FIELDS, "--out", out,
            "--batch-size", 1, "--rank", 4, "--lr", 0.01]  # fmt: skip


def train(work: Path, out: Path, *more: object) -> Any:
    return leantune(*train_arguments(work, out), *more)


def process(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "leantune.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def refused(result: Any, message: str) -> None:
    assert result.exit_code == 1
    assert re.search(f"^error: .*{message}", result.stderr, re.MULTILINE | re.DOTALL), result.stderr
    assert "Traceback" not in result.stderr


# ---- help ------------------------------------------------------------------------------------------------------------


def test_every_option_has_a_help_text() -> None:
    group = typer.main.get_command(app)
    assert list(group.commands) == ["train", "eval", "merge", "generate", "inspect-data", "kernels"]  # type: ignore[attr-defined]
    for command in group.commands.values():  # type: ignore[attr-defined]
        assert command.help
        assert all(parameter.help for parameter in command.params)


def test_defaults_in_the_help_of_train_are_the_real_ones() -> None:
    real: dict[str, Any] = {}
    for owner in (LoRA(), TrainConfig(), Recipe(model="", data="", out="")):
        real |= vars(owner)
    shown = {
        p.name: p.show_default
        for p in typer.main.get_command(app).commands["train"].params  # type: ignore[attr-defined]
        if isinstance(p.show_default, str)
    }
    told = {name: text for name, text in shown.items() if real[name] is not None and name != "batch_tokens"}
    assert len(told) >= 14
    for name, text in told.items():
        assert text == ("shuffle" if name == "shuffle" else str(real[name])), name
    assert shown["batch_tokens"].startswith(f"{TrainConfig().batch_tokens},")


def test_version_and_no_arguments() -> None:
    assert leantune("--version").stdout.startswith("leantune ")
    assert "inspect-data" in leantune().output


# ---- train -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_results(finished: Path) -> None:
    assert {f.name for f in (finished / "adapter").iterdir()} >= ADAPTER_FILES
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (finished / "merged").iterdir()}
    assert (finished / "loss_curve.png").stat().st_size > 0
    assert [row["step"] for row in rows(finished) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(finished) if "eval_loss" in row] == [3, 6]


def test_the_recipe_of_a_run_repeats_it(finished: Path, tmp_path: Path) -> None:
    result = leantune("train", finished / "recipe.toml", "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(finished)


def test_resume_goes_on_to_the_same_bits(finished: Path, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("adapter", "merged", "checkpoint-4", "checkpoint-6"):
        shutil.rmtree(out / name)
    result = leantune("train", finished / "recipe.toml", "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert adapter_bytes(out) == adapter_bytes(finished)
    same = ("step", "loss", "lr", "grad_norm")
    assert [{k: r[k] for k in same} for r in rows(out) if "loss" in r] == [
        {k: r[k] for k in same} for r in rows(finished) if "loss" in r
    ]


def test_resume_of_a_finished_run_says_so(finished: Path) -> None:
    before = adapter_bytes(finished)
    result = leantune("train", finished / "recipe.toml", "--resume")
    assert result.exit_code == 0, result.output
    assert "finished already, at step 6" in result.stdout
    assert adapter_bytes(finished) == before


def test_resume_refuses_other_settings_and_an_empty_directory(finished: Path, tmp_path: Path) -> None:
    refused(leantune("train", finished / "recipe.toml", "--resume", "--seed", 1), "resume with the same lora seed")
    refused(
        leantune("train", finished / "recipe.toml", "--resume", "--out", tmp_path / "no"),
        "holds no run; start without resume",
    )
    refused(leantune("train", finished / "recipe.toml", "--resume", "--overwrite"), "give one of them")


def test_a_directory_that_holds_a_run_is_replaced_only_on_demand(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    refused(leantune("train", finished / "recipe.toml", "--out", out), "holds a run already.*--overwrite")
    shutil.copytree(finished / "adapter", tmp_path / "bare" / "adapter")
    refused(
        leantune("train", finished / "recipe.toml", "--out", tmp_path / "bare"), "holds results already.*--overwrite"
    )
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "merged")
    refused(leantune("train", finished / "recipe.toml", "--out", out), "holds a run already.*--overwrite")
    (out / "adapter").mkdir()
    (out / "adapter" / "thesis.txt").write_text("not ours")
    again = ("train", finished / "recipe.toml", "--out", out, "--overwrite", "--max-steps", 2)
    refused(leantune(*again), "would delete 'thesis.txt'")
    (out / "adapter" / "thesis.txt").unlink()
    assert leantune(*again).exit_code == 0
    assert len([row for row in rows(out) if "loss" in row]) == 2
    assert {f.name for f in out.glob("checkpoint-*")} == {"checkpoint-2"}


def test_training_goes_on_from_an_adapter(finished: Path, work: Path, tmp_path: Path) -> None:
    common = ["train", "--model", work / "base", "--data", work / "data.jsonl", *FIELDS, "--max-steps", 1]
    given = [*common, "--adapter", finished / "adapter"]
    result = leantune(*given, "--out", tmp_path / "on")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "on" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"]) == (4, 0.1)
    assert adapter_bytes(tmp_path / "on") != adapter_bytes(finished)
    refused(leantune(*given, "--out", finished, "--overwrite"), "would replace the adapter")
    assert (finished / "adapter").is_dir()


def test_full_fine_tuning_writes_a_model(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    result = leantune("train", "--model", work / "base", "--data", work / "data.jsonl", *FIELDS, "--method", "full",
                      "--max-steps", 2, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not (out / "adapter").exists()
    assert leantune("generate", "--model", out / "model", "--prompt", "hello", "--max-new-tokens", 2).exit_code == 0


def test_what_cannot_work_is_refused_before_training(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(train(work, out, "--rank", 999), "rank=999 exceeds out_features=32")
    refused(train(work, out, "--targets", "nothing"), r"targets=\['nothing'\] match no linear layer")
    refused(train(work, out, "--model", tmp_path / "none"), "does not exist")
    refused(train(work, out, "--data", tmp_path / "none.jsonl"), "does not exist")
    refused(train(work, out, "--eval-every", 2), "eval_every=2 needs eval_data")
    refused(leantune("train", "--model", "m", "--data", "d"), "out is missing; give --out")
    assert not out.exists()


def test_a_malformed_line_is_named_without_a_traceback(work: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(RECORDS[0]) + "\n" + '{"question": "hello"\n')
    arguments = ["eval", "--model", work / "base", "--data", bad, *FIELDS]
    refused(leantune(*arguments), "bad.jsonl:2: ")


def test_debug_shows_the_traceback(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANTUNE_DEBUG", "1")
    result = leantune("eval", "--model", tmp_path / "none", "--data", work / "data.jsonl")
    assert "does not exist" in str(result.exception)


def test_a_forced_kernel_that_does_not_exist_is_an_error(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANTUNE_IMPL", "warp")
    result = leantune("eval", "--model", work / "base", "--data", work / "data.jsonl", *FIELDS)
    refused(result, "LEANTUNE_IMPL=warp: 'warp' is no implementation")


@pytest.fixture
def endless(work: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that goes on until it is stopped, at its second step or later."""
    out = tmp_path / "endless"
    running = process(*train_arguments(work, out), "--max-steps", 1_000_000)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 2:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)
    yield running
    running.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    endless: subprocess.Popen[str], signum: signal.Signals, tmp_path: Path
) -> None:
    endless.send_signal(signum)
    _, stderr = endless.communicate(timeout=60)
    assert endless.returncode == 130, stderr
    assert "--resume" in stderr and "Traceback" not in stderr
    assert (tmp_path / "endless" / f"checkpoint-{rows(tmp_path / 'endless')[-1]['step']}").is_dir()
    assert not (tmp_path / "endless" / "adapter").exists()


def test_sigterm_stops_a_run_that_ignores_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    from leantune.commands.train import _terminable

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), _terminable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_eval_prints_json_alone_and_agrees_with_the_run(finished: Path, work: Path) -> None:
    running = process("eval", "--model", work / "base", "--adapter", finished / "adapter", "--data",
                      work / "data.jsonl", *FIELDS, "--json", "--batch-tokens", 32)  # fmt: skip
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 0, stderr
    got = json.loads(stdout)
    assert stdout.count("\n") == 1
    assert set(got) == {"loss", "perplexity", "tokens"}
    last = rows(finished)[-1]
    assert got["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert got["tokens"] == last["eval_tokens"]


def test_eval_of_the_merged_model_agrees(finished: Path, work: Path) -> None:
    result = leantune("eval", "--model", finished / "merged", "--data", work / "data.jsonl", *FIELDS, "--json")
    assert json.loads(result.stdout)["loss"] == pytest.approx(rows(finished)[-1]["eval_loss"], rel=1e-5)
    plain = leantune("eval", "--model", finished / "merged", "--data", work / "data.jsonl", *FIELDS)
    assert re.fullmatch(r"loss \d+\.\d{4}  perplexity \d+\.\d{3}  tokens \d+\n", plain.stdout)


def test_merge_writes_what_train_merges(finished: Path, work: Path, tmp_path: Path) -> None:
    given = ["merge", "--model", work / "base", "--adapter", finished / "adapter", "--out", tmp_path / "merged"]
    assert leantune(*given).exit_code == 0
    written = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert written == (finished / "merged" / "model.safetensors").read_bytes()
    refused(leantune(*given), "exists and is not empty.*--overwrite")
    refused(leantune(*given, "--overwrite", "--dtype", "int8"), "dtype='int8' is unknown")
    assert leantune(*given, "--overwrite", "--dtype", "bfloat16").exit_code == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_generate_writes_the_text_alone(work: Path) -> None:
    given = ["generate", "--model", work / "base", "--max-new-tokens", 5]
    asked = leantune(*given, "--prompt", "hello")
    assert asked.exit_code == 0, asked.output
    assert leantune(*given, stdin="hello\n").stdout == asked.stdout
    assert leantune(*given, "--prompt", "hello", "--system", "answer").stdout != asked.stdout
    assert leantune(*given, "--prompt", "hello", "--raw").stdout != asked.stdout
    drawn = [*given, "--prompt", "hello", "--temperature", 2, "--top-k", 200, "--top-p", 0.99]
    assert leantune(*drawn, "--seed", 1).stdout == leantune(*drawn, "--seed", 1).stdout
    assert leantune(*drawn, "--seed", 1).stdout != leantune(*drawn, "--seed", 2).stdout


def test_generate_refuses_what_it_cannot_answer(work: Path, tmp_path: Path) -> None:
    given = ["generate", "--model", work / "base"]
    refused(leantune(*given, stdin="\n"), "the prompt is empty")
    refused(leantune(*given, "--prompt", "x", "--raw", "--system", "y"), "give one of them")
    refused(leantune(*given, "--prompt", "x", "--top-p", 0), "top_p=0.0")
    shutil.copytree(work / "base", tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template*"))
    refused(leantune("generate", "--model", tmp_path / "plain", "--prompt", "x"), "no chat template; use --raw")


def test_inspect_data_shows_samples_packed(work: Path) -> None:
    given = ["inspect-data", "--model", work / "base", "--data", work / "data.jsonl", *FIELDS]
    result = leantune(*given, "--index", 1, "--index", 3)
    assert result.exit_code == 0, result.output
    assert "segment 1: sample 3 from data.jsonl:4" in result.stdout
    assert "segment 0: sample 0" in leantune(*given).stdout
    refused(leantune(*given, "--index", 4), "index=4: .* has 4 samples")
    refused(leantune(*given[:5], "--field", "question"), "must be COLUMN=NAME")


def test_kernels_lists_every_op_with_reasons() -> None:
    import leantune_kernels

    table = json.loads(leantune("kernels", "--json").stdout)
    assert sorted(table) == leantune_kernels.ops()
    assert table["rms_norm"]["reference"] is None and table["rms_norm"]["cuda"]
    shown = leantune("kernels").stdout
    assert "rms_norm" in shown and "yes" in shown and "RMSNorm: y = " in shown
    assert "(1) " in shown, "the reasons are listed below the table"
    assert json.loads(leantune("kernels", "--json", "--dtype", "bfloat16").stdout)["rms_norm"]["cpu"] is None
    refused(leantune("kernels", "--dtype", "int8"), "dtype='int8' is unknown; use float32, bfloat16, float16")
    refused(leantune("kernels", "--op", "rope"), "add it")


def test_kernels_says_what_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANTUNE_IMPL", "reference,rms_norm:cpu")
    table = json.loads(leantune("kernels", "--json").stdout)
    assert table["rms_norm"]["forced"] == "cpu" and table["rope"]["forced"] == "reference"
    shown = leantune("kernels").stdout
    assert "LEANTUNE_IMPL forces cpu" in shown and "LEANTUNE_IMPL forces reference" in shown
    monkeypatch.setenv("LEANTUNE_IMPL", "rope:cpu")
    assert "forced" not in json.loads(leantune("kernels", "--json").stdout)["rms_norm"]
    monkeypatch.setenv("LEANTUNE_IMPL", "rmsnorm:reference")
    refused(leantune("kernels"), "LEANTUNE_IMPL=rmsnorm:reference: 'rmsnorm' is no op; use .*rms_norm")
    refused(leantune("kernels", "--json"), "'rmsnorm' is no op")


def test_kernels_check_runs_the_conformance_kit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "kernels")
    given = ("kernels", "--check", "--op", "rms_norm", "--dtype", "float32")
    result = leantune(*given, "--implementation", "cpu")
    assert result.exit_code == 0 and "rms_norm" in result.stdout and "ok" in result.stdout, result.output
    result = leantune(*given, "--impl", "wrong_rms_norms:without_eps")
    assert result.exit_code == 1 and "FAILED" in result.stdout, result.output
    (report,) = json.loads(leantune(*given, "--impl", "wrong_rms_norms:without_eps", "--json").stdout)
    assert not report["passed"] and set(report["failures"]) == {"error"}
    result = leantune(*given, "--implementation", "cuda", "--json")
    (report,) = json.loads(result.stdout, parse_constant=pytest.fail)
    assert result.exit_code == 1 and report["skipped"] and not report["passed"] and report["allowed"] is None
    refused(leantune("kernels", "--check", "--op", "norm"), "op='norm' is unknown; use .*rms_norm")


def test_threads_are_set_before_anything_runs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    leantune("eval", "--model", work / "none", "--data", "none", "--threads", 3)
    train(work, work / "never", "--model", work / "none", "--threads", 2)
    assert calls == [3, 2]
