"""What it costs that output follows a schema, in tokens/s.

`python bench/structured_output.py` decodes with the default model on this CPU, by the real engine, planner
and sampler of a worker, one step with a schema and one without in turns, so that whatever else the machine
does falls on both. It prints the median step of each, and tokens/s at that step. Prompts and numbers of
tokens are the same; the schema's first use is not among them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as a worker sets it; read when torch is loaded

import torch
from llguidance import LLMatcher

from sfllm.messages import Sampling
from sfllm.model_files import DEFAULT_MODEL, resolve_model
from sfllm.settings import WorkerSettings
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.load import load_model
from sfllm_worker.startup import build_engine

ENTRY = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 999},
        "note": {"type": "string", "maxLength": 80},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
    },
    "required": ["id", "note", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": ENTRY, "minItems": 10_000}
"""Both sides run to `max_tokens`, through every kind of place in a document."""


def begin(engine: Engine, batch: int, tokens: int, grammar: str, seed: int) -> None:
    """Add sequences, and step until each has its first token."""
    for index in range(batch):
        prompt = [(seed + index + position) % 1000 + 100 for position in range(32)]
        sampling = Sampling(
            max_tokens=tokens, seed=seed + index, temperature=0.8, ignore_eos=True, grammar=grammar
        )
        engine.add(Sequence(index, 0, prompt, len(prompt), sampling))
    while engine.num_waiting or any(each.remaining > 1 for each in engine.planner.running):
        engine.step()


def decode(free: Engine, limited: Engine) -> Iterator[tuple[float, float]]:
    """Seconds of a step of each, until both are done."""
    turn = False
    while free.has_work and limited.has_work:
        turn = not turn
        pair = [_seconds(engine) for engine in ((free, limited) if turn else (limited, free))]
        yield (pair[0], pair[1]) if turn else (pair[1], pair[0])
    assert free.has_work == limited.has_work, "both generate as many tokens"


def _seconds(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return time.perf_counter() - started


def measure(rounds: int, batches: list[int], tokens: int, dtype: str, threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    model = load_model(resolve_model(DEFAULT_MODEL), dtype=dtype)
    settings = WorkerSettings(max_batch_size=max(batches), max_context_length=32 + tokens + 1)
    free, limited = (build_engine(settings, model, torch.device("cpu")) for _ in range(2))
    grammar = LLMatcher.grammar_from_json_schema(ENDLESS)
    print("| sequences | ms a step | with a schema | tokens/s | with a schema | ratio |")
    print("|---|---|---|---|---|---|")
    for batch in batches:
        steps = []
        for turn in range(rounds + 1):
            begin(free, batch, tokens, "", turn)
            begin(limited, batch, tokens, grammar, turn)
            steps += [pair for pair in decode(free, limited) if turn > 0]
        plain, masked = (statistics.median(column) for column in zip(*steps, strict=True))
        print(
            f"| {batch} | {plain * 1e3:.2f} | {masked * 1e3:.2f} "
            f"| {batch / plain:.1f} | {batch / masked:.1f} | {plain / masked:.3f} |",
            flush=True,
        )
    for engine in (free, limited):
        engine.close()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=96, help="to generate for each sequence")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    measure(arguments.rounds, arguments.batches, arguments.tokens, arguments.dtype, arguments.threads)


if __name__ == "__main__":
    main()
