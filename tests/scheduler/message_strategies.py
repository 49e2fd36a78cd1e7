"""Random messages of any kind, with values that no honest peer would send."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from sfllm.messages import Message
from sfllm.wire import as_array

SIMPLE: dict[type, st.SearchStrategy[object]] = {
    msgspec.inspect.IntType: st.integers(-(2**63), 2**64 - 1),
    msgspec.inspect.FloatType: st.floats(allow_nan=False),
    msgspec.inspect.StrType: st.text(max_size=20),
    msgspec.inspect.BytesType: st.binary(max_size=20),
    msgspec.inspect.BoolType: st.booleans(),
    msgspec.inspect.NoneType: st.none(),
}


def values_of(hint: object) -> st.SearchStrategy[object]:
    """Values of a field's type. msgspec describes types, so that a new field needs no new test."""
    match hint:
        case msgspec.inspect.UnionType():
            return st.one_of([values_of(part) for part in hint.types])
        case msgspec.inspect.TupleType():
            return st.tuples(*[values_of(part) for part in hint.item_types])
        case msgspec.inspect.VarTupleType():
            return st.lists(values_of(hint.item_type), max_size=4).map(tuple)
        case msgspec.inspect.StructType():
            return st.builds(hint.cls, *[values_of(field.type) for field in hint.fields])
    return SIMPLE[type(hint)]


def arrays_of(kind: type[Message]) -> st.SearchStrategy[tuple[memoryview, ...]]:
    items = {
        "Q": st.integers(0, 2**64 - 1),
        "I": st.integers(0, 2**32 - 1),
        "f": st.floats(width=32, allow_nan=False),
    }
    columns = [
        st.lists(items[code], max_size=8).map(lambda values, code=code: as_array(code, values))
        for code in kind.array_types
    ]
    return st.tuples(*columns)
