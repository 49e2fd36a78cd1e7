"""Requests to send again and again: whatever changes how tokens are made, counted, cut or shown."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

STOP_CHARACTERS = 3
PROMPT_TOKEN_IDS = 200
"""Every vocabulary has as many."""

_WORDS = ("count", "river", "stone", "light", "seven", "green", "paper", "north", "salt", "wheel")


@dataclasses.dataclass(frozen=True)
class Template:
    """A request that gives the same answer each time: greedy or with a seed."""

    name: str
    path: str
    body: Mapping[str, Any]

    @property
    def streams(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.body["stream"])


def make_templates(rng: random.Random, count: int, longest: int) -> list[Template]:
    """`count` different requests with answers of at most `longest` tokens a choice."""
    return [_template(rng, number, longest) for number in range(count)]


def _template(rng: random.Random, number: int, longest: int) -> Template:
    body: dict[str, Any] = {
        "max_tokens": rng.randint(max(1, longest // 10), longest),
        "seed": rng.randrange(2**31),
        "temperature": rng.choice([0, 0.7, 1.0, 1.3]),
        "stream": rng.random() < 0.75,
        "return_token_ids": True,
        "ignore_eos": rng.random() < 0.8,
    }
    traits = []
    if rng.random() < 0.35:
        body["n"] = rng.choice([2, 3])
        traits.append(f"n={body['n']}")
    if rng.random() < 0.3:
        body["top_p"] = 0.9
    if rng.random() < 0.25:
        body |= {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.1}
        traits.append("penalties")
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    chat = rng.random() < 0.4
    wants_logprobs = rng.random() < 0.3
    if wants_logprobs:
        traits.append("logprobs")
    words = " ".join(rng.choice(_WORDS) for _ in range(rng.choice([3, 10, 60])))
    if chat:
        body["messages"] = [{"role": "user", "content": words}]
        body |= {"logprobs": True, "top_logprobs": 2} if wants_logprobs else {}
    else:
        ids = [rng.randrange(PROMPT_TOKEN_IDS) for _ in range(rng.choice([1, 31, 33, 200]))]
        body["prompt"] = words if rng.random() < 0.5 else ids
        body |= {"logprobs": 2} if wants_logprobs else {}
    kind = f"{'chat' if chat else 'completion'} {'streamed' if body['stream'] else 'whole'}"
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return Template(" ".join([f"#{number}", kind, *traits]), path, body)


def with_stop(rng: random.Random, template: Template, texts: Sequence[str]) -> Template | None:
    """The same request, ended by a stop string out of the later part of its answer; None if there is none."""
    text = rng.choice(texts)
    places = [
        start
        for start in range(len(text) // 2, len(text) - STOP_CHARACTERS)
        if text[start : start + STOP_CHARACTERS].isascii()
        and text[start : start + STOP_CHARACTERS].isprintable()
    ]
    if not places:
        return None
    start = rng.choice(places)
    stop = text[start : start + STOP_CHARACTERS]
    return Template(f"{template.name} stop", template.path, {**template.body, "stop": [stop]})
