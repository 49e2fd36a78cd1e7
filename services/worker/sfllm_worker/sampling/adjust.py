"""What a request changes in its logits before a token is chosen: bias, penalties, bans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfllm.messages import Sampling
from sfllm_worker.structured.constraint import Constraint


class SamplingRow(NamedTuple):
    """How to choose the next token of one sequence.

    `tokens` are prompt and output so far, `prompt_count` of them prompt. `banned` tokens must not
    come now (end-of-text tokens before `min_tokens`). `unread` further tokens were chosen after `tokens`
    that the host has not read yet; there are none where penalties, bad words of several tokens or a
    grammar apply. Nothing comes that the `constraint` does not allow.
    """

    sampling: Sampling
    choice: int
    tokens: Sequence[int]
    prompt_count: int
    banned: tuple[int, ...] = ()
    unread: int = 0
    constraint: Constraint | None = None

    @property
    def position(self) -> int:
        """Index of the output token to be chosen."""
        return len(self.tokens) + self.unread - self.prompt_count


def adjusts(row: SamplingRow) -> bool:
    """Whether `adjust` would change anything."""
    s = row.sampling
    return bool(
        row.banned
        or s.logit_bias
        or s.allowed_token_ids
        or s.bad_words
        or s.frequency_penalty
        or s.presence_penalty
        or s.repetition_penalty != 1
    )


def adjust(logits: Tensor, row: SamplingRow) -> None:
    """Change one row of logits (float32 [vocab_size]) in place.

    Bias first, then the repetition penalty over prompt and output (Keskar et al., CTRL, 2019), then
    OpenAI's frequency and presence penalties over the output, then what is not allowed.
    """
    sampling = row.sampling
    if sampling.logit_bias:
        ids = _ids([token for token, _ in sampling.logit_bias], logits)
        logits[ids] += torch.tensor([bias for _, bias in sampling.logit_bias], device=logits.device)
    if sampling.repetition_penalty != 1:
        seen = torch.unique(_ids(row.tokens, logits))
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.frequency_penalty or sampling.presence_penalty) and row.position > 0:
        seen, counts = torch.unique(_ids(row.tokens[row.prompt_count :], logits), return_counts=True)
        logits[seen] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if sampling.allowed_token_ids:
        allowed = _ids(sampling.allowed_token_ids, logits)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept
    banned = (*row.banned, *completed_bad_words(row))
    if banned:
        logits[_ids(banned, logits)] = -torch.inf


def completed_bad_words(row: SamplingRow) -> list[int]:
    """Tokens that would complete one of the row's bad words, given its output so far."""
    banned = []
    for *beginning, last in row.sampling.bad_words:
        start = len(row.tokens) - len(beginning)
        if start >= row.prompt_count and list(row.tokens[start:]) == beginning:
            banned.append(last)
    return banned


def _ids(tokens: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)
