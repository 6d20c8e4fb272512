"""API keys: their lines, and whose a key is."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_graph.api_keys import ApiKeys, InvalidApiKeys, Principal, Role, new_key

HASH = hashlib.sha256(b"a key").hexdigest()
OTHER_HASH = hashlib.sha256(b"another key").hexdigest()


def test_a_new_key_is_known_by_its_line() -> None:
    key, line = new_key("alice", Role.MONITOR, max_waiting_jobs=3, requests_per_minute=60)

    assert key not in line
    assert ApiKeys(line).principal_of(key) == Principal("alice", Role.MONITOR, 3, 60)
    assert new_key("alice")[0] != key


def test_several_lines_are_separated_by_white_space_or_commas() -> None:
    keys = ApiKeys(f"\n alice:{HASH},\tbob:{OTHER_HASH}:max_waiting_jobs=2\n")

    assert keys.principal_of("a key") == Principal("alice")
    assert keys.principal_of("another key") == Principal("bob", max_waiting_jobs=2)


@pytest.mark.parametrize("lines", ["", " \n,"])
def test_no_lines_are_no_keys(lines: str) -> None:
    assert not ApiKeys(lines)


@pytest.mark.parametrize(
    "lines",
    [
        "alice",
        f":{HASH}",
        f"Alice:{HASH}",
        f"anonymous:{HASH}",
        f"{'a' * 65}:{HASH}",
        f"alice:{HASH[1:]}",
        f"alice:{HASH.upper()}",
        "alice:wan_a-key-itself",
        f"alice:{HASH}:max_waiting_jobs=0",
        f"alice:{HASH}:max_waiting_jobs=-1",
        f"alice:{HASH}:max_waiting_jobs",
        f"alice:{HASH}:requests_per_minute=1e3",
        f"alice:{HASH}:role=admin",
        f"alice:{HASH}:role=monitor:role=generate",
        f"alice:{HASH}:colour=red",
        f"alice:{HASH} alice:{OTHER_HASH}",
        f"alice:{HASH} bob:{HASH}",
    ],
)
def test_a_line_that_can_not_be_read_is_refused_without_being_quoted(lines: str) -> None:
    with pytest.raises(InvalidApiKeys) as refusal:
        ApiKeys(lines)

    assert HASH not in str(refusal.value)
    assert "wan_a-key-itself" not in str(refusal.value)


@given(st.text(max_size=80))
def test_nothing_else_is_a_key(key: str) -> None:
    assert ApiKeys(f"alice:{HASH}").principal_of(key) == (Principal("alice") if key == "a key" else None)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_is_keys_or_invalid(lines: str) -> None:
    try:
        keys = ApiKeys(lines)
    except InvalidApiKeys:
        return
    assert keys.principal_of("a key") is None


def test_a_repr_shows_no_hash() -> None:
    assert HASH not in repr(ApiKeys(f"alice:{HASH}")._lines)
