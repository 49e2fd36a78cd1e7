"""Collects the wheels that sfllm needs on a GPU machine without a network: `make gpu-wheels`.

Takes what sfllm's parts require, all the way down, without what such a machine has already: torch,
triton, transformers, and the libraries that came with them. Versions are those of `constraints.txt`.
Prints how to install them there. `--have` names a file with the machine's own `pip list` or `pip freeze`,
which leaves out all that it has, in whatever version. Run it in a development environment: what sfllm's
requirements require is read from what is installed here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Set
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("gateway", "scheduler", "worker", "cli", "gpu")
CHECKS_REQUIRE = ("pytest",)
"""What `bench.gpu_check` compares with is shared with the tests."""

PRESENT = {"torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "huggingface-hub"}
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)
"""Second numbers of the glibc 2 releases that wheels name; pip wants each spelled out."""
LIMIT_MIB = 60


def main() -> int:
    """Download, check the size, print the command; 1 when it does not fit or something is not to be had."""
    arguments = _arguments()
    python: str = arguments.python
    present = PRESENT | (names_in(arguments.have.read_text()) if arguments.have else set())
    wanted = required(carried_requirements((ROOT / "pyproject.toml").read_text()), python, present)
    pins = pinned((ROOT / "constraints.txt").read_text())
    unknown = sorted(wanted - pins.keys())
    if unknown:
        print(f"gpu-wheels: constraints.txt has no version of {', '.join(unknown)}", file=sys.stderr)
        return 1
    shutil.rmtree(arguments.out, ignore_errors=True)
    if subprocess.run(
        download([f"{name}=={pins[name]}" for name in sorted(wanted)], arguments.out, python), check=False
    ).returncode:
        return 1
    wheels = sorted(arguments.out.glob("*.whl"))
    carried, tree = total_mib(wheels), total_mib(tree_files())
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
    print(f"{carried:8.2f} MiB in {len(wheels)} wheels, {tree:.2f} MiB of source: {carried + tree:.2f} MiB")
    if carried + tree > LIMIT_MIB:
        print(f"gpu-wheels: together they are over {LIMIT_MIB} MiB", file=sys.stderr)
        return 1
    print(instructions(arguments.out))
    return 0


def carried_requirements(project: str) -> list[str]:
    """What sfllm's parts require, of the text of `pyproject.toml`, and its checks."""
    table = tomllib.loads(project)["project"]
    return [
        *table["dependencies"],
        *(line for part in PARTS for line in table["optional-dependencies"][part]),
        *CHECKS_REQUIRE,
    ]


def required(requirements: Iterable[str], python: str, present: Set[str]) -> set[str]:
    """Names of all that these requirements, as `name[extra]>=1`, bring along on Linux.

    What is present is left out, with what only it requires. Distributions that are not installed here
    count as requiring nothing.
    """
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    waiting, seen = [(line, "") for line in requirements], set()
    while waiting:
        line, of_extra = waiting.pop()
        requirement = Requirement(line)
        name = str(canonicalize_name(requirement.name))
        marker = requirement.marker
        if name in present or (marker and not marker.evaluate({**environment, "extra": of_extra})):
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [(child, extra) for child in _requirements(name)]
    return {name for name, _ in seen}


def _requirements(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def pinned(constraints: str) -> dict[str, str]:
    """Versions by name of lines such as `name==1.2`."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE)
    return {str(canonicalize_name(name)): version for name, version in lines}


def names_in(listing: str) -> set[str]:
    """Names in the output of `pip list` or `pip freeze`."""
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)(?:==|\s+)\S", listing, re.MULTILINE)
    return {str(canonicalize_name(name)) for name in found} - {"package"}


def download(pins: list[str], out: Path, python: str) -> list[str]:
    """The command that downloads wheels for another Python than this one."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64"]
    platforms += ["manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", f"--python-version={python}", "--implementation=cp"]
    return [*command, *(f"--platform={platform}" for platform in platforms), f"--dest={out}", *pins]


def tree_files() -> list[Path]:
    """What git tracks or would track here."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def total_mib(files: Iterable[Path]) -> float:
    """Their size together."""
    return sum(file.stat().st_size for file in files) / 2**20


def instructions(out: Path) -> str:
    """What to run on the other machine, from the root of a copy of this tree with the wheels in it."""
    try:
        folder = out.resolve().relative_to(ROOT)
    except ValueError:
        folder = out
    commit = f" --commit {known}" if (known := _commit()) else ""
    wheels = "" if out.resolve() == ROOT / "build" / "gpu-wheels" else f"WHEELS={folder} "
    return f"""
There, at the root of a copy of this tree that has the wheels in {folder} (docs/gpu.md has it in pieces):

  {wheels}. bench/gpu_bench/environment.sh
  python3 -m bench.gpu_check{commit}
  python3 -m bench.gpu_bench all{commit}"""


def _commit() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_wheels", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-wheels", help="the folder, emptied first")
    add("--python", default="3.12", help="the other machine's Python")
    add("--have", type=Path, help="a file with the other machine's `pip list`")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
