"""A profile from a real server: loads it in a few ways and fits the curve of its steps to what clients see.

Times between tokens at several concurrencies and lengths of context tell of decode steps, times to a first
token of prefill; all of it through the server's API, so its overhead is in the figures, as it is in life.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
from rich.console import Console

from sfllm.step_curve import LEAST_STEPS, StepCurve, StepCurveFit
from sfllm_cli.bench.command import benchmark, check
from sfllm_cli.bench.figures import median_figures
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.errors import CommandError
from sfllm_cli.simulate.profiles import PRESETS, Profile
from sfllm_cli.simulate_settings import SimulateSettings

OUTPUT_TOKENS = 48
ROUNDS = 3
CONNECT_SECONDS = 10.0


class Load(NamedTuple):
    """`rows` requests at once on each worker, with prompts of so many tokens."""

    rows: int
    prompt_tokens: int


DECODES = (Load(1, 64), Load(4, 64), Load(16, 64), Load(32, 64), Load(4, 768), Load(16, 768))
PREFILLS = (64, 128, 256, 512, 768, 1024)


def calibrate(settings: SimulateSettings) -> int:
    """Measure the server and write its profile. Raises `CommandError`."""
    assert settings.calibrate is not None
    console = Console(stderr=True)
    curve = fitted(
        lambda load, outputs: _measure(settings, load, outputs, console), settings.calibrate_step_tokens
    )
    profile = Profile(
        source=f"measured at {settings.calibrate} with {settings.calibrate_workers} workers",
        **curve._asdict(),
        slots=settings.calibrate_slots,
        kv_tokens=settings.calibrate_kv_tokens,
        step_tokens=settings.calibrate_step_tokens,
        max_model_len=asyncio.run(_max_model_len(settings.calibrate)),
    )
    path = Path(settings.profile_out)
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    console.print(f"wrote {path}", highlight=False)
    return 0


def fitted(measure: Callable[[Load, int], tuple[float, float]], step_tokens: int) -> StepCurve:
    """The curve of a worker whose steps take in so many tokens.

    `measure` loads it with so many output tokens for each request, and says the median time to the first
    token and between tokens, in seconds.
    """
    fit = StepCurveFit()
    for prompt_tokens in PREFILLS:
        ttft, _ = measure(Load(1, prompt_tokens), 1)
        # A prompt longer than a step takes several, each with a base of its own.
        steps = -(-prompt_tokens // step_tokens)
        fit.add(round(prompt_tokens / steps), 0, 0, ttft / steps)
    for load in DECODES:
        _, itl = measure(load, OUTPUT_TOKENS)
        context = load.rows * (load.prompt_tokens + OUTPUT_TOKENS // 2)
        fit.add(0, load.rows, context, itl)
    curve = fit.curve()
    assert curve is not None, f"fewer than {LEAST_STEPS} measurements"
    return curve


def _measure(
    settings: SimulateSettings, load: Load, output_tokens: int, console: Console
) -> tuple[float, float]:
    """Median time to the first token and between tokens, in seconds, with every worker loaded alike."""
    concurrency = load.rows * settings.calibrate_workers
    # All at once and none after them, so that most steps between tokens are steps of decode alone.
    bench = BenchSettings(
        url=(settings.calibrate or "",),
        concurrency=(concurrency,),
        requests=concurrency,
        rounds=ROUNDS,
        max_repeats=0,
        quiet_seconds=0.0,
        prompt_tokens=str(load.prompt_tokens),
        output_tokens=str(output_tokens),
        ignore_eos=True,
        seed=load.rows * 10_000 + load.prompt_tokens,  # prompts that no cache has
    )
    _, legs = asyncio.run(benchmark(bench, check(bench), None, console))
    figures = median_figures([leg.figures for leg in legs])
    if figures.failed:
        raise CommandError(f"{settings.calibrate}: {dict(figures.errors)}")
    text = f"{load.rows} a worker, {load.prompt_tokens} in: TTFT {figures.ttft.p50 * 1000:.1f} ms"
    itl = f", ITL {figures.itl.p50 * 1000:.1f} ms" if output_tokens > 1 else ""
    console.print(text + itl, highlight=False)
    return figures.ttft.p50, figures.itl.p50


async def _max_model_len(url: str) -> int:
    """What the server's model card says; the default of a profile if it says nothing."""
    timeout = aiohttp.ClientTimeout(total=CONNECT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url}/v1/models") as answer:
        models = (await answer.json()).get("data") or [{}]
        return int(models[0].get("max_model_len") or PRESETS["cpu"].max_model_len)
