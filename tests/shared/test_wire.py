"""Messages to frames and back, and whatever else may arrive instead of a message."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import arrays_of, values_of

from sfllm import messages
from sfllm.messages import GatewayBeat, Message, Submit
from sfllm.wire import (
    MAGIC,
    PROTOCOL_VERSION,
    Decoded,
    VersionError,
    WireError,
    as_array,
    decoder,
    encode,
    version_notice,
)

LINKS = {
    "gateway to scheduler": messages.GATEWAY_TO_SCHEDULER,
    "scheduler to gateway": messages.SCHEDULER_TO_GATEWAY,
    "worker to scheduler": messages.WORKER_TO_SCHEDULER,
    "scheduler to worker": messages.SCHEDULER_TO_WORKER,
    "assets": messages.ASSETS,
}
KINDS = sorted({kind for link in LINKS.values() for kind in link}, key=lambda kind: kind.kind)


def outcome(decode: Callable[[bytes], Decoded], frame: bytes) -> Message | str:
    """The message, or the reason why there is none. Anything else that is raised fails the test."""
    try:
        return decode(frame).message
    except WireError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_message_survives_the_wire(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values_of(msgspec.inspect.type_info(kind)))
    assert isinstance(message, Message)
    arrays = data.draw(arrays_of(kind))
    decoded = decoder([kind])(encode(message, *arrays))
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
@given(noise=st.binary(max_size=40), parts=st.lists(st.binary(max_size=40), min_size=10, max_size=10))
def test_any_bytes_are_a_message_or_a_wire_error(
    link: tuple[type[Message], ...], noise: bytes, parts: list[bytes]
) -> None:
    decode = decoder(link)
    for kind in link:
        start = MAGIC + bytes((PROTOCOL_VERSION, kind.kind))
        *arrays, body = parts[: len(kind.array_types) + 1]
        sizes = b"".join(len(part).to_bytes(4, "little") for part in (body, *arrays))
        for attempt in (noise, start + noise, start + sizes + b"".join((*arrays, body))):
            result = outcome(decode, attempt)
            assert isinstance(result, link) or result


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values_of(msgspec.inspect.type_info(kind)))
    assert isinstance(message, Message)
    frame = encode(message, *data.draw(arrays_of(kind)))
    position = data.draw(st.integers(0, len(frame) - 1))
    damage = data.draw(st.binary(max_size=3))
    result = outcome(decoder(KINDS), frame[:position] + damage + frame[position + 1 :])
    assert isinstance(result, Message) or result


def framed(kind: type[Message], body: bytes, *arrays: bytes) -> bytes:
    """What `encode` would make of that body and these arrays."""
    sizes = b"".join(len(part).to_bytes(4, "little") for part in (body, *arrays))
    return MAGIC + bytes((PROTOCOL_VERSION, kind.kind)) + sizes + b"".join(arrays) + body


def test_deep_nesting_is_a_wire_error() -> None:
    with pytest.raises(WireError, match="malformed GatewayBeat"):
        decoder([GatewayBeat])(framed(GatewayBeat, b"\x91" * 100_000 + b"\x01"))


def test_another_protocol_version_is_refused_with_both_versions() -> None:
    frame = encode(GatewayBeat(1))
    with pytest.raises(
        VersionError, match=f"peer speaks protocol version 9, this process {PROTOCOL_VERSION}: upgrade one"
    ):
        decoder([GatewayBeat])(frame[:2] + b"\x09" + frame[3:])


def test_a_notice_tells_a_peer_of_another_version_and_means_nothing_to_one_of_the_same() -> None:
    notice = version_notice()
    with pytest.raises(VersionError, match="peer speaks protocol version 9"):
        decoder([GatewayBeat])(notice[:2] + b"\x09" + notice[3:])
    with pytest.raises(WireError, match="does not belong"):
        decoder([GatewayBeat])(notice)


def test_a_message_of_another_link_is_refused() -> None:
    with pytest.raises(WireError, match="message kind 40 does not belong on this link"):
        decoder(messages.GATEWAY_TO_SCHEDULER)(MAGIC + bytes((PROTOCOL_VERSION, 40)) + b"\x90")


def test_a_cut_message_and_a_cut_array_are_refused() -> None:
    decode = decoder([Submit])
    submit = Submit("r", 1, 0, "m", (0,), (0,), messages.Sampling(1, 1), 0, 1)
    frame = encode(submit, as_array("I", [1]), as_array("I", []), as_array("Q", []))
    assert decode(frame).message == submit
    with pytest.raises(WireError, match="Submit is cut off after 19 bytes"):
        decode(frame[:19])
    with pytest.raises(WireError, match=f"announces {len(frame)} bytes, but {len(frame) - 1} came"):
        decode(frame[:-1])
    with pytest.raises(WireError, match=f"announces {len(frame)} bytes, but {len(frame) + 1} came"):
        decode(frame + b"x")
    with pytest.raises(WireError, match="3 bytes, not a multiple"):
        decode(framed(Submit, b"\x90", b"abc", b"", b""))


def test_arrays_of_the_wrong_type_are_not_sent() -> None:
    with pytest.raises(WireError, match="carries arrays '', got 'I'"):
        encode(GatewayBeat(1), as_array("I", [1]))


def test_a_value_that_does_not_fit_its_column_is_an_error() -> None:
    with pytest.raises(OverflowError):
        as_array("I", [2**32])
