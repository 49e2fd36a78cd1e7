"""What a decode step costs outside the model: planning, laying out inputs, sampling, bookkeeping.

The model's part is replaced by logits that are there already, so that what remains is the
engine's own time. `python bench/step_cost.py` prints microseconds a step at several batch sizes
(median and fastest of many steps) and the bound that the project sets itself: 300 µs plus 3 µs a sequence.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from sfllm.messages import Sampling
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import StepInputs
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import load_model

CONTEXT_TOKENS = 256
BLOCK_SIZE = 32
BASE_MICROSECONDS = 300
MICROSECONDS_A_SEQUENCE = 3


class ReadyLogits:
    """A runner that computes nothing."""

    def __init__(self, vocab_size: int, max_rows: int) -> None:
        self._logits = torch.rand(max_rows, vocab_size, generator=torch.Generator().manual_seed(0))

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Logits for as many rows as are wanted."""
        return self._logits[: len(inputs.logit_rows)]


def measure(batch_size: int, steps: int, temperature: float) -> list[float]:
    """Seconds of each of `steps` decode steps of `batch_size` sequences."""
    model = load_model("tiny-llama", dtype="float32", load_format="dummy")
    blocks = batch_size * (-(-(CONTEXT_TOKENS + steps + 64) // BLOCK_SIZE) + 1)
    kv = KVCache(model.config, blocks + 1, BLOCK_SIZE, model.dtype)
    limits = Limits(batch_size, max(4096, batch_size), BLOCK_SIZE)
    runner = ReadyLogits(model.config.vocab_size, batch_size)
    engine = Engine(runner, kv, limits, (), CONTEXT_TOKENS + steps + 96, torch.device("cpu"))
    rng = random.Random(0)
    for index in range(batch_size):
        prompt = [rng.randrange(model.config.vocab_size) for _ in range(CONTEXT_TOKENS)]
        sampling = Sampling(max_tokens=steps + 64, seed=index, temperature=temperature)
        engine.add(Sequence(index, 0, prompt, len(prompt), sampling))
    while engine.planner.waiting or any(s.remaining > 1 for s in engine.planner.running):
        engine.step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        result = engine.step()
        seconds.append(time.perf_counter() - started)
        assert result.num_tokens == batch_size
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("batch  greedy median / fastest µs   sampled median / fastest µs   bound µs")
    for batch_size in (1, 40, 256):
        greedy, sampled = (
            [second * 1e6 for second in measure(batch_size, arguments.steps, temperature)]
            for temperature in (0.0, 0.8)
        )
        bound = BASE_MICROSECONDS + MICROSECONDS_A_SEQUENCE * batch_size
        print(
            f"{batch_size:5}  {statistics.median(greedy):13.0f} / {min(greedy):.0f}"
            f"  {statistics.median(sampled):23.0f} / {min(sampled):.0f}  {bound:14}"
        )


if __name__ == "__main__":
    main()
