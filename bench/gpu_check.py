"""Proves the plain torch path on a GPU: `make gpu-check`.

Checks, each against float64 on the CPU: paged attention in every number format, and a tiny
random Llama and Qwen3 against transformers' own model in float64. Then it serves a dummy
Qwen3-0.6B over HTTP through all three processes. `--device cpu` runs the same checks where
there is no GPU, which proves the script, not the GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import load_model
from sfllm_worker.model.attention import AttentionBatch, TorchAttention
from sfllm_worker.model.config import ModelConfig

READY_TIMEOUT_SECONDS = 180
REQUEST_TIMEOUT_SECONDS = 240
OUTPUT_TOKENS = 32

# The largest error against float64 that rounding in each format explains.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def main() -> int:
    """Run every check, print a table, and return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--serve-model", default="qwen3-0.6b", help="built-in shape to serve with dummy weights"
    )
    parser.add_argument("--requests", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no usable GPU here, so nothing was checked", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    print(f"gpu-check on {name}, torch {torch.__version__}, Python {platform.python_version()}")
    checks: list[tuple[str, Callable[[], str]]] = [
        *((f"paged attention {dtype}", lambda d=dtype: check_attention(device, d)) for dtype in TOLERANCES),
        ("tiny Llama against transformers", lambda: check_model(device, "LlamaForCausalLM")),
        ("tiny Qwen3 against transformers", lambda: check_model(device, "Qwen3ForCausalLM")),
        (
            f"dummy {arguments.serve_model} over HTTP",
            lambda: check_serving(arguments.device, arguments.serve_model, arguments.requests),
        ),
    ]
    failures = sum(not run(title, check) for title, check in checks)
    print(f"{len(checks) - failures} passed, {failures} failed")
    return 1 if failures else 0


def run(title: str, check: Callable[[], str]) -> bool:
    """Run one check and print its row."""
    try:
        result, passed = check(), True
    except (AssertionError, RuntimeError, OSError) as error:
        result, passed = f"{type(error).__name__}: {error}", False
    print(f"{'ok    ' if passed else 'FAILED'} {title}: {result}", flush=True)
    return passed


def check_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Decodes and chunks over scattered blocks, against dense attention in float64."""
    config = ModelConfig.from_hf(CONFIG)
    generator = torch.Generator().manual_seed(0)
    block_size, contexts, queries = 16, [1, 16, 17, 300, 45, 130], [1, 1, 1, 1, 45, 30]
    kv = KVCache(config, 64, block_size, dtype, device)
    order = torch.randperm(63, generator=generator).tolist()
    tables = [[order.pop() + 1 for _ in range(-(-context // block_size))] for context in contexts]
    keys, values, expected = [], [], []
    query_rows = []
    for context, query in zip(contexts, queries, strict=True):
        shape = (context, config.num_kv_heads, config.head_dim)
        k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        q = torch.randn(query, config.num_heads, config.head_dim, generator=generator).to(dtype)
        keys.append(k)
        values.append(v)
        query_rows.append(q)
        expected.append(dense_attention(q.double(), k.double(), v.double()))
    backend, layer = TorchAttention(config), kv.layers[0]
    fill = AttentionBatch.build(contexts, contexts, tables, block_size, device)
    backend.begin(fill).write_kv(layer, torch.cat(keys).to(device), torch.cat(values).to(device))
    batch = AttentionBatch.build(queries, contexts, tables, block_size, device)
    actual = backend.begin(batch).attend(layer, torch.cat(query_rows).to(device)).cpu().double()
    return within(actual, torch.cat(expected), TOLERANCES[dtype])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the newest queries, written out. All `[tokens, heads, head_dim]`."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@torch.inference_mode()
def check_model(device: torch.device, architecture: str) -> str:
    """Logits of a whole prompt in float32, against transformers' model in float64."""
    import transformers  # noqa: PLC0415 - only this check needs it

    values = {key: value for key, value in CONFIG.items() if key != "architectures"}
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    torch.manual_seed(0)
    reference = getattr(transformers, architecture)(config_class(**values, tie_word_embeddings=False))
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        (Path(directory) / "tokenizer.json").write_text("{}")
        model = load_model(directory, dtype="float32", device=device)
    length, block_size = 100, 16
    ids = torch.randint(0, CONFIG["vocab_size"], (length,), generator=torch.Generator().manual_seed(1))
    kv = KVCache(model.config, 9, block_size, torch.float32, device)
    batch = AttentionBatch.build([length], [length], [[3, 1, 7, 2, 8, 5, 4]], block_size, device)
    hidden = model.decoder.forward(ids.to(device), batch.positions, batch, kv)
    actual = model.decoder.logits(hidden).cpu().double()
    expected = reference.double()(ids[None]).logits[0]
    assert bool((actual.argmax(-1) == expected.argmax(-1)).all()), "greedy tokens differ"
    return within(actual, expected, 1e-4) + ", greedy tokens equal"


def within(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """The largest difference as text; AssertionError when it is over the tolerance."""
    error = float((actual - expected).abs().max())
    assert error <= tolerance, f"largest error {error:.2e} is over {tolerance:.0e}"
    return f"largest error {error:.1e} (at most {tolerance:.0e})"


def check_serving(device: str, model: str, requests: int) -> str:
    """The whole stack on random weights: every concurrent request gets all its tokens."""
    with served(device, model) as url:
        bodies = [
            {"prompt": [i % 200 + 1] * (8 + 40 * (i % 5)), "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
            for i in range(requests)
        ]
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(requests) as pool:
            answers = list(pool.map(lambda body: post(f"{url}/v1/completions", body), bodies))
        seconds = time.monotonic() - started
    counts = {answer["usage"]["completion_tokens"] for answer in answers}
    assert counts == {OUTPUT_TOKENS}, f"completion tokens {counts}, expected {OUTPUT_TOKENS}"
    return f"{requests} requests of {OUTPUT_TOKENS} tokens in {seconds:.2f} s"


@contextlib.contextmanager
def served(device: str, model: str) -> Iterator[str]:
    """`sfllm serve` on a free port, ready; stopped by its own process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sfllm_cli", "serve", f"--model={model}", "--load-format=dummy"]
    command += [f"--device={device}", f"--port={port}", "--max-context-length=1024"]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while not ready(url):
            assert process.poll() is None, f"sfllm serve ended with {process.returncode}"
            assert time.monotonic() < deadline, "sfllm serve did not become ready"
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ready(url: str) -> bool:
    """Whether the gateway can serve."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, get JSON."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_SECONDS) as answer:
        result: dict[str, Any] = json.load(answer)
        return result


if __name__ == "__main__":
    sys.exit(main())
