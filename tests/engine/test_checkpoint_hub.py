"""From what the user typed to files: no test here touches the network."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from leantune.checkpoint.hub import PATTERNS, is_hub_id, resolve
from leantune.errors import CheckpointError


def answer(monkeypatch: pytest.MonkeyPatch, result: str | Exception) -> list[tuple[str, dict[str, Any]]]:
    """Let the hub answer with a directory or an error; returns the list of calls."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind: type[Exception], text: str) -> Exception:
    """One of the hub's errors without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


def test_existing_paths_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, AssertionError("the hub must not be asked"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "a.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert resolve("org/a.safetensors") == Path("org/a.safetensors")
    assert resolve("~/org/name") == tmp_path / "org" / "name"
    assert calls == []


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, str(tmp_path))
    assert resolve("HuggingFaceTB/SmolLM2-135M") == tmp_path
    assert calls == [("HuggingFaceTB/SmolLM2-135M", {"allow_patterns": PATTERNS})]
    assert not any("bin" in pattern or pattern == "*" for pattern in PATTERNS)


@pytest.mark.parametrize(
    "text",
    [
        "./model",
        "../model",
        "/no/such/model",
        "~/no-such-model",
        "a/b/c",
        "runs/demo/",
        "my model",
        "-x/y",
        "a/b.git",
        "a--b",
        "x" * 97,
    ],
)
def test_what_looks_like_a_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)  # where none of them exists
    calls = answer(monkeypatch, AssertionError("the hub must not be asked"))
    with pytest.raises(CheckpointError, match="does not exist; check the path") as caught:
        resolve(text)
    assert text in str(caught.value) and calls == []


def test_a_path_object_is_never_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, AssertionError("the hub must not be asked"))
    with pytest.raises(CheckpointError, match="directory org/name does not exist"):
        resolve(Path("org/name"))
    with pytest.raises(CheckpointError, match="the model is empty"):
        resolve("")
    assert calls == []


@pytest.mark.parametrize("text", ["gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M", "a/b_c.d-e", "1/2"])
def test_hub_ids(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "error, message",
    [
        (http_error(GatedRepoError, "403"), "'org/name' is gated; accept its terms"),
        (
            http_error(RepositoryNotFoundError, "404"),
            "hub has no model 'org/name' .*no directory of that name; check",
        ),
        (
            LocalEntryNotFoundError("not cached\nlong story"),
            "no directory 'org/name', and the hub cannot.*check the network.*not cached",
        ),
        (ConnectionError(), "no directory 'org/name'.*ConnectionError"),
    ],
)
def test_failures_name_the_model_and_the_fix(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    answer(monkeypatch, error)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve("org/name")
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)


def test_offline_mode_is_respected(tmp_path: Path) -> None:
    """The real library, offline, with an empty cache: an error at once, and no import before that."""
    code = (
        "import sys; from leantune.checkpoint import resolve; from leantune.errors import CheckpointError\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "try: resolve('org/name')\n"
        "except CheckpointError as error: print(error)"
    )
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "no directory 'org/name'" in result.stdout and "HF_HUB_OFFLINE" in result.stdout
