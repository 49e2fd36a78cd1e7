"""Properties that any accelerator needs, shown without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_references import make_model
from model_variants import VARIANTS

from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import load_model
from sfllm_worker.model.attention import AttentionBatch


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "phi3-longrope", "smollm3", "gemma2", "gemma3"])
def test_a_step_stays_on_its_device_and_never_asks_for_a_value(name: str, tmp_path: Path) -> None:
    # Tensors on "meta" have no values and do not mix with others: a read by the host or a tensor left
    # on the CPU is an error there, where an accelerator would merely be slow.
    make_model(VARIANTS[name]).config.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, load_format="dummy", device="meta")
    kv = KVCache(loaded.config, 64, 4, loaded.dtype, "meta")
    tables = [[i + 1 for i in range(30)], [31, 32, 33], [34, 35], [36, 37, 38]]
    batch = AttentionBatch.build([1, 1, 5, 1], [120, 9, 6, 10], tables, 4, "meta")
    token_ids = torch.zeros(batch.num_tokens, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        hidden = loaded.decoder.forward(token_ids, batch.positions, batch, kv)
        logits = loaded.decoder.logits(hidden[batch.last_rows])
    assert logits.device.type == "meta"
    assert logits.shape == (4, loaded.config.vocab_size)
    kv.copy_blocks([(1, 2)])
    kv.zero_blocks([3])
