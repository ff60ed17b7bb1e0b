"""Atomic writes: whatever goes wrong, the final name holds the old content or the new, never a part."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from leantune.checkpoint import atomic
from leantune.checkpoint.atomic import atomic_directory, atomic_file, leftovers, remove_directory, sweep
from leantune.errors import CheckpointError

# Beyond any process number that Linux hands out, so no process has it.
DEAD_PID = 2**22 + 1


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def leftover_name(name: str, pid: int = DEAD_PID, host: str = atomic._HOST, kind: str = "tmp") -> str:
    return f".{name}.leantune-{host}-{pid}-0123abcd.{kind}"


def fill(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)


def no_exchange(first: Path, second: Path) -> bool:
    return False


def test_file_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.safetensors"
    with atomic_file(target) as file:
        file.write(b"abc")
        assert not target.exists()
    assert target.read_bytes() == b"abc"
    assert names(target.parent) == [target.name]


def test_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_file_over_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory"), atomic_file(tmp_path):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failed_fsync_is_named_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    target = tmp_path / "a.json"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    expected = "cannot write .*a.json" + ("" if code == errno.EIO else ".*disk is full.*bytes free")
    with pytest.raises(CheckpointError, match=expected), atomic_file(target) as file:
        file.write(b"new")
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*out"),
        atomic_directory(tmp_path / "out") as folder,
    ):
        fill(folder, "new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_too_small_a_disk_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    needed = 2**62
    with (
        pytest.raises(CheckpointError, match=rf"{needed:,} bytes needed, [\d,]+ bytes free.*another disk"),
        atomic_file(tmp_path / "a", nbytes=needed),
    ):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == []


def test_a_disk_that_fills(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        (tmp_path / "a.json").write_bytes(b"old")
        with (
            pytest.raises(CheckpointError, match=r"a\.json: the disk is full"),
            atomic_file(tmp_path / "a.json") as file,
        ):
            file.write(bytes(2**20))
        with (
            pytest.raises(CheckpointError, match="out: the disk is full"),
            atomic_directory(tmp_path / "out") as folder,
        ):
            (folder / "model.safetensors").write_bytes(bytes(2**20))
        assert (tmp_path / "a.json").read_bytes() == b"old"
        assert names(tmp_path) == ["a.json"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_directory_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "out"
    with atomic_directory(target) as folder:
        fill(folder, "new")
        (folder / "nested").mkdir()
        assert not target.exists()
    assert (target / "config.json").read_text() == "new"
    assert names(target.parent) == ["out"]


def test_an_empty_directory_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:
        fill(folder, "new")
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_existing_directory_needs_overwrite(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    with (
        pytest.raises(
            CheckpointError, match="not empty; choose another directory or pass overwrite=True / --overwrite"
        ),
        atomic_directory(tmp_path),
    ):
        raise AssertionError("the block must not run")
    assert (tmp_path / "config.json").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_the_whole_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", no_exchange)
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    (target / "model.safetensors").write_bytes(b"old")
    with atomic_directory(target, overwrite=True) as folder:
        fill(folder, "new")
    assert (target / "config.json").read_text() == "new"
    assert names(target) == ["config.json"]
    assert names(tmp_path) == ["out"]


def test_overwrite_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    fill(real, "old")
    (tmp_path / "out").symlink_to(real)
    with atomic_directory(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "new")
    assert (tmp_path / "out").is_symlink()
    assert (real / "config.json").read_text() == "new"


@pytest.mark.parametrize("precious", ["thesis.tex", "photos"])
def test_overwrite_never_deletes_other_things(tmp_path: Path, precious: str) -> None:
    fill(tmp_path, "old")
    if precious == "photos":
        (tmp_path / precious).mkdir()
    else:
        (tmp_path / precious).write_text("years of work")
    with (
        pytest.raises(CheckpointError, match=f"would delete '{precious}'"),
        atomic_directory(tmp_path, overwrite=True),
    ):
        raise AssertionError("the block must not run")
    assert (tmp_path / precious).exists()


def test_leftovers_of_dead_processes_are_swept_and_no_others(tmp_path: Path) -> None:
    dead_file, dead_folder = tmp_path / leftover_name("a.json"), tmp_path / leftover_name("checkpoint-3")
    alive = tmp_path / leftover_name("b.json", pid=os.getppid())
    elsewhere = tmp_path / leftover_name("c.json", host="00000000" if atomic._HOST != "00000000" else "11111111")
    for path in (dead_file, alive, elsewhere):
        path.write_bytes(b"half")
    dead_folder.mkdir()
    fill(dead_folder, "half")
    assert leftovers(tmp_path) == sorted([dead_file, dead_folder])
    with atomic_file(tmp_path / "d.json") as file:
        file.write(b"{}")
    assert names(tmp_path) == sorted([alive.name, elsewhere.name, "d.json"])


def test_own_number_of_an_earlier_life_is_swept_but_work_in_flight_is_not(tmp_path: Path) -> None:
    earlier = tmp_path / leftover_name("a.json", pid=os.getpid())
    earlier.write_bytes(b"half")
    with atomic_directory(tmp_path / "out") as outer:
        assert not earlier.exists()
        with atomic_file(tmp_path / "b.json") as file:
            file.write(b"{}")
        fill(outer, "new")
    assert names(tmp_path) == ["b.json", "out"]


def test_killed_between_the_two_renames_is_restored(tmp_path: Path) -> None:
    """Without an exchange call there is a moment when nothing has the final name; the next write mends it."""
    set_aside = tmp_path / leftover_name("out", kind="old")
    set_aside.mkdir()
    fill(set_aside, "old")
    sweep(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_restored_directory_still_needs_overwrite(tmp_path: Path) -> None:
    set_aside = tmp_path / leftover_name("out", kind="old")
    set_aside.mkdir()
    fill(set_aside, "old")
    with pytest.raises(CheckpointError, match="--overwrite"), atomic_directory(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_failed_second_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    rename, calls = Path.rename, []

    def fail_second(source: Path, destination: Path) -> Path:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(source, destination)

    monkeypatch.setattr(atomic, "_exchange", no_exchange)
    monkeypatch.setattr(Path, "rename", fail_second)
    with (
        pytest.raises(CheckpointError, match="cannot write"),
        atomic_directory(target, overwrite=True) as folder,
    ):
        fill(folder, "new")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            with atomic_file(tmp_path / f"{number}.json") as file:
                file.write(str(number).encode() * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == [f"{number}.json" for number in range(4)]
    assert all((tmp_path / f"{n}.json").read_bytes() == str(n).encode() * 1000 for n in range(4))


def test_remove_directory_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    fill(tmp_path / "checkpoint-1", "x")
    remove_directory(tmp_path / "checkpoint-1")
    assert names(tmp_path) == []


# One interpreter loads PyTorch once and forks the victims, so that many kills cost little.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from leantune.checkpoint import atomic, atomic_directory, atomic_file
from leantune.checkpoint import latest_state, load_state, prune, save_state
torch.set_num_threads(1)
root, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    atomic._exchange = lambda first, second: False

def victim():
    number = 0
    while True:
        number += 1
        text = json.dumps([number] * 2000)
        with atomic_file(root / "file.json") as file:
            for start in range(0, len(text), 1000):
                file.write(text[start : start + 1000].encode())
        with atomic_directory(root / "folder", overwrite=True) as folder:
            (folder / "a.json").write_text(text)
            (folder / "b.json").write_text(text)
        weights = torch.full((5000,), float(number))
        save_state(root / f"checkpoint-{number % 3}", {"w": weights}, {"step": number})
        prune(root, 2)

def intact():
    values = json.loads((root / "file.json").read_text())
    assert len(values) == 2000 and len(set(values)) == 1, "half a file"
    if not exchange:
        atomic.sweep(root)
    first, second = ((root / "folder" / name).read_text() for name in ("a.json", "b.json"))
    assert first == second, "half a folder"
    states = [p for p in root.iterdir() if p.name.startswith("checkpoint-")]
    assert states and latest_state(root) in states
    for state in states:
        tensors, meta = load_state(state)
        assert tensors["w"].tolist() == [meta["step"]] * 5000, "a state of two steps"

random.seed(7)
seen = 0
for kill in range(30):
    pid = os.fork()
    if pid == 0:
        try:
            victim()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while kill == 0 and not list(root.glob("checkpoint-2")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() * 0.1)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the victim died by itself"
    seen += len(atomic.leftovers(root))
    intact()
assert seen, "no kill ever hit a write"
with atomic_file(root / "last.json") as file:
    file.write(b"{}")
names = [p.name for p in root.iterdir() if ".leantune-" in p.name]
assert not names, names
print("leftovers seen:", seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("mode", ["exchange", "two renames"])
def test_kill_at_any_moment(tmp_path: Path, mode: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), mode],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
