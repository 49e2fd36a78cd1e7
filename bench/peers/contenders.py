"""The servers that are compared: how each is started, and what its requests need.

Flags are those that served each peer best on a CPU, so that none loses by its defaults.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.peers.install import Installer
from bench.peers.models import Models

OURS = "sfllm"
OUR_SERVICES = ("sfllm_gateway", "sfllm_scheduler")
"""What serves beside the worker; together they are to take little of one core."""
QUANTIZED = ("int8", "int4")
MAX_MODEL_TOKENS = 4096
SLOTS = 16
# The longest request of the workloads is 2,048 tokens in and 512 out.
SLOT_TOKENS = 2816
_TCMALLOC = "libtcmalloc_minimal.so.4"
_LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")


@dataclass(frozen=True)
class Contender:
    """One server of the comparison. `command` has `{port}` where its port goes."""

    name: str
    precision: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str = "m"
    ignore_eos: bool = True
    extra_body: str = "{}"
    workloads: tuple[str, ...] = ("W1", "W2", "W3", "W4")
    ready_path: str = "/health"
    """Answers with success once the server can serve."""
    most_requests: int | None = None
    """Requests of a workload at most, for one that would take minutes for all of them."""


class Setup(NamedTuple):
    """What contenders are made from."""

    installer: Installer
    models: Models
    cores: int
    our_arguments: Sequence[str] = ()
    preload: Sequence[str] = ()


def ours(setup: Setup, quantization: str | None = None) -> Contender:
    """This project, as its environment runs it; quantized ones read the published file."""
    sfllm = str(Path(sys.executable).with_name("sfllm"))
    model = setup.models.gguf if quantization else setup.models.directory
    command = (sfllm, "serve", "--model", str(model), "--served-model-name", "m", "--port", "{port}")
    command += ("--dtype", "bfloat16", *(("--quantization", quantization) if quantization else ()))
    name = f"{OURS}-{quantization}" if quantization else OURS
    # The seed's table is about this project at its model's own precision.
    workloads = ("W1", "W2", "W3", "W4") if quantization else ("W1", "W2", "W3", "W4", "seed")
    precision, command = quantization or "bf16", (*command, *setup.our_arguments)
    return Contender(name, precision, command, ready_path="/ready", workloads=workloads)


def vllm(setup: Setup) -> Contender:
    """vLLM's build for CPUs, on all cores, with the allocator and the OpenMP that it recommends."""
    environment = setup.installer.vllm()
    openmp = next(environment.glob("lib/python*/site-packages/vllm/lib/libiomp5.so"), None)
    openmp = openmp or next(environment.glob("lib/libiomp5.so"), None)
    preload = [*setup.preload, *([str(openmp)] if openmp else [])]
    found = [path for folder in _LIBRARY_FOLDERS if (path := Path(folder, _TCMALLOC)).exists()]
    if not any(_TCMALLOC in library for library in preload) and found:
        preload.insert(0, str(found[0]))
    command = (
        *(str(environment / "bin" / "vllm"), "serve", str(setup.models.directory)),
        *("--served-model-name", "m", "--host", "127.0.0.1", "--port", "{port}"),
        *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_TOKENS)),
    )
    variables = {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.cores - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Contender("vllm", "bf16", command, variables)


def llama_cpp(setup: Setup, quantization: str | None = None) -> Contender:
    """llama.cpp's server, in bfloat16 or with weights that its own tool quantized.

    The default model is published in Q4_1, which is served as it is; others are made from it.
    """
    binaries = setup.installer.llama_cpp()
    if quantization == setup.models.published:
        model = setup.models.gguf
    else:
        model = setup.models.requantized(binaries / "llama-quantize", quantization or "BF16")
    name = f"llama.cpp-{quantization.lower()}" if quantization else "llama.cpp"
    command = (
        *(str(binaries / "llama-server"), "--model", str(model), "--alias", "m", "--offline"),
        *("--host", "127.0.0.1", "--port", "{port}", "--parallel", str(SLOTS)),
        *("--ctx-size", str(SLOTS * SLOT_TOKENS), "--flash-attn", "off", "--threads", str(setup.cores)),
    )
    return Contender(name, quantization or "bf16", command)


def transformers(setup: Setup) -> Contender:
    """`transformers serve` with continuous batching."""
    command = (
        *(str(setup.installer.transformers() / "bin" / "transformers"), "serve", str(setup.models.directory)),
        *("--continuous-batching", "--cb-num-blocks", "1024", "--cb-block-size", "32"),
        *("--cb-max-batch-tokens", "512", "--dtype", "bfloat16", "--device", "cpu"),
        *("--host", "127.0.0.1", "--port", "{port}"),
    )
    # Listing models fails without a cache directory, even an empty one.
    cache = setup.installer.root / "empty-hub-cache"
    cache.mkdir(exist_ok=True)
    return Contender(
        "transformers",
        "bf16",
        command,
        {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        model=str(setup.models.directory),
        ignore_eos=False,
        extra_body=json.dumps({"generation_config": json.dumps({"eos_token_id": -1})}),
    )


def generate(setup: Setup) -> Contender:
    """Plain `generate`, one request at a time, as a first server around transformers would do it."""
    python = str(setup.installer.transformers() / "bin" / "python")
    program = str(Path(__file__).with_name("plain_generate.py"))
    command = (python, program, str(setup.models.directory), "{port}")
    # One request at a time takes minutes where many come; a few of them on two workloads show it all.
    return Contender(
        "generate",
        "bf16",
        command,
        {"HF_HUB_OFFLINE": "1"},
        workloads=("W1", "W2"),
        ready_path="/v1/models",
        most_requests=8,
    )


PEERS: dict[str, Callable[[Setup], Contender]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "llama.cpp-q4_1": partial(llama_cpp, quantization="Q4_1"),
    "llama.cpp-q4_0": partial(llama_cpp, quantization="Q4_0"),
    "llama.cpp-q8_0": partial(llama_cpp, quantization="Q8_0"),
    "transformers": transformers,
    "generate": generate,
}
OUR_FORMS: dict[str, Callable[[Setup], Contender]] = {
    OURS: ours,
    **{f"{OURS}-{name}": partial(ours, quantization=name) for name in QUANTIZED},
}
