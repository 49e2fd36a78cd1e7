"""The greedy choice in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm_worker.kernels.greedy import BLOCK, choose_greedily

LOGITS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-45, -3e38, math.inf, -math.inf, math.nan]),
    st.floats(width=32),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(LOGITS, min_size=1, max_size=12))
def test_it_is_the_first_largest_logit_of_a_sound_row(values: list[float]) -> None:
    row = torch.tensor([values])
    best = row.max()
    chosen = choose_greedily(row)
    [token], [sound] = chosen.tokens.tolist(), chosen.sound.tolist()
    assert bool(sound) == bool(torch.isfinite(best))
    assert 0 <= token < len(values)
    if sound:
        assert token == int((row[0] == best).nonzero()[0])


@pytest.mark.parametrize("vocab_size", [BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_ties_between_blocks_go_to_the_lowest_token(vocab_size: int) -> None:
    row = torch.full((1, vocab_size), -5.0)
    row[0, [vocab_size // 2, vocab_size - 1]] = 2.5
    chosen = choose_greedily(row)
    assert chosen.packed.tolist() == [[vocab_size // 2], [1]]


def test_rows_are_read_by_their_stride_and_bad_ones_spare_the_others() -> None:
    wide = torch.full((4, BLOCK + 40), 99.0)
    logits = wide[:, : BLOCK + 5]
    logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    logits[1, BLOCK + 2] = math.nan
    logits[2] = -math.inf
    chosen = choose_greedily(logits)
    assert chosen.sound.tolist() == [1, 0, 0, 1]
    assert chosen.tokens[[0, 3]].tolist() == logits[[0, 3]].argmax(-1).tolist()
    assert bool((chosen.tokens < BLOCK + 5).all())
