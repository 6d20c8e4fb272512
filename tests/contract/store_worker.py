"""Run by the contract suite in processes of their own: one task against a store that the parent describes.

Reads the pickled factory of the store, prints `ready`, waits for a line, does the task, prints its result.
"""

import http.client
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from storage.store import ObjectStore, PreconditionFailed

CRASH_STATUS = 77
LARGE_BYTES = 100_000


def create(store: ObjectStore, keys: str, number: str) -> str:
    """Try to create each of the keys. Prints those that this process won."""
    won = []
    for key in keys.split(","):
        try:
            store.put(key, number.encode(), if_none_match=True)
        except PreconditionFailed:
            continue
        won.append(key)
    return ",".join(won)


def increment(store: ObjectStore, key: str, times: str, _number: str) -> str:
    """Add one to a counter by compare-and-swap, so many times. Prints how often another process was first."""
    lost = 0
    for _ in range(int(times)):
        while True:
            found = store.get(key)
            try:
                store.put(key, str(int(found.body) + 1).encode(), if_match=found.stat.etag)
            except PreconditionFailed:
                lost += 1
                continue
            break
    return str(lost)


def crash_before_rename(store: ObjectStore, key: str) -> str:
    """Die when the temporary file is whole and about to be renamed."""

    def crash(*_args: object, **_kwargs: object) -> NoReturn:
        os._exit(CRASH_STATUS)

    os.rename = crash
    store.put(key, b"x" * 100_000)
    return "survived"


def crash_in_the_body(store: ObjectStore, key: str) -> str:
    """Die when the server has half of the object."""
    _die_while_sending(1)
    store.put(key, b"x" * LARGE_BYTES)
    return "survived"


def crash_in_the_second_part(store: ObjectStore, key: str, path: str) -> str:
    """Die when the server has one part of a large file, and half of the next."""
    _die_while_sending(2)
    store.put(key, Path(path), if_none_match=True)
    return "survived"


def _die_while_sending(body: int) -> None:
    """Die in the middle of the large body of this number, counted from 1."""
    send = http.client.HTTPConnection.send
    sent = 0

    def send_or_die(connection: http.client.HTTPConnection, data: bytes) -> None:
        nonlocal sent
        sent += len(data) >= LARGE_BYTES
        if sent == body:
            send(connection, data[: len(data) // 2])
            os._exit(CRASH_STATUS)
        send(connection, data)

    http.client.HTTPConnection.send = send_or_die


TASKS: dict[str, Callable[..., str]] = {
    task.__name__: task
    for task in (create, increment, crash_before_rename, crash_in_the_body, crash_in_the_second_part)
}

if __name__ == "__main__":
    # The pickle comes from the parent, this project's own test.
    opened = pickle.loads(bytes.fromhex(sys.stdin.readline()))()  # noqa: S301  # sent by the test itself
    print("ready", flush=True)
    sys.stdin.readline()
    print(TASKS[sys.argv[1]](opened, *sys.argv[2:]))
