"""Walks a folder in the order in which S3 lists keys. Knows nothing of pages or ETags."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from storage.folder import NOT_A_FILE, subfolder
from storage.keys import check_key
from storage.store import InvalidKey


class Found(NamedTuple):
    """A regular file whose place below the folder is a legal key."""

    key: str
    stat: os.stat_result


def keys_in_order(folder: int, prefix: str, start_after: str, at: str = "") -> Iterator[Found]:
    """The objects below `folder` whose keys begin with `prefix` and come behind `start_after`.

    Ordered by the whole key: a folder sorts as its name with the slash, so `a-b` comes before `a/c`. Subtrees
    that can't hold a match are not read. Hidden and foreign names, links and what vanishes meanwhile are left
    out.

    Args:
        folder: descriptor of the folder that `at` names.
        prefix: what the keys begin with.
        start_after: the last key of the page before; empty for none.
        at: the folder's own place, empty or ending with a slash.
    """
    for name, is_folder in _entries(folder):
        place = at + name
        if is_folder:
            if _may_hold(place, prefix, start_after):
                yield from _below(folder, name, prefix, start_after, place)
        elif place.startswith(prefix) and place > start_after and _is_key(place):
            try:
                yield Found(place, os.stat(name, dir_fd=folder, follow_symlinks=False))
            except FileNotFoundError:
                continue


def _below(folder: int, name: str, prefix: str, start_after: str, place: str) -> Iterator[Found]:
    try:
        with subfolder(folder, [name.removesuffix("/")]) as child:
            yield from keys_in_order(child, prefix, start_after, place)
    except OSError as error:
        if error.errno not in NOT_A_FILE:
            raise


def _entries(folder: int) -> list[tuple[str, bool]]:
    """Files by name and folders by name with a slash, and whether it is a folder; sorted."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        files = [(entry.name, False) for entry in visible if entry.is_file(follow_symlinks=False)]
        folders = [(entry.name + "/", True) for entry in visible if entry.is_dir(follow_symlinks=False)]
    return sorted(files + folders)


def _may_hold(place: str, prefix: str, start_after: str) -> bool:
    """Whether a key below `place`, which ends with a slash, can match."""
    on_the_way = place.startswith(prefix) or prefix.startswith(place)
    return on_the_way and (place > start_after or start_after.startswith(place))


def _is_key(place: str) -> bool:
    try:
        check_key(place)
    except InvalidKey:
        return False
    return True
