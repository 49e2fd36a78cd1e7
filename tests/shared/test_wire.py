"""Messages to frames and back, and whatever else may arrive instead of a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import arrays_of, values_of

from sfllm import messages
from sfllm.messages import GatewayBeat, Message, Submit
from sfllm.wire import MAGIC, PROTOCOL_VERSION, Decoded, Frame, WireError, as_array, decoder, encode

LINKS = {
    "gateway to scheduler": messages.GATEWAY_TO_SCHEDULER,
    "scheduler to gateway": messages.SCHEDULER_TO_GATEWAY,
    "worker to scheduler": messages.WORKER_TO_SCHEDULER,
    "scheduler to worker": messages.SCHEDULER_TO_WORKER,
    "assets": messages.ASSETS,
}
KINDS = sorted({kind for link in LINKS.values() for kind in link}, key=lambda kind: kind.kind)


def outcome(decode: Callable[[Sequence[Frame]], Decoded], frames: Sequence[Frame]) -> Message | str:
    """The message, or the reason why there is none. Anything else that is raised fails the test."""
    try:
        return decode(frames).message
    except WireError as error:
        return str(error)


def copied(frames: Sequence[bytes | bytearray | memoryview]) -> list[bytes]:
    """Frames as a socket delivers them."""
    return [bytes(frame) for frame in frames]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_message_survives_the_wire(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values_of(msgspec.inspect.type_info(kind)))
    assert isinstance(message, Message)
    arrays = data.draw(arrays_of(kind))
    decoded = decoder([kind])(copied(encode(message, *arrays)))
    assert decoded.message == message
    assert [list(view) for view in decoded.arrays] == [list(view) for view in arrays]


def test_the_kinds_of_all_messages_differ() -> None:
    assert len({kind.kind for kind in KINDS}) == len(KINDS)
    defined = {
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, Message) and value is not Message
    }
    assert defined == set(KINDS), "a message that belongs to no link"


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@settings(max_examples=100, deadline=None)
@given(frames=st.lists(st.binary(max_size=40), max_size=9))
def test_any_bytes_are_a_message_or_a_wire_error(
    link: tuple[type[Message], ...], frames: list[bytes]
) -> None:
    decode = decoder(link)
    for kind in link:
        header = MAGIC + bytes((PROTOCOL_VERSION, kind.kind))
        for attempt in (frames, [header, *frames]):
            result = outcome(decode, attempt)
            assert isinstance(result, link) or result


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values_of(msgspec.inspect.type_info(kind)))
    assert isinstance(message, Message)
    frames = copied(encode(message, *data.draw(arrays_of(kind))))
    index = data.draw(st.integers(0, len(frames) - 1))
    position = data.draw(st.integers(0, max(0, len(frames[index]) - 1)))
    damage = data.draw(st.binary(max_size=3))
    frames[index] = frames[index][:position] + damage + frames[index][position + 1 :]
    result = outcome(decoder(KINDS), frames)
    assert isinstance(result, Message) or result


def test_deep_nesting_is_a_wire_error() -> None:
    header = encode(GatewayBeat(1))[0]
    with pytest.raises(WireError, match="malformed GatewayBeat"):
        decoder([GatewayBeat])([header, b"\x91" * 100_000 + b"\x01"])


def test_another_protocol_version_is_refused_with_both_versions() -> None:
    header, body = copied(encode(GatewayBeat(1)))
    with pytest.raises(WireError, match="peer speaks protocol version 9, this process 1: upgrade one"):
        decoder([GatewayBeat])([header[:2] + b"\x09" + header[3:], body])


def test_a_message_of_another_link_is_refused() -> None:
    with pytest.raises(WireError, match="message kind 40 does not belong on this link"):
        decoder(messages.GATEWAY_TO_SCHEDULER)([MAGIC + bytes((PROTOCOL_VERSION, 40)), b"\x90"])


def test_a_missing_array_and_a_cut_one_are_refused() -> None:
    decode = decoder([Submit])
    submit = Submit("r", 1, 0, "m", (0,), (0,), messages.Sampling(1, 1), 0, 1)
    frames = copied(encode(submit, as_array("I", [1]), as_array("I", [])))
    with pytest.raises(WireError, match="carries 2 arrays, got 1"):
        decode(frames[:-1])
    with pytest.raises(WireError, match="3 bytes, not a multiple"):
        decode([*frames[:2], b"abc", b""])


def test_arrays_of_the_wrong_type_are_not_sent() -> None:
    with pytest.raises(WireError, match="carries arrays '', got 'I'"):
        encode(GatewayBeat(1), as_array("I", [1]))


def test_a_value_that_does_not_fit_its_column_is_an_error() -> None:
    with pytest.raises(OverflowError):
        as_array("I", [2**32])
