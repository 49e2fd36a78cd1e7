from __future__ import annotations

import random
from itertools import pairwise

from chaos.plan import OF_LINKS, make_plan
from hypothesis import given
from hypothesis import strategies as st

TARGETS = ["scheduler", "gateway-0", "gateway-1", "worker-0", "worker-1", "worker-2"]


@given(st.integers(), st.floats(10, 600), st.floats(1, 10), st.floats(0.5, 5))
def test_a_plan_follows_from_its_seed_and_leaves_each_target_time_to_recover(
    seed: int, seconds: float, every: float, lease: float
) -> None:
    plan = make_plan(random.Random(seed), TARGETS, seconds, every, lease)
    assert plan == make_plan(random.Random(seed), TARGETS, seconds, every, lease)
    assert plan == sorted(plan, key=lambda fault: fault.at)
    for target in TARGETS:
        own = [fault for fault in plan if fault.target == target]
        for earlier, later in pairwise(own):
            assert later.at >= earlier.at + earlier.seconds + lease
    assert not any(fault.target == "scheduler" for fault in plan if fault.kind in OF_LINKS)
    assert all(0 < fault.at <= seconds for fault in plan)
    assert all((fault.seconds > 0) == (fault.kind not in {"kill", "restart"}) for fault in plan)


def test_a_long_plan_has_faults_of_every_kind_at_every_service() -> None:
    plan = make_plan(random.Random(1), TARGETS, 3600, 4, 2)
    assert {fault.target for fault in plan} == set(TARGETS)
    assert {fault.kind for fault in plan} == {"kill", "stop", "restart", *OF_LINKS}
    assert any(fault.seconds > 2 for fault in plan)
    assert any(0 < fault.seconds < 2 for fault in plan)
