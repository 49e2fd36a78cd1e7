"""With `--metrics-prefix vllm:` the names are there that vLLM's own public Grafana dashboard asks for."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import pytest
from chaos.metrics import total
from running_stack import RunningStack

NAMES = {
    "vllm:e2e_request_latency_seconds_bucket": {"model_name"},
    "vllm:e2e_request_latency_seconds_sum": {"model_name"},
    "vllm:e2e_request_latency_seconds_count": {"model_name"},
    "vllm:prompt_tokens_total": {"model_name"},
    "vllm:generation_tokens_total": {"model_name"},
    "vllm:inter_token_latency_seconds_bucket": {"model_name"},
    "vllm:inter_token_latency_seconds_sum": {"model_name"},
    "vllm:inter_token_latency_seconds_count": {"model_name"},
    "vllm:num_requests_running": {"model_name"},
    "vllm:num_requests_waiting": {"model_name"},
    "vllm:time_to_first_token_seconds_bucket": {"model_name"},
    "vllm:time_to_first_token_seconds_sum": {"model_name"},
    "vllm:time_to_first_token_seconds_count": {"model_name"},
    "vllm:kv_cache_usage_perc": {"model_name"},
    "vllm:request_prompt_tokens_bucket": {"model_name"},
    "vllm:request_generation_tokens_bucket": {"model_name"},
    "vllm:request_success_total": {"model_name", "finished_reason"},
    "vllm:request_queue_time_seconds_sum": {"model_name"},
    "vllm:request_prefill_time_seconds_sum": {"model_name"},
    "vllm:request_decode_time_seconds_sum": {"model_name"},
}
"""Series and labels by which the dashboard filters and groups.

It has one panel more, of `request_max_num_generation_tokens`: the longest of a request's choices. sfllm
has no such metric.
"""


@pytest.fixture(scope="module")
def pages() -> Iterator[str]:
    """The metrics of all three services after a request."""
    stack = RunningStack("--mock", "--metrics-prefix=vllm:", "--mock-tokens-per-second=500")
    try:
        stack.wait_until_ready()
        request = urllib.request.Request(
            f"{stack.url}/v1/completions",
            data=json.dumps({"prompt": "Tell me", "max_tokens": 5}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        read = [stack.url, stack.scheduler_admin, *stack.worker_admins]
        yield "\n".join(urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode() for url in read)
    finally:
        code = stack.stop()
    assert code == 0


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_of_the_dashboard_has_the_labels_that_it_filters_by(pages: str, name: str) -> None:
    lines = [line for line in pages.splitlines() if line.startswith(f"{name}{{")]
    assert lines
    for label in NAMES[name]:
        assert all(f'{label}="' in line for line in lines)


def test_a_request_is_counted_under_those_names(pages: str) -> None:
    assert total(pages, "vllm:e2e_request_latency_seconds_count") == 1
    assert total(pages, "vllm:generation_tokens_total") == 5
    assert total(pages, "vllm:request_success_total", finished_reason="length") == 1
