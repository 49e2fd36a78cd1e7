"""Log probabilities of chosen tokens and their likeliest alternatives.

They are those of the model itself: before temperature, penalties, bias and filters, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfllm.token_batch import Logprobs


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> Logprobs:
    """For each row its token's log probability, then the `top` largest ones.

    `logits` float32 [num_rows, vocab_size]; one entry of `tokens` a row.
    """
    width = 1 + min(top, logits.shape[-1])
    values = torch.log_softmax(logits, dim=-1)
    chosen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    best, best_ids = torch.topk(values, width - 1, dim=-1)
    ids = torch.cat((chosen, best_ids), dim=-1)
    return Logprobs(
        width, ids.flatten().tolist(), torch.cat((values.gather(-1, chosen), best), dim=-1).flatten().tolist()
    )
