"""Files of hashed keys, and the command that adds to them."""

from __future__ import annotations

from hashlib import sha256

import pytest

from sfllm.api_keys import hash_of, key_line, new_key, parse_keys

HASH = sha256(b"k").hexdigest()


def test_a_line_is_found_again_by_the_hash_of_its_key() -> None:
    key = new_key()
    line = key_line("team-a@x.org", key)
    assert key not in line
    assert parse_keys("# comment\n\n" + line) == {hash_of(key.encode()): "team-a@x.org"}


def test_a_name_may_have_several_keys() -> None:
    assert set(parse_keys(key_line("a", "one") + key_line("a", "two")).values()) == {"a"}


def test_new_keys_differ_and_fit_a_header() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 43 and key.isascii() and "," not in key for key in keys)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a=b", "a,b", "é", "a" * 65, "a\n"])
def test_a_name_that_would_break_the_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        key_line(name, "k")


@pytest.mark.parametrize(
    "line", ["sk-plain", "a:sk-plain", f"a:{HASH[:-1]}", f"a:{HASH}0", f":{HASH}", f"a:{HASH}:5", HASH]
)
def test_a_line_at_fault_is_named_by_its_number_alone(line: str) -> None:
    with pytest.raises(ValueError, match="line 2") as refused:
        parse_keys(f"#\n{line}\n")
    assert line not in str(refused.value)


def test_the_same_key_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2 has the key of an earlier line"):
        parse_keys(f"a:{HASH}\nb:{HASH.upper()}\n")


def test_a_file_of_nothing_is_refused_and_one_of_comments_lets_nobody_in() -> None:
    with pytest.raises(ValueError, match="empty"):
        parse_keys("\n ")
    assert parse_keys("# nobody\n") == {}
