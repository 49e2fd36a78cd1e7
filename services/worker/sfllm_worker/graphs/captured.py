"""Decode steps as replays of captured graphs; see `keys.py` for which, `buffers.py` for their inputs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import structlog
import torch
from torch import Tensor

from sfllm_worker.graphs.buffers import StaticBuffers
from sfllm_worker.graphs.keys import GraphKey, GraphPlan, KeyIndex
from sfllm_worker.graphs.recorder import Recorder, Recording
from sfllm_worker.graphs.runner import EagerRunner, StepInputs
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.decoder import TextModel

_log = structlog.get_logger()


class CapturedRunner:
    """Replays a graph for steps of decodes alone that a captured key holds; runs all others eagerly.

    A graph ends at the logits. Owner of the recordings, which stand for addresses of the model's weights,
    of `kv` and of `buffers`: all of these live as long as the runner.

    `free_bytes` tells the device's free memory. Graphs of the plan's `later` keys are given up once all of
    them together have taken more than `reserved_bytes`, if that is given.
    """

    def __init__(
        self,
        decoder: TextModel,
        kv: KVCache,
        plan: GraphPlan,
        recorder: Recorder,
        free_bytes: Callable[[], int],
        reserved_bytes: int | None = None,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._plan = plan
        self._recorder = recorder
        self._free_bytes = free_bytes
        self._reserved_bytes = reserved_bytes
        self._eager = EagerRunner(decoder, kv)
        self._buffers = StaticBuffers(plan.keys, kv.block_size, kv.device)
        self._recordings: dict[GraphKey, Recording] = {}
        self._index = KeyIndex()
        self._waiting = deque(plan.later)
        self.figures = self._eager.figures

    def capture_first(self) -> None:
        """Capture what must be there before the first request."""
        for key in self._plan.first:
            self.capture(key)
        self._log_captured("CUDA graphs captured")

    def idle(self) -> bool:
        """Capture one of the later keys; True while there are more. It takes tens of milliseconds."""
        if not self._waiting:
            return False
        if self._reserved_bytes is not None and self.figures.memory_bytes >= self._reserved_bytes:
            return self._give_up()
        try:
            self.capture(self._waiting[0])
        except torch.OutOfMemoryError:
            # A graph that only saves padding is not worth a worker.
            return self._give_up()
        self._waiting.popleft()
        if not self._waiting:
            self._log_captured("all CUDA graphs captured")
        return bool(self._waiting)

    def _give_up(self) -> bool:
        _log.warning("no memory is left for further CUDA graphs", given_up=len(self._waiting))
        self._waiting.clear()
        return False

    @torch.inference_mode()
    def run(self, inputs: StepInputs) -> Tensor:
        """Logits, float32 [num_logit_rows, vocab_size]; valid until the next run."""
        key = self._key(inputs)
        if key is None:
            return self._eager.run(inputs)
        rows = inputs.batch.num_tokens
        self._buffers.fill(key, inputs.token_ids, inputs.batch)
        logits = self._recordings[key].replay()
        self.figures.replays += 1
        self.figures.padding_rows += key.batch - rows
        return logits[:rows]

    def _key(self, inputs: StepInputs) -> GraphKey | None:
        """The key for a step of decodes, each of which wants its logits; None for any other."""
        batch = inputs.batch
        if inputs.on_hidden is not None:
            return None
        if batch.num_decodes != len(batch.query_lens) or not inputs.wants_all_logits:
            return None
        return self._index.find(batch.num_tokens, max(batch.context_lens))

    @torch.inference_mode()
    def capture(self, key: GraphKey) -> None:
        """Capture one graph and use it from now on."""
        started, free_before = time.monotonic(), self._free_bytes()
        static = self._buffers.inputs(key)
        self._buffers.fill_padding(key)

        def step() -> Tensor:
            hidden = self._decoder.forward(static.token_ids, static.batch.positions, static.batch, self._kv)
            return self._decoder.logits(hidden)

        self._recordings[key] = self._recorder.capture(step)
        self._index.add(key)
        self.figures.captured += 1
        self.figures.capture_seconds += time.monotonic() - started
        self.figures.memory_bytes += max(0, free_before - self._free_bytes())

    def _log_captured(self, event: str) -> None:
        figures = self.figures
        _log.info(
            event,
            graphs=figures.captured,
            later=len(self._waiting),
            seconds=round(figures.capture_seconds, 2),
            memory_bytes=figures.memory_bytes,
            reserved_bytes=self._reserved_bytes,
        )
