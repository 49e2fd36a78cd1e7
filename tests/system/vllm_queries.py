"""What vLLM's own Grafana dashboards ask a Prometheus, as of November 2026, written down panel by panel.

The dashboards are `grafana.json` (examples/observability/prometheus_grafana), `performance_statistics`,
`query_statistics` and `vllm_overview` (examples/observability/dashboards/grafana) of vllm-project/vllm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MODEL = '{model_name="$model_name"}'
DEPLOYMENT = '{model_name=~"$Deployment_id"}'
CHOSEN = 'job=~"$job", model_name=~"$model_name", instance=~"$instance"'
SERVER = 'job=~"$job", instance=~"$instance"'


class VllmQuery(NamedTuple):
    """A dashboard and an expression of it, with the variables that Grafana fills in."""

    dashboard: str
    expression: str


def _rate(name: str, labels: str = "", window: str = "$__rate_interval") -> str:
    return f"rate(vllm:{name}{labels}[{window}])"


def _quantile(
    share: str, name: str, labels: str = "", by: str = "le", window: str = "$__rate_interval"
) -> str:
    return f"histogram_quantile({share}, sum by({by}) ({_rate(name + '_bucket', labels, window)}))"


def _mean(name: str, labels: str = "") -> str:
    return f"{_rate(name + '_sum', labels)} / {_rate(name + '_count', labels)}"


def _classic() -> Iterator[str]:
    for name in ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds"):
        yield from (_quantile(share, name, MODEL) for share in ("0.99", "0.95", "0.9", "0.5"))
        yield _mean(name, MODEL)
    yield from (_rate(name, MODEL) for name in ("prompt_tokens_total", "generation_tokens_total"))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        yield f"vllm:{name}{MODEL}"
    for name in ("request_prompt_tokens", "request_generation_tokens"):
        yield f"sum by(le) (increase(vllm:{name}_bucket{MODEL}[$__rate_interval]))"
    yield f"sum by(finished_reason) (increase(vllm:request_success_total{MODEL}[$__rate_interval]))"
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"):
        yield _rate(f"{name}_sum", MODEL)
    yield _rate("request_max_num_generation_tokens_sum", MODEL)


def _performance() -> Iterator[str]:
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds"):
        yield _mean(name)
        yield from (_quantile(share, name, window="$__range") for share in ("0.99", "0.90", "0.50"))
        yield f"sum(increase(vllm:{name}_sum[$__range])) / sum(increase(vllm:{name}_count[$__range]))"
    yield from (_quantile(share, "inter_token_latency_seconds") for share in ("0.50", "0.90", "0.99"))
    for name in ("generation_tokens_total", "prompt_tokens_total", "iteration_tokens_total_count"):
        yield _rate(name)


def _usage() -> Iterator[str]:
    for name in ("request_success_total", "prompt_tokens_total", "generation_tokens_total"):
        yield f"sum by (model_name) ({_rate(name, DEPLOYMENT)})"
        yield f"sum({_rate(name, DEPLOYMENT)})"
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens"):
        yield from (
            _quantile(share, name, DEPLOYMENT, "le, model_name") for share in ("0.50", "0.90", "0.99")
        )
    yield f"sum by (le, model_name) ({_rate('request_prompt_tokens_bucket', DEPLOYMENT)})"
    prompts, requests = (_rate(name, DEPLOYMENT) for name in ("prompt_tokens_total", "request_success_total"))
    yield f"sum({prompts}) / sum({requests})"


def _chosen(name: str, more: str = "", window: str = "$__rate_interval") -> str:
    return _rate(name, f"{{{CHOSEN}{more}}}", window)


def _share(part: str, whole: str) -> str:
    return f"sum({part}) / (sum({whole}) > 0)"


def _overview() -> Iterator[str]:
    labels = f"{{{CHOSEN}}}"
    yield from _overview_state(labels)
    yield from _overview_models(labels)
    for name in (
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_time_per_output_token_seconds", "request_queue_time_seconds"),
        *("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total"),
    ):
        yield from (_quantile(share, name, labels) for share in ("0.5", "0.95", "0.99"))
        yield _share(_chosen(f"{name}_sum"), _chosen(f"{name}_count"))
    for name in ("request_prefill_time_seconds", "request_decode_time_seconds"):
        yield _share(_chosen(f"{name}_sum"), _chosen(f"{name}_count"))
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        yield f"sum by (le) ({_chosen(f'{name}_bucket')})"
    for name in ("request_prompt_tokens", "request_generation_tokens"):
        shares = f"sum by (le) (increase(vllm:{name}_bucket{labels}[$__range]))"
        count = f"sum(increase(vllm:{name}_count{labels}[$__range]))"
        yield f"{shares} / on () group_left () ({count} > 0)"
    for cache in ("prefix_cache", "external_prefix_cache", "mm_cache"):
        yield _share(_chosen(f"{cache}_hits_total"), _chosen(f"{cache}_queries_total"))
    for source in ("local_compute", "local_cache_hit", "external_kv_transfer"):
        chosen = f', source="{source}"'
        yield f"sum({_chosen('prompt_tokens_by_source_total', chosen)})"
    requests = f"rate(http_requests_total{{{SERVER}}}[$__rate_interval])"
    errors = f'rate(http_requests_total{{{SERVER}, status="5xx"}}[$__rate_interval])'
    yield f"(sum({errors}) or vector(0)) / (sum({requests}) > 0)"
    yield from (f"sum by ({label}) ({requests})" for label in ("status", "handler"))
    seconds = f"http_request_duration_seconds_sum{{{SERVER}}}[$__rate_interval]"
    count = seconds.replace("_sum", "_count")
    yield f"sum by (handler) (rate({seconds})) / (sum by (handler) (rate({count})) > 0)"


def _overview_state(labels: str) -> Iterator[str]:
    for name in (
        "request_success_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_preemptions_total",
    ):
        yield f"sum({_chosen(name)})"
    yield from (
        f"sum by (model_name) ({_chosen(f'{kind}_tokens_total')})" for kind in ("prompt", "generation")
    )
    yield 'count(up{job=~"$job"} == 0) or vector(0)'
    yield f"count(vllm:num_requests_running{labels})"
    yield from (f"sum(vllm:num_requests_{state}{labels})" for state in ("running", "waiting"))
    yield from (f"{how}(vllm:kv_cache_usage_perc{labels})" for how in ("max", "avg", "min"))
    for reason in ("capacity", "deferred"):
        yield f'sum(vllm:num_requests_waiting_by_reason{{{CHOSEN}, reason="{reason}"}})'
    for name, variable in (
        ("time_to_first_token_seconds", "$ttft_slo"),
        ("request_time_per_output_token_seconds", "$tpot_slo"),
    ):
        yield _share(_chosen(f"{name}_bucket", f', le="{variable}"'), _chosen(f"{name}_count"))
    ends = _chosen("request_success_total")
    yield f"sum by (finished_reason) ({ends})"
    yield f"sum by (finished_reason) ({ends}) / ignoring (finished_reason) group_left () (sum({ends}) > 0)"


def _overview_models(labels: str) -> Iterator[str]:
    running = f"last_over_time(vllm:num_requests_running{labels}[$__range])"
    yield f"count by (model_name) (group by (model_name, instance) ({running}))"
    for name in ("request_success_total", "generation_tokens_total"):
        yield f"sum by (model_name) ({_chosen(name, window='$__range')})"
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        yield _quantile("0.95", name, labels, "le, model_name", "$__range")
    failed = _chosen("request_success_total", ', finished_reason="error"', "$__range")
    ended = _chosen("request_success_total", window="$__range")
    yield f"sum by (model_name) ({failed}) / (sum by (model_name) ({ended}) > 0)"
    yield f"max by (model_name) (max_over_time(vllm:kv_cache_usage_perc{labels}[$__range]))"
    yield f"round(sum by (model_name) (increase(vllm:num_preemptions_total{labels}[$__range])))"


QUERIES = [
    *(VllmQuery("grafana", expression) for expression in _classic()),
    *(VllmQuery("performance_statistics", expression) for expression in _performance()),
    *(VllmQuery("query_statistics", expression) for expression in _usage()),
    *(VllmQuery("vllm_overview", expression) for expression in _overview()),
]

UNANSWERED = {
    "vllm:external_prefix_cache_": "no cache of prefixes outside of workers",
    "vllm:mm_cache_": "no models of images",
    "vllm:prompt_tokens_by_source_total": (
        "`prefix_cache_hits_total` and `prefix_cache_queries_total` tell the same"
    ),
    'reason="deferred"': "no request is put off for such a reason",
    "http_requests_total": "it has the prefix, and whole statuses",
    "http_request_duration_seconds": "`e2e_request_latency_seconds` is measured by model",
}
"""Parts of expressions that no sfllm answers, each with the reason as the documentation has it."""


def unanswered(expression: str) -> str | None:
    """The part of an expression for which it has no answer; None if it has one."""
    return next((part for part in UNANSWERED if part in expression), None)
