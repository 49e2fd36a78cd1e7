import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sfllm_worker.sampling.philox import Purpose, philox4x32, uniforms

U64 = st.integers(0, 2**64 - 1)


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], dtype=np.uint64) for value in values)


def test_philox_gives_the_published_vectors() -> None:
    # The known-answer file of Random123, the authors' own implementation.
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        result = philox4x32(words(*counter), words(*key))
        assert tuple(int(word[0]) for word in result) == expected


@given(st.lists(st.tuples(U64, st.integers(0, 127), st.integers(0, 2**20)), min_size=1, max_size=20))
def test_a_number_depends_on_its_own_key_only(keys: list[tuple[int, int, int]]) -> None:
    together = uniforms(*map(list, zip(*keys, strict=True)), Purpose.SAMPLE)
    alone = [uniforms([s], [c], [p], Purpose.SAMPLE)[0] for s, c, p in keys]
    assert together.tolist() == alone
    assert all(0 <= value < 1 for value in alone)


def test_numbers_are_uniform_over_positions_choices_and_seeds() -> None:
    count = 20_000
    zeros, many = [0] * count, list(range(count))
    for keys in ((zeros, zeros, many), (zeros, many, zeros), (many, zeros, zeros)):
        histogram, _ = np.histogram(uniforms(*keys, Purpose.SAMPLE), bins=20, range=(0, 1))
        expected = count / 20
        chi_squared = float(((histogram - expected) ** 2 / expected).sum())
        assert chi_squared < 43.8  # the 0.999 quantile with 19 degrees of freedom
