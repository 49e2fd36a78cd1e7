"""What a worker tells its scheduler of itself: prefill that is left, speed of steps, cached prompts. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence as Seq
from typing import NamedTuple

from sfllm.bands import band_of
from sfllm.messages import WorkerBeat, WorkerProgress
from sfllm.prefixes import CHUNK_TOKENS, MAX_SUMMARY_PREFIXES
from sfllm.step_curve import StepCurveFit
from sfllm.wire import Array, as_array
from sfllm_worker.engine.interface import EngineInterface, StepResult
from sfllm_worker.protocol_results import Outgoing

MAX_NAMES = 8 * MAX_SUMMARY_PREFIXES
"""Beginnings of prompts that are remembered, those used last; each is looked up for every beat."""


class _Look(NamedTuple):
    slots: int
    step_curve: tuple[float, ...]
    bands: tuple[int, ...]
    names: Array


class Feedback:
    """Owner of what was measured and of the names of prompts; the counts of grants are those of one lease."""

    def __init__(self, engine: EngineInterface) -> None:
        self._engine = engine
        self._grants = 0
        self._said: tuple[int, int] | None = None
        self._fit = StepCurveFit()
        self._last_ended: float | None = None
        self._look = _Look(0, (), (), as_array("Q", ()))
        self._block_of: OrderedDict[int, bytes] = OrderedDict()

    def joined(self, shortest_first: bool) -> None:
        """A new lease: what was said under the older one is forgotten."""
        self._grants = 0
        self._said = None
        self._engine.shortest_first = shortest_first

    def granted(self) -> None:
        """A grant came."""
        self._grants += 1

    def prompt_came(self, names: Seq[int], hashes: Seq[bytes]) -> None:
        """A prompt whose beginnings have these names, and whose full blocks these hashes.

        A name stands for 64 tokens more than the one before; the last full block within them tells whether
        they are in the cache, since a block is found only together with all before it.
        """
        block_tokens = self._engine.kv_block_tokens
        for index, name in enumerate(names):
            blocks = (index + 1) * CHUNK_TOKENS // block_tokens
            if 0 < blocks <= len(hashes):
                self._block_of[name] = hashes[blocks - 1]
                self._block_of.move_to_end(name)
        while len(self._block_of) > MAX_NAMES:
            self._block_of.popitem(last=False)

    def measured(self, result: StepResult, started: float, ended: float) -> None:
        """A step was read. While there is work it takes from one result to the next: tokens come so often."""
        shape = result.shape
        if shape.prefill_tokens or shape.decode_rows:
            self._fit.add(*shape, ended - (started if self._last_ended is None else self._last_ended))
        self._last_ended = ended if self._engine.has_work else None

    def progress(self, lease: int) -> Outgoing | None:
        """What is left to prefill, if that was not said yet."""
        now = self._grants, self._engine.pending_prefill_tokens
        if now == self._said or (self._said is None and now == (0, 0)):
            return None
        self._said = now
        return Outgoing(WorkerProgress(lease, *now))

    def look(self) -> None:
        """See what beats are to carry from now on, and size batches by it."""
        engine, curve = self._engine, self._fit.curve()
        if curve is not None:
            engine.follow(curve)
        names = as_array("Q", self._cached_names())
        self._look = _Look(engine.slots, tuple(curve or ()), _counts(engine.context_lengths), names)

    def beat(self, lease: int, step: int, digest: int) -> Outgoing:
        """A beat, with what `look` saw last: it takes long enough not to be done for every step."""
        engine, look = self._engine, self._look
        beat = WorkerBeat(
            lease=lease,
            step=step,
            running=engine.num_running,
            waiting=engine.num_waiting,
            free_kv_tokens=engine.free_kv_tokens,
            digest=digest,
            slots=look.slots,
            step_curve=look.step_curve,
            bands=look.bands,
        )
        return Outgoing(beat, (look.names,))

    @property
    def step_curve(self) -> tuple[float, ...]:
        """What steps take, as of the last look: the parts of a `StepCurve`; nothing while it is unknown."""
        return self._look.step_curve

    def _cached_names(self) -> list[int]:
        names: list[int] = []
        for name in reversed(self._block_of):
            if self._engine.has_block(self._block_of[name]):
                names.append(name)
                if len(names) == MAX_SUMMARY_PREFIXES:
                    break
        return names


def _counts(lengths: Seq[int]) -> tuple[int, ...]:
    counts = Counter(map(band_of, lengths))
    return tuple(counts[band] for band in range(max(counts, default=-1) + 1))
