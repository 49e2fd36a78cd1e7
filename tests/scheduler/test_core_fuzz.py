"""Whatever well-formed messages say, the core answers or ignores them and its tables stay sound."""

from __future__ import annotations

from core_driver import GATEWAY, Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import arrays_of, values_of
from msgspec.inspect import type_info
from msgspec.structs import replace

from sfllm.messages import (
    GATEWAY_TO_SCHEDULER,
    WORKER_TO_SCHEDULER,
    GatewayHeld,
    Message,
    ModelCard,
    Submit,
    WorkerHeld,
    WorkerHello,
)
from sfllm.wire import Array, encode
from sfllm_scheduler.core.events import FromGateway, FromWorker, ToGateway, ToWorker


def message_of(data: st.DataObject, kinds: tuple[type[Message], ...]) -> tuple[Message, tuple[Array, ...]]:
    kind = data.draw(st.sampled_from(kinds))
    message = data.draw(values_of(type_info(kind)))
    assert isinstance(message, Message)
    return message, data.draw(arrays_of(kind))


def with_expected_number(driver: Driver, message: Message) -> Message:
    """A list that answers the newest question, or the message as it is."""
    match message:
        case GatewayHeld() if GATEWAY in driver.core.state.gateways:
            return replace(message, number=driver.core.state.gateways[GATEWAY].asked)
        case WorkerHeld() if driver.core.state.workers:
            return replace(message, number=max(w.asked for w in driver.core.state.workers.values()))
    return message


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_nonsense_from_peers_never_breaks_the_core(data: st.DataObject) -> None:
    driver = Driver()
    driver.gateway()
    worker = driver.worker()
    driver.submit()
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            message, arrays = message_of(data, GATEWAY_TO_SCHEDULER)
            if isinstance(message, Submit):
                message = replace(message, model="m", attempt=data.draw(st.integers(-1, 3)))
            message = with_expected_number(driver, message)
            driver.send(FromGateway(data.draw(st.sampled_from([GATEWAY, b"\xff"])), message, arrays))
        else:
            message, arrays = message_of(data, WORKER_TO_SCHEDULER)
            if hasattr(message, "lease"):
                message = replace(message, lease=driver.core.state.last_lease)
            message = with_expected_number(driver, message)
            driver.send(FromWorker(data.draw(st.sampled_from([worker, b"\xfe"])), message, arrays))
        driver.tick(1.0)
    for action in driver.log:
        if isinstance(action, ToGateway | ToWorker):
            assert encode(action.message, *action.arrays), "what the core sends can be encoded"


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_worker_with_any_card_and_capacity_can_join_or_is_refused(data: st.DataObject) -> None:
    driver = Driver()
    driver.gateway()
    card = data.draw(values_of(type_info(ModelCard)))
    hello = data.draw(values_of(type_info(WorkerHello)))
    assert isinstance(hello, WorkerHello)
    assert isinstance(card, ModelCard)
    driver.send(FromWorker(b"w-any", replace(hello, card=card)))
    driver.submit(model=card.name)
    driver.tick()
    driver.tick(100.0)
    assert driver.core.state.waiting_count == 0
