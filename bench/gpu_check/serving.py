"""The whole stack over HTTP on the device: concurrent requests, and a worker that dies under its streams."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

from bench.gpu_check.checks import Check, Setting
from running_stack import RunningStack

READY_SECONDS = 200
REQUEST_SECONDS = 100
CHECK_SECONDS = 400.0


def checks(setting: Setting) -> list[Check]:
    """The stack as users start it."""
    return [
        Check("the stack over HTTP", partial(answers, setting), seconds=CHECK_SECONDS),
        Check(
            "streams go on when one of two workers on the device is killed",
            partial(failover, setting),
            seconds=CHECK_SECONDS,
        ),
    ]


def answers(setting: Setting) -> str:
    """Every one of many concurrent requests gets all its tokens, and a seeded text repeats."""
    count, tokens = (64, 64) if setting.on_gpu else (6, 8)
    with stack(*flags(setting)) as running:
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            texts = list(pool.map(lambda index: completion(running.url, index, tokens), range(count)))
        seconds = time.monotonic() - started
        assert completion(running.url, 0, tokens) == texts[0], "a seeded text is another one the second time"
        if setting.on_gpu:
            worker = running.worker_admins[0]
            replays = running.metric(worker, "sfllm:cuda_graph_replays_total", kind="replay")
            assert replays > 0, "no step was a graph"
    return f"{count} requests of {tokens} tokens in {seconds:.2f} s"


def failover(setting: Setting) -> str:
    """Greedy streams in float32 over two workers, undisturbed and with one worker killed: the same texts."""
    count, tokens = (8, 600) if setting.on_gpu else (4, 120)
    with stack(*flags(setting, dtype="float32"), workers=2) as running:
        expected = streamed(running.url, count, tokens, lambda: None)
        victim = running.worker_pids()[0]
        texts = streamed(running.url, count, tokens, lambda: os.kill(victim, signal.SIGKILL))
        moved = running.metric(running.scheduler_admin, "sfllm:request_migrations_total")
    assert moved > 0, "the killed worker had no streams"
    differ = sum(text != other for text, other in zip(texts, expected, strict=True))
    assert not differ, f"{differ} of {count} texts are others after the loss of a worker"
    return f"{count} streams of {tokens} tokens, {moved:.0f} of which moved"


def streamed(url: str, count: int, tokens: int, disturb: Callable[[], None]) -> list[str]:
    """Texts of concurrent streams; `disturb` is called once all of them have begun."""
    begun = threading.Barrier(count + 1, timeout=REQUEST_SECONDS)

    def read(index: int) -> str:
        with contextlib.closing(events(url, body(index, tokens) | {"stream": True})) as stream:
            parts = [next(stream)]
            begun.wait()
            parts += stream
        return "".join(parts)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        reading = [pool.submit(read, index) for index in range(count)]
        begun.wait()
        disturb()
        return [future.result(REQUEST_SECONDS) for future in reading]


def events(url: str, request: dict[str, Any]) -> Generator[str]:
    """The text of each event of a stream; AssertionError when it ends early or in an error."""
    done = False
    with post(url, request) as answer:
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            done = line.strip() == b"data: [DONE]"
            if not done:
                event = json.loads(line[6:])
                assert "error" not in event, event["error"]
                yield from (choice["text"] for choice in event["choices"])
    assert done, "a stream ended early"


def completion(url: str, index: int, tokens: int) -> str:
    """A whole text; AssertionError when it has not all of its tokens."""
    with post(url, body(index, tokens)) as answer:
        content = json.load(answer)
    made = content["usage"]["completion_tokens"]
    assert made == tokens, f"{made} of {tokens} tokens"
    return str(content["choices"][0]["text"])


def body(index: int, tokens: int) -> dict[str, Any]:
    """A request with a prompt of its own length."""
    prompt = [index % 200 + 3] * (8 + 13 * (index % 9))
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "seed": index}


def post(url: str, request: dict[str, Any]) -> Any:
    """The answer to a completion request."""
    data = json.dumps(request).encode()
    made = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(made, timeout=REQUEST_SECONDS)


def flags(setting: Setting, dtype: str = "auto") -> list[str]:
    """Random weights of a small shape."""
    model = "qwen3-0.6b" if setting.on_gpu else "tiny-qwen3"
    chosen = [
        f"--model={model}",
        "--load-format=dummy",
        f"--device={setting.device.type}",
        f"--dtype={dtype}",
    ]
    return [*chosen, "--max-context-length=1024", "--max-running-tokens=32768", "--lease-seconds=3"]


@contextlib.contextmanager
def stack(*arguments: str, workers: int = 1) -> Iterator[RunningStack]:
    """`sfllm serve`, ready, and stopped in the end. Starts on a GPU compile kernels, which takes a while."""
    running = RunningStack(*arguments, workers=workers)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while running.status("/ready") != 200:
            assert running.process.poll() is None, f"sfllm serve ended early:\n{running.log()}"
            assert time.monotonic() < deadline, f"sfllm serve was not ready in time:\n{running.log()}"
            time.sleep(0.1)
        if workers > 1:
            running.wait_for_metric(running.scheduler_admin, "sfllm:workers", workers)
        yield running
    finally:
        running.stop()
