"""Which graphs exist, and which one a step takes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_worker.graphs.keys import (
    SPLIT_TOKENS,
    GraphKey,
    KeyIndex,
    batch_buckets,
    context_bands,
    plan_graphs,
)

SIZES = st.integers(1, 300)
LENGTHS = st.integers(1, 200_000)


def test_buckets_are_1_2_4_and_then_every_8_up_to_the_largest_batch() -> None:
    assert batch_buckets(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert batch_buckets(37) == (1, 2, 4, 8, 16, 24, 32, 37)
    assert batch_buckets(3) == (1, 2, 3)
    assert batch_buckets(1) == (1,)
    assert batch_buckets(256, largest=16) == (1, 2, 4, 8, 16)


def test_chosen_buckets_replace_the_others_but_none_is_kept_that_no_step_needs() -> None:
    assert batch_buckets(40, chosen=(32, 1, 8, 8)) == (1, 8, 32)
    assert batch_buckets(20, chosen=(1, 32, 64)) == (1, 32)
    assert batch_buckets(40, largest=8, chosen=(1, 8, 32)) == (1, 8)


@pytest.mark.parametrize("wrong", [{"chosen": (0, 4)}, {"largest": 0}])
def test_a_bucket_without_rows_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batch_buckets(8, **wrong)  # type: ignore[arg-type] # one of two options


def test_choosing_only_buckets_above_the_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 8"):
        batch_buckets(40, largest=8, chosen=(16, 32))


@given(LENGTHS)
def test_bands_are_whole_splits_each_at_most_twice_the_one_before(max_model_len: int) -> None:
    bands = context_bands(max_model_len)
    assert all(band % SPLIT_TOKENS == 0 for band in bands)
    assert max_model_len <= bands[-1] < max_model_len + SPLIT_TOKENS
    assert all(small < large <= 2 * small for small, large in itertools.pairwise(bands))
    assert len(bands) <= 10


@given(SIZES, LENGTHS, st.data())
def test_the_first_set_alone_holds_every_step(
    max_batch: int, max_model_len: int, data: st.DataObject
) -> None:
    index = KeyIndex()
    for key in plan_graphs(batch_buckets(max_batch), context_bands(max_model_len)).first:
        index.add(key)
    batch, context = data.draw(st.integers(1, max_batch)), data.draw(st.integers(1, max_model_len))
    found = index.find(batch, context)
    assert found is not None
    assert found.batch >= batch
    assert found.context >= context


@given(SIZES, LENGTHS)
def test_the_plan_has_every_key_once_and_starts_with_the_largest(max_batch: int, max_model_len: int) -> None:
    buckets, bands = batch_buckets(max_batch), context_bands(max_model_len)
    plan = plan_graphs(buckets, bands)
    assert sorted(plan.keys) == sorted(GraphKey(batch, band) for batch in buckets for band in bands)
    assert plan.largest == (buckets[-1], bands[-1])
    work = [key.batch * key.context for key in plan.first]
    assert work == sorted(work, reverse=True)


@given(
    st.sets(st.builds(GraphKey, st.integers(1, 9), st.integers(1, 9))), st.integers(1, 9), st.integers(1, 9)
)
def test_a_step_takes_the_fewest_rows_and_then_the_shortest_context(
    keys: set[GraphKey], batch: int, context: int
) -> None:
    index = KeyIndex()
    for key in keys:
        index.add(key)
    fitting = [key for key in keys if key.batch >= batch and key.context >= context]
    assert index.find(batch, context) == min(fitting, default=None)
    assert len(index) == len(keys)
