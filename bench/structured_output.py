"""What it costs that output follows a schema, in tokens/s.

`python bench/structured_output.py` runs the default model with the real engine, planner and sampler of a
worker on this CPU, in turns with a schema and without, and prints tokens/s and the ratio of the medians.
Both generate as many tokens from the same prompts and seeds; the schema's first use is not among them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

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
from sfllm_worker.startup import build_engine, warm_up

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


def tokens_per_second(engine: Engine, batch: int, tokens: int, grammar: str, seed: int) -> float:
    """Of decode: from the first token of the last sequence to the end."""
    for index in range(batch):
        prompt = [(seed + index + position) % 1000 + 100 for position in range(32)]
        sampling = Sampling(
            max_tokens=tokens, seed=seed + index, temperature=0.8, ignore_eos=True, grammar=grammar
        )
        engine.add(Sequence(index, 0, prompt, len(prompt), sampling))
    while engine.num_waiting or any(each.remaining > 1 for each in engine.planner.running):
        engine.step()
    made, started = 0, time.perf_counter()
    while engine.has_work:
        made += sum(progress.token is not None for progress in engine.step().progress)
    return made / (time.perf_counter() - started)


def measure_tokens(rounds: int, batches: list[int], tokens: int, dtype: str, threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    model = load_model(resolve_model(DEFAULT_MODEL), dtype=dtype)
    settings = WorkerSettings(max_batch_size=max(batches), max_context_length=32 + tokens + 1)
    engine = build_engine(settings, model, torch.device("cpu"))
    warm_up(engine)
    grammar = LLMatcher.grammar_from_json_schema(ENDLESS)
    print("| sequences | free tokens/s | with a schema | ratio |")
    print("|---|---|---|---|")
    for batch in batches:
        tokens_per_second(engine, batch, tokens, grammar, seed=0)  # its first use
        speeds: dict[str, list[float]] = {"": [], grammar: []}
        for turn in range(rounds):
            for wanted in list(speeds)[:: 1 if turn % 2 else -1]:
                speeds[wanted].append(tokens_per_second(engine, batch, tokens, wanted, seed=turn))
        free, limited = (statistics.median(speeds[wanted]) for wanted in ("", grammar))
        print(f"| {batch} | {free:.1f} | {limited:.1f} | {limited / free:.3f} |", flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=96, help="to generate for each sequence")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    measure_tokens(arguments.rounds, arguments.batches, arguments.tokens, arguments.dtype, arguments.threads)


if __name__ == "__main__":
    main()
