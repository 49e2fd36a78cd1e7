"""The choice of tokens on the device: what the sampler of the CPU chooses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bench.gpu_check.checks import Check, Setting, largest_error

from sfllm.messages import Sampling
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.device import DeviceSampler
from sfllm_worker.sampling.sampler import sample

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 50},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05, "top_k": 900},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
]
MOST_DIFFERENT = 0.01
"""Share of draws that may fall to a token's neighbour: exponentials are not rounded alike everywhere."""


def checks(setting: Setting) -> list[Check]:
    """Greedy rows, sampled ones, and rows that are not sound."""
    return [
        Check("greedy choice: the first largest logit", partial(greedy, setting)),
        Check("sampled choice: the tokens of the CPU's sampler", partial(sampled, setting)),
        Check("rows without a sound logit are told", partial(unsound, setting)),
    ]


def greedy(setting: Setting) -> str:
    """Rows with ties, of the vocabularies of several models."""
    vocabularies = (49152, 128256, 151936, 262144) if setting.on_gpu else (700,)
    for vocabulary in vocabularies:
        logits = some_logits(33 if setting.on_gpu else 4, vocabulary).round()
        rows = [row({"temperature": 0.0}, index) for index in range(len(logits))]
        tokens, sound, _ = DeviceSampler(setting.device).launch(logits.to(setting.device), rows).read()
        assert tokens == logits.argmax(-1).tolist(), "tokens differ"
        assert all(sound), "sound rows are not taken for such"
    return f"vocabularies of {', '.join(map(str, vocabularies))}"


def sampled(setting: Setting) -> str:
    """All kinds of rows in one launch; their log probabilities too."""
    count, vocabulary = (1050, 151936) if setting.on_gpu else (14, 700)
    sampler, differ = DeviceSampler(setting.device), 0
    for start in range(0, count, len(KINDS)):
        rows = [row(kind, start + index, logprobs=3) for index, kind in enumerate(KINDS)]
        logits = some_logits(len(rows), vocabulary, seed=start)
        expected = sample(logits.clone(), rows)
        tokens, _, logprobs = sampler.launch(logits.to(setting.device, copy=True), rows).read()
        for index, token in enumerate(tokens):
            if token != expected.tokens[index]:
                differ += 1
                continue
            values = (torch.tensor(one[index].values) for one in (logprobs, expected.logprobs))
            error = largest_error(*values)
            assert error < 1e-3, f"log probabilities differ by {error:.1e}"
    assert differ <= MOST_DIFFERENT * count, f"{differ} of {count} tokens differ"
    return f"{count - differ} of {count} tokens equal, {differ} at the edge between two"


def unsound(setting: Setting) -> str:
    """A NaN, all banned, and infinity, beside a row that is sound."""
    logits = some_logits(4, 700)
    logits[0, 650] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    for temperature in (0.0, 0.7):
        rows = [row({"temperature": temperature}, index) for index in range(4)]
        expected = sample(logits.clone(), rows)
        tokens, sound, _ = (
            DeviceSampler(setting.device).launch(logits.to(setting.device, copy=True), rows).read()
        )
        assert sound == expected.sound == [False, False, False, True], f"sound rows: {sound}"
        assert all(0 <= token < 700 for token in tokens), "a token is not of the vocabulary"
    return "greedy and sampled"


def row(fields: dict[str, Any], index: int, logprobs: int = -1) -> SamplingRow:
    """A row at its own position with its own seed and text."""
    sampling = Sampling(max_tokens=8, seed=1000 + index, logprobs=logprobs, **fields)
    return SamplingRow(sampling, index % 3, [5, 9, 5, index % 300], 1)


def some_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Random logits, float32, on the CPU."""
    return 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
