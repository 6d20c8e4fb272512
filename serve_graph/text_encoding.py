"""Text encoding: counting tokens, encoding prompts in batches, and a cache of what was encoded.

Results equal the stock pipeline's: the encoder sees the real tokens under its mask, and the engine pads the rows
with zeros to the model's fixed length. Knows nothing of Ray, requests or jobs.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

import torch

from schemas.handoff import TextEmbedding, TextItem
from serve_graph.engine.text_checkpoint import TextParts
from serve_graph.metrics import PreprocessorMetrics
from serve_graph.token_counting import TokenCounter

_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class EmbeddingCache:
    """The least recently used embeddings go first when the bytes run out. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, TextEmbedding] = OrderedDict()
        self.nbytes = 0

    def get(self, text: str, solo: bool) -> TextEmbedding | None:
        """A solo reader only takes what was encoded alone."""
        found = self._entries.get(text)
        if found is None or (solo and not found.solo):
            return None
        self._entries.move_to_end(text)
        return found

    def put(self, text: str, embedding: TextEmbedding) -> None:
        """Keep an embedding, unless it alone is over the bound or what is kept was encoded alone and it was not."""
        known = self._entries.get(text)
        if embedding.nbytes > self._max_bytes or (known is not None and known.solo and not embedding.solo):
            return
        self._entries.pop(text, None)  # what is new goes to the end
        self.nbytes += embedding.nbytes - (known.nbytes if known is not None else 0)
        self._entries[text] = embedding
        while self.nbytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.nbytes -= dropped.nbytes


class TextEncoder:
    """The tokeniser, the text encoder and the cache in front of them. Safe to call from several threads."""

    def __init__(
        self,
        parts: TextParts,
        max_sequence_length: int,
        max_cache_bytes: int,
        metrics: PreprocessorMetrics,
    ) -> None:
        self._parts = parts
        self.tokens = TokenCounter(parts.tokenizer, max_sequence_length)
        self._cache = EmbeddingCache(max_cache_bytes)
        self._metrics = metrics
        self._lock = threading.Lock()

    def encode(self, items: Sequence[TextItem]) -> list[TextEmbedding]:
        """Encode texts, those that may share in one forward. Returns one embedding per item, in order."""
        with self._lock:
            found = {item: self._cache.get(item.text, item.solo) for item in dict.fromkeys(items)}
            for embedding in found.values():
                self._metrics.cache_miss() if embedding is None else self._metrics.cache_hit()
            missing = [item for item, embedding in found.items() if embedding is None]
            shared = [item for item in missing if not item.solo]
            for group in [[item] for item in missing if item.solo] + ([shared] if shared else []):
                for item, embedding in zip(group, self._forward(group), strict=True):
                    found[item] = embedding
                    self._cache.put(item.text, embedding)
            self._metrics.set_cache_bytes(self._cache.nbytes)
            return [_present(found[item]) for item in items]

    @torch.inference_mode()
    def _forward(self, items: Sequence[TextItem]) -> list[TextEmbedding]:
        began = time.monotonic()
        rows = [self.tokens.tokenize(item.text) for item in items]
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self._parts.device
        # (B, max(lengths), text_dim)
        hidden = self._parts.text_encoder(ids.to(device), mask.to(device)).last_hidden_state.cpu()
        self._metrics.batch_encoded(time.monotonic() - began, len(items))
        solo = len(items) == 1
        return [_embedding(hidden[i, :length], solo) for i, length in enumerate(lengths)]


def _embedding(rows: torch.Tensor, solo: bool) -> TextEmbedding:
    bits = rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
    values = bits.numpy().copy()  # a view would keep the whole padded batch in memory
    return TextEmbedding(values=values, dtype=_DTYPE_NAMES[rows.dtype], solo=solo)  # type: ignore[arg-type]  # a key


def _present(embedding: TextEmbedding | None) -> TextEmbedding:
    if embedding is None:
        raise RuntimeError("an item was not encoded")
    return embedding
