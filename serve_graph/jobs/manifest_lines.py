"""The lines of manifests, some at a time: a batch's prompts stay in the store. Knows no batch's state."""

from array import array
from collections import OrderedDict
from typing import Final

from schemas.batches import BatchItem
from serve_graph.jobs.recording import Recorder
from storage.batch_records import BatchRecords

LINES_PER_READ: Final = 32
MAX_BYTES: Final = 16 * 2**20
"""Of lines kept, least recently used out first."""

MAX_ENDS: Final = 32
"""Manifests whose line ends are kept: 80 kB each at 10,000 lines."""


class ManifestLines:
    """Reads and keeps lines."""

    def __init__(self, recorder: Recorder, records: BatchRecords) -> None:
        self._recorder = recorder
        self._records = records
        self._ends: OrderedDict[str, array[int]] = OrderedDict()
        self._chunks: OrderedDict[tuple[str, int], list[bytes]] = OrderedDict()
        self._bytes = 0

    def cached(self, batch_id: str, index: int) -> BatchItem | None:
        """An item, where its line is at hand. Raises ValueError for a line that is none."""
        number, place = divmod(index, LINES_PER_READ)
        chunk = self._chunks.get((batch_id, number))
        if chunk is None:
            return None
        self._chunks.move_to_end((batch_id, number))
        return BatchItem.model_validate_json(chunk[place])

    async def item(self, batch_id: str, index: int) -> BatchItem:
        """An item. Raises BatchNotFound, StoreUnavailable."""
        found = self.cached(batch_id, index)
        if found is not None:
            return found
        lines = await self.fetch(batch_id, index, await self.ends(batch_id))
        return BatchItem.model_validate_json(lines[index % LINES_PER_READ])

    async def fetch(self, batch_id: str, index: int, ends: "array[int]") -> list[bytes]:
        """Have a line, and those beside it, at hand. Returns them all. Raises BatchNotFound, StoreUnavailable."""
        number = index // LINES_PER_READ
        first = number * LINES_PER_READ
        lines = await self._recorder.io(self._records.lines, batch_id, ends, first, LINES_PER_READ)
        self._drop((batch_id, number))
        self._chunks[batch_id, number] = lines
        self._bytes += sum(map(len, lines))
        while self._bytes > MAX_BYTES and len(self._chunks) > 1:
            self._drop(next(iter(self._chunks)))
        return lines

    async def ends(self, batch_id: str) -> "array[int]":
        """Where the lines end. Raises BatchNotFound, StoreUnavailable."""
        ends = self._ends.get(batch_id)
        if ends is None:
            ends = self._ends[batch_id] = await self._recorder.io(self._records.line_ends, batch_id)
            if len(self._ends) > MAX_ENDS:
                self._ends.popitem(last=False)
        self._ends.move_to_end(batch_id)
        return ends

    def _drop(self, key: tuple[str, int]) -> None:
        self._bytes -= sum(map(len, self._chunks.pop(key, ())))
