"""Where stages measure, and what they share: the model's size, engines, and how things are timed."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from bench.peers.roofline import ModelSize

from sfllm.messages import Sampling
from sfllm.settings import WorkerSettings
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.load.dummy import dummy_config
from sfllm_worker.startup import build

Row = dict[str, Any]

ROUNDS = 5


class Place(NamedTuple):
    """A device, and how much of everything is measured there. Quick is for trying the program."""

    device: torch.device
    quick: bool
    model: str

    @classmethod
    def of(cls, device: str, quick: bool) -> Place:
        """Quick runs take a tiny model."""
        return cls(torch.device(device), quick, "tiny-qwen3" if quick else "qwen3-0.6b")

    @property
    def on_gpu(self) -> bool:
        """Whether there are CUDA events and streams."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The number format that is measured."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def size(self) -> ModelSize:
        """The model's size."""
        raw = dummy_config(self.model)
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        return ModelSize(*(int(raw[name]) for name in (*names, "intermediate_size", "vocab_size")))

    def step_bytes(self, contexts: list[int]) -> int:
        """What a decode step must read: all weights, and the keys and values of these contexts."""
        size = self.size()
        cache = 2 * size.layers * size.kv_heads * size.head_dim * sum(contexts)
        return (size.weights + cache) * self.dtype.itemsize

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object], repeats: int) -> float:
        """The median of several rounds of so many launches, each launch's share."""
        work()
        shares = []
        for _ in range(ROUNDS):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            self.synchronize()
            shares.append((time.perf_counter() - started) / repeats * 1e3)
        return statistics.median(shares)

    @contextlib.contextmanager
    def engine(self, **options: Any) -> Iterator[Engine]:
        """A worker's engine as `sfllm serve` builds it; its memory is free afterwards."""
        settings: dict[str, Any] = {"model": self.model, "load_format": "dummy", "device": self.device.type}
        settings |= {"dtype": str(self.dtype).removeprefix("torch."), **options}
        gc.collect()  # an engine before this one
        if self.on_gpu:
            torch.cuda.empty_cache()
        engine = build(WorkerSettings(**settings)).engine
        assert isinstance(engine, Engine)
        yield engine
        for sequence in [*engine.planner.running, *engine.planner.waiting]:
            engine.cancel(sequence)


def add_prompts(engine: Engine, batch: int, prompt: int, output: int, vocabulary: int, seed: int = 0) -> None:
    """Give the engine sequences that share no prefix."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(batch):
        tokens = torch.randint(3, vocabulary, (prompt,), generator=generator).tolist()
        sampling = Sampling(max_tokens=output, seed=index, temperature=0.0, ignore_eos=True)
        engine.add(Sequence((seed, index), 0, tokens, prompt, sampling))


def run_until_decoding(engine: Engine, batch: int) -> None:
    """Prefill everything, and some steps more, so that graphs and caches are warm."""
    steady = 0
    while steady < 4:
        steady = steady + 1 if engine.step().num_tokens == batch and not engine.planner.waiting else 0


def cancel_all(engine: Engine) -> None:
    """Forget all sequences, and what is still in flight of them."""
    for sequence in [*engine.planner.running, *engine.planner.waiting]:
        engine.cancel(sequence)
    while engine.has_work:
        engine.step()
