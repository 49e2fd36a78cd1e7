"""The models: which are known, what was loaded of each, which workers serve it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from sfllm_cli.doctor.evidence import Evidence, Process
from sfllm_cli.doctor.findings import Finding, ok, problem, warning
from sfllm_cli.doctor.load_checks import grown

UNLIKE_SHARE = 0.2
"""Workers of the same settings find a little more or less memory free; a fifth is more."""


def check_models(evidence: Evidence) -> Iterator[Finding]:
    """Whether every model can be served, with text and chat."""
    api = evidence.api
    if not api.answers:
        return
    if api.info.status == 401:
        yield warning(
            "models", "they are not told without a key", "give the doctor a key, best as SFLLM_API_KEY"
        )
        return
    if not api.info.ok:
        yield problem(
            "models", f"/get_server_info fails: {api.info.reason()}", "read the gateway's log; update it"
        )
        return
    if not api.models:
        yield problem(
            "models", "the gateway knows no model", "start a worker, and look at its log if there is one"
        )
    for model in api.models:
        name, workers = str(model.get("id")), int(model.get("workers", 0))
        yield _workers(name, workers)
        yield _card(evidence, name)


def _workers(name: str, workers: int) -> Finding:
    if workers:
        return ok(f"workers of {name}", f"{workers} can serve it")
    return problem(
        f"workers of {name}",
        "none is there: its requests wait, then fail with 503",
        "read the worker's log and start it again; its /ready says what it waits for",
    )


def _card(evidence: Evidence, name: str) -> Finding:
    check, answer = f"card of {name}", evidence.api.tokenizers.get(name)
    if answer is None:
        return ok(check, "not looked at: there are too many models")
    if not answer.ok:
        return problem(
            check,
            f"its tokenizer is not loaded: {answer.reason()}",
            "check --asset-address of scheduler, gateway and worker, and tokenizer.json of the model",
        )
    if not answer.fields().get("chat_template"):
        return warning(
            check,
            "tokenizer loaded, but it has no chat template: only completions work",
            "put chat_template.jinja beside the model's files if it is one for chat",
        )
    return ok(check, "tokenizer and chat template are loaded")


def check_fleet(evidence: Evidence) -> Iterator[Finding]:
    """Whether gateways, schedulers and workers have found each other, as their metrics say."""
    schedulers = evidence.of_role("scheduler")
    for gateway in evidence.gateways():
        yield _schedulers_of(gateway, len(schedulers))
    for scheduler in schedulers:
        yield _workers_of(scheduler, len(schedulers))
    by_model: dict[str, list[Process]] = defaultdict(list)
    for worker in evidence.of_role("worker"):
        lines = worker.after.find("kv_cache_usage_perc")
        by_model[lines[0].labels.get("model_name", "")].append(worker)
    for name, workers in by_model.items():
        yield from _same(name, workers)
        yield from _joined(evidence, name, workers)


def _schedulers_of(gateway: Process, known: int) -> Finding:
    check, connected = (
        f"links of {gateway.name}",
        int(gateway.after.total("gateway_schedulers_connected") or 0),
    )
    if not connected:
        return problem(
            check, "no scheduler answers it", "start one; --gateway-address must be the same on both sides"
        )
    if connected < known:
        return warning(
            check,
            f"{connected} of {known} schedulers answer it: the others' workers are out of its reach",
            "name every scheduler in its --gateway-address and --asset-address",
        )
    return ok(check, f"{connected} scheduler{'s' if connected > 1 else ''} connected")


def _workers_of(scheduler: Process, schedulers: int) -> Finding:
    check = f"workers of {scheduler.name}"
    serving = int(scheduler.after.total("workers", state="serving") or 0)
    draining = int(scheduler.after.total("workers", state="draining") or 0)
    if grown(scheduler, "worker_refusals_total"):
        return problem(
            check,
            "a worker was just sent away: others serve another model by its name",
            "give it another --served-model-name, or the same model, tokenizer and --quantization",
        )
    if not serving and schedulers == 1:
        return problem(
            check, "no worker has joined", "start one; --worker-address must be the same on both sides"
        )
    if not serving:
        return warning(
            check, "no worker has joined this scheduler", "start more workers, or fewer schedulers"
        )
    if draining:
        return warning(
            check,
            f"{serving} serving, {draining} leaving",
            "if nobody stopped them, they were refused: the log tells of a model whose files differ",
        )
    return ok(check, f"{serving} serving")


def _same(name: str, workers: list[Process]) -> Iterator[Finding]:
    if len(workers) < 2:
        return
    yield from _same_model(name, workers)
    sizes = [worker.after.total("kv_blocks") or 0 for worker in workers]
    if min(sizes) < (1 - UNLIKE_SHARE) * max(sizes):
        yield warning(
            f"likeness of {name}",
            f"its workers hold from {min(sizes):.0f} to {max(sizes):.0f} blocks of KV cache",
            "start them with equal settings, on equal machines or GPUs that nothing else uses",
        )
    else:
        yield ok(f"likeness of {name}", f"its {len(workers)} workers have caches of like size")


def _same_model(name: str, workers: list[Process]) -> Iterator[Finding]:
    """Whether what they serve by one name is one model, and its context as long everywhere."""
    check, remedy = f"model cards of {name}", "start them with equal --model, --quantization and flags"
    models, lengths = (_by_label(workers, label) for label in ("fingerprint", "max_model_len"))
    if len(models) > 1:
        yield problem(
            check,
            f"its workers serve different models, of which only one gets requests: {_listed(models)}",
            remedy,
        )
    elif len(lengths) > 1:
        yield warning(check, f"its workers take contexts of different lengths: {_listed(lengths)}", remedy)
    elif models:
        yield ok(check, "its workers serve the same")


def _by_label(workers: list[Process], label: str) -> dict[str, list[str]]:
    """The workers by what they tell of their model."""
    found: dict[str, list[str]] = defaultdict(list)
    for worker in workers:
        for line in worker.after.find("model_info"):
            found[line.labels.get(label, "")].append(worker.name)
    return found


def _listed(found: dict[str, list[str]]) -> str:
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in sorted(found.items()))


def _joined(evidence: Evidence, name: str, workers: list[Process]) -> Iterator[Finding]:
    counts = [int(model.get("workers", 0)) for model in evidence.api.models if model.get("id") == name]
    if counts and sum(counts) < len(workers):
        yield warning(
            f"joined of {name}",
            f"{len(workers)} workers run, and the gateway knows of {sum(counts)}",
            "look at /ready of each; check --worker-address, and that gateways know all schedulers",
        )
