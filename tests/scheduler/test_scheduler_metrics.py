"""What the scheduler's metrics say of grants and of what workers have left to prefill."""

from __future__ import annotations

from core_driver import Driver

from sfllm.metrics import Metrics
from sfllm_scheduler.core.events import Record
from sfllm_scheduler.observe import Observer


def test_grants_are_measured_by_size_hits_and_what_is_outstanding(driver: Driver) -> None:
    metrics = Metrics("")
    observer = Observer(metrics)
    worker = driver.worker()
    driver.worker_beat(worker, names=[1, 2])
    driver.submit(200, names=[1, 2, 3])
    driver.submit(190, names=[1, 2])
    driver.tick()
    for record in [action for action in driver.log if isinstance(action, Record)]:
        observer.record(record)
    observer.refresh(driver.core.state, driver.now)
    text = metrics.render().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    found = {name: float(value) for name, value in values.items()}
    assert found['prefix_granted_tokens_total{model_name="m"}'] == 390
    assert found['prefix_expected_cached_tokens_total{model_name="m"}'] == 4 * 64
    assert found['outstanding_prefill_tokens{model_name="m"}'] == 390 - 4 * 64
    assert found["cohort_size_requests_sum"] == 2
    assert found["recalls_total"] == 0
