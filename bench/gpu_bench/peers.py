"""The stage of transformers: its continuous batching, and `generate` for one request after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from bench.gpu_bench.place import Place, Row

from sfllm_worker.load.dummy import dummy_config

SEQUENTIAL_REQUESTS = 4


def transformers_speed(place: Place) -> Iterator[Row]:
    """The same shape with random weights. RuntimeError when continuous batching does not run there."""
    import transformers  # noqa: PLC0415 - only this stage needs it

    model = random_model(place, transformers)
    prompt, output = (16, 8) if place.quick else (512, 128)
    yield sequential(place, model, prompt, output)
    if place.on_gpu:  # its paged cache asks for a GPU
        yield continuous(place, model, transformers, 256, prompt, output)


def random_model(place: Place, transformers: Any) -> Any:
    """transformers' own model of the measured shape."""
    raw = dict(dummy_config(place.model))
    raw.pop("architectures")
    torch.manual_seed(0)
    with torch.device(place.device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen3Config(**raw), dtype=place.dtype, attn_implementation="sdpa"
        )
    return model.eval()


def sequential(place: Place, model: Any, prompt: int, output: int) -> Row:
    """`generate`, one request at a time."""
    seconds = []
    for request in range(SEQUENTIAL_REQUESTS + 1):
        ids = prompts(place, 1, prompt, seed=request).to(place.device)
        started = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=output,
                max_new_tokens=output,
                pad_token_id=0,
                eos_token_id=None,
            )
        place.synchronize()
        assert made.shape[1] == prompt + output
        seconds.append(time.perf_counter() - started)
    elapsed = sum(seconds[1:])  # the first one warms up
    return row(f"generate, one at a time, {prompt} in, {output} out", SEQUENTIAL_REQUESTS, output, elapsed)


def continuous(place: Place, model: Any, transformers: Any, count: int, prompt: int, output: int) -> Row:
    """`generate_batch`, all at once, with its own choice of graphs."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=output
    )
    elapsed = 0.0
    for seed in (98, 99):  # other prompts first: they start the manager, which is kept, and warm it up
        inputs = prompts(place, count, prompt, seed).tolist()
        started = time.perf_counter()
        made = model.generate_batch(
            inputs=inputs, generation_config=settings, progress_bar=False, persistent_manager=True
        )
        elapsed = time.perf_counter() - started
        tokens = sum(len(answer.generated_tokens) for answer in made.values())
        if tokens != count * output:
            raise RuntimeError(f"{tokens} of {count * output} tokens were generated")
    model.destroy_cached_continuous_batching_manager()
    return row(f"continuous batching, all at once, {prompt} in, {output} out", count, output, elapsed)


def row(what: str, requests: int, output: int, seconds: float) -> Row:
    """Rates of so many requests."""
    rates = {"requests/s": requests / seconds, "output tokens/s": requests * output / seconds}
    return {"what": what, "requests": requests, **rates}


def prompts(place: Place, count: int, length: int, seed: int) -> torch.Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, place.size().vocabulary, (count, length), generator=generator)
