"""Streams through nginx that never stop coming, each compared with what a calm stack answered."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
from openai import OpenAI

STREAMS = 8
TOKENS = 60
PROMPTS = tuple(f"Tell me the story number {number}" for number in range(6))


class Load:
    """Clients that ask one request after another. `failures` has what went wrong, in words."""

    def __init__(self, url: str, model: str) -> None:
        # No retries: one that the library makes would hide a request that was lost.
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._model = model
        self._wanted = {prompt: self.text(prompt) for prompt in PROMPTS}
        self._stopping = threading.Event()
        self._prompts = itertools.cycle(PROMPTS)
        self._lock = threading.Lock()
        self.failures: list[str] = []
        self.finished = 0

    def text(self, prompt: str) -> str:
        """What a stream of that prompt says."""
        chunks = self._client.completions.create(
            model=self._model, prompt=prompt, max_tokens=TOKENS, seed=7, temperature=1.0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    def wait_for(self, more: int, seconds: float = 90) -> None:
        """Until so many more streams have ended. Raises AssertionError."""
        wanted, deadline = self.finished + more, time.monotonic() + seconds
        while self.finished < wanted:
            assert time.monotonic() < deadline, f"{self.finished} streams ended, not {wanted}"
            time.sleep(0.1)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                prompt = next(self._prompts)
            try:
                text = self.text(prompt)
                failure = "" if text == self._wanted[prompt] else f"another text: {text!r}"
            except openai.OpenAIError as error:
                failure = f"{type(error).__name__}: {error}"
            with self._lock:
                self.finished += 1
                if failure:
                    self.failures.append(failure)

    @contextmanager
    def running(self) -> Iterator[Load]:
        """While it is entered."""
        clients = [threading.Thread(target=self._run) for _ in range(STREAMS)]
        for client in clients:
            client.start()
        try:
            yield self
        finally:
            self._stopping.set()
            for client in clients:
                client.join(150)
            self._client.close()
