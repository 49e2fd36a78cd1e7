"""A device that works later: what is launched runs, in order, when somebody waits for it.

Runner, cache and sampler around it behave as on a GPU. A tensor of the device cannot be looked at without
waiting, and every wait but the reading of tokens is counted. Blocks of steps that were launched and not
read are known, so that handing one of them out is an error, and whatever is handed out is spoiled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch

from sfllm_worker.engine.engine import Engine
from sfllm_worker.graphs.runner import GraphRunner, StepInputs
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.sampler import Sampled, sample


class FakeDevice:
    """A queue of work. `log` says in which order steps, numbered from 1, were launched and read."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self.host_waits = 0
        self.log: list[tuple[str, int]] = []
        self.launched = 0
        self.busy_blocks: dict[int, set[int]] = {}
        """Blocks that each step which was launched and not read may touch."""
        self._copied: set[int] = set()

    def launch(self, work: Callable[[], Any]) -> Later:
        """Queue work; its result is there when it has run."""
        later = Later(self, work, in_queue=True)
        self._queue.append(later.run)
        return later

    def run(self, count: int) -> None:
        """Do the oldest `count` pieces of work."""
        for _ in range(min(count, len(self._queue))):
            self._queue.popleft()()

    def wait(self, later: Later) -> None:
        """Work until this result is there."""
        while not later.is_there:
            self._queue.popleft()()

    def synchronize(self) -> None:
        """Work until everything is done: what a careless host makes a GPU do."""
        self.host_waits += 1
        self.run(len(self._queue))

    def copies(self, blocks: Seq[int]) -> None:
        """The step that is launched next copies between these blocks."""
        self._copied.update(blocks)

    def begin_step(self, blocks: set[int]) -> None:
        self.launched += 1
        self.log.append(("launch", self.launched))
        self.busy_blocks[self.launched] = blocks | self._copied
        self._copied = set()

    def end_step(self, step: int) -> None:
        self.log.append(("read", step))
        del self.busy_blocks[step]


class Later:
    """A tensor of the device, or what torch makes of one: computed when all that was launched before is."""

    def __init__(self, device: FakeDevice, compute: Callable[[], Any], in_queue: bool = False) -> None:
        self._device = device
        self._compute = compute
        self._in_queue = in_queue
        self._result: Any = None
        self.is_there = False

    def run(self) -> None:
        if not self.is_there:
            self._result = self._compute()
            self.is_there = True

    def result(self) -> Any:
        """What was computed. For the device's own work, which runs in order."""
        assert self.is_there or not self._in_queue, "something runs before what it needs"
        self.run()
        return self._result

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _types: object, args: Any = (), kwargs: Any = None
    ) -> Later:
        first = next(argument for argument in args if isinstance(argument, Later))
        return Later(first._device, lambda: function(*map(resolved, args), **(kwargs or {})))

    def __getitem__(self, key: Any) -> Later:
        return Later(self._device, lambda: self.result()[key])

    def index_select(self, dim: int, index: torch.Tensor) -> Later:
        return Later(self._device, lambda: self.result().index_select(dim, index))

    def __iter__(self) -> Any:
        self._device.synchronize()
        return iter(self.result())

    def __getattr__(self, name: str) -> Any:
        """The host looks at it: it has to wait for all that was launched."""
        self._device.synchronize()
        return getattr(self.result(), name)


def resolved(value: Any) -> Any:
    return value.result() if isinstance(value, Later) else value


class DelayedRunner:
    """Runs steps of another runner on the fake device."""

    def __init__(self, device: FakeDevice, runner: GraphRunner) -> None:
        self._device = device
        self._runner = runner

    def run(self, inputs: StepInputs) -> Any:
        batch = inputs.batch
        ends = [-(-length // batch.block_size) for length in batch.context_lens]
        tables = zip(batch.block_tables.tolist(), ends, strict=True)
        self._device.begin_step({block for table, end in tables for block in table[:end]})
        return self._device.launch(
            lambda: self._runner.run(inputs._replace(token_ids=resolved(inputs.token_ids)))
        )

    def idle(self) -> bool:
        return False


class DelayedCache:
    """Copies and clears blocks of another cache on the fake device."""

    def __init__(self, device: FakeDevice, cache: Any) -> None:
        self._device = device
        self._cache = cache
        self.num_blocks = cache.num_blocks

    def copy_blocks(self, pairs: Seq[tuple[int, int]]) -> None:
        pairs = list(pairs)
        self._device.copies([block for pair in pairs for block in pair])
        self._device.launch(lambda: self._cache.copy_blocks(pairs))

    def zero_blocks(self, blocks: Seq[int]) -> None:
        blocks = list(blocks)
        self._device.launch(lambda: self._cache.zero_blocks(blocks))


class DelayedSample(NamedTuple):
    device: FakeDevice
    step: int
    sampled: Later

    @property
    def tokens(self) -> Any:
        """A row that is not sound has some token of the vocabulary."""
        return Later(
            self.device,
            lambda: torch.tensor([t if s else 0 for t, s, _ in zip(*self.sampled.result(), strict=True)]),
        )

    def read(self) -> Sampled:
        self.device.wait(self.sampled)
        self.device.end_step(self.step)
        return self.sampled.result()  # type: ignore[no-any-return]  # a fake holds anything


class DelayedSampler:
    """Chooses tokens on the fake device as a worker does on a CPU."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def launch(self, logits: Any, rows: Seq[SamplingRow]) -> DelayedSample:
        frozen = [row._replace(tokens=tuple(row.tokens)) for row in rows]
        for row in rows:
            s = row.sampling
            plain = (s.frequency_penalty, s.presence_penalty, s.repetition_penalty) == (0, 0, 1)
            assert not row.unread or (plain and not s.bad_words), "its tokens are needed, and not known"

        def choose() -> Sampled:
            return sample(resolved(logits).clone(), frozen) if frozen else Sampled([], [], [])

        return DelayedSample(self._device, self._device.launched, self._device.launch(choose))


def guard_blocks(engine: Engine, device: FakeDevice, spoil: Callable[[list[int]], None]) -> None:
    """From now on no block may be handed out that a step in flight may touch; the others are spoiled."""
    pool = engine.planner.pool
    allocate = pool.allocate

    def guarded(count: int) -> list[int]:
        blocks = allocate(count)
        for step, busy in device.busy_blocks.items():
            assert not busy & set(blocks), f"step {step} was not read and may touch {busy & set(blocks)}"
        spoil(blocks)
        return blocks

    pool.allocate = guarded  # type: ignore[method-assign]  # a test looks over the pool's shoulder
