from __future__ import annotations

import pytest
import torch
from attention_references import Case, assert_close, round_products_once

from sfllm_worker.kernels.attention import TritonAttention
from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.attention import PLAIN, AttentionBatch, AttentionOptions, TorchAttention
from sfllm_worker.model.config import ModelConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=8,
    hidden_size=64,
    intermediate_size=8,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(window=9, soft_cap=2.0, scale=0.3)])
def test_decodes_and_chunks_share_a_step(options: AttentionOptions) -> None:
    case = Case([1, 1, 6, 1, 3], [300, 2, 40, 17, 3])
    step = TritonAttention(CONFIG, torch.float32, "cpu").begin(case.batch)
    assert_close(step.attend(case.layer, case.q, options), case.expected(options))


def test_decodes_as_chunks_have_the_bits_of_the_chunk_that_recomputes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    round_products_once(monkeypatch)
    attention = TritonAttention(CONFIG, torch.float16, "cpu", decodes_as_chunks=True)
    chunk = Case([19], [90], dtype=torch.float16)
    whole = attention.begin(chunk.batch).attend(chunk.layer, chunk.q)
    tables = [chunk.batch.block_tables[0].tolist()] * 2
    lone = AttentionBatch.build([1, 1], [90, 80], tables, block_size=16)
    mixed = AttentionBatch.build([1, 9], [90, 80], tables, block_size=16)
    for batch, rows in ((lone, [18, 8]), (mixed, [18, *range(9)])):
        again = attention.begin(batch).attend(chunk.layer, chunk.q[rows])
        assert torch.equal(again, whole[rows])


def test_new_keys_and_values_land_where_the_torch_backend_puts_them() -> None:
    case = Case([1, 5], [33, 20])
    empty = torch.zeros_like(case.layer.k)
    mine, theirs = KVLayer(0, empty.clone(), empty.clone()), KVLayer(0, empty.clone(), empty.clone())
    fused = torch.randn(case.batch.num_tokens, 8, 16)  # keys and values as views of wider rows
    k, v = fused[:, 4:6], fused[:, 6:]
    TritonAttention(CONFIG, torch.float32, "cpu").begin(case.batch).write_kv(mine, k, v)
    TorchAttention(CONFIG).begin(case.batch).write_kv(theirs, k, v)
    assert torch.equal(mine.k, theirs.k)
    assert torch.equal(mine.v, theirs.v)


def test_a_reservation_takes_the_bytes_that_were_announced() -> None:
    attention = TritonAttention(CONFIG, torch.float32, "cpu")
    attention.reserve(8, 1000)
    assert TritonAttention.bytes_needed(CONFIG, 8, 1000) == 8 * 4 * 4 * (16 + 2) * 4
