"""Token counts, encodings against the stock pipeline's, and the cache."""

import html
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from hypothesis import assume, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from schemas.errors import PromptTooLong
from schemas.handoff import TextEmbedding, TextItem
from schemas.official_profiles import WAN_NEGATIVE_PROMPT
from serve_graph.engine.denoise import pad_embedding
from serve_graph.engine.text_checkpoint import TextParts, load_text_parts
from serve_graph.metrics import PreprocessorMetrics
from serve_graph.prompts import clean_prompt, surely_fits
from serve_graph.text_encoding import EmbeddingCache, TextEncoder

MAX_LENGTH = 128

PROMPTS = (
    "a red circle moving left",
    "",
    "  two   dogs\t\n running ",
    "fire &amp;amp; water &lt;3 &quot;quoted&quot;",
    "l’été, œuvre — schön \U0001f600",
    WAN_NEGATIVE_PROMPT,
    "a cat " * 60,
)

MakeEncoder = Callable[..., TextEncoder]


@pytest.fixture
def make_encoder(text_parts: TextParts, registry: CollectorRegistry) -> MakeEncoder:
    def make(parts: TextParts = text_parts, max_cache_bytes: int = 2**20) -> TextEncoder:
        return TextEncoder(parts, MAX_LENGTH, max_cache_bytes, PreprocessorMetrics(registry))

    return make


@pytest.fixture
def encoder(make_encoder: MakeEncoder) -> TextEncoder:
    return make_encoder()


def solo(text: str) -> TextItem:
    return TextItem(text, solo=True)


def shared(text: str) -> TextItem:
    return TextItem(text, solo=False)


def stock_embedding(pipeline: WanPipeline, text: str) -> torch.Tensor:
    """(1, MAX_LENGTH, text_dim), zeros behind the real tokens."""
    embeddings: torch.Tensor = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=MAX_LENGTH, device=torch.device("cpu")
    )[0]
    return embeddings


def assert_equals_stock(embedding: TextEmbedding, stock: torch.Tensor) -> None:
    padded = pad_embedding(embedding, MAX_LENGTH)
    assert padded.shape == stock.shape
    assert torch.equal(padded == 0, stock == 0)  # as many real tokens
    assert float((padded - stock).abs().max() / stock.std()) <= 1e-5


# Encoding


@pytest.mark.parametrize("prompt", PROMPTS)
def test_encode_equals_the_stock_pipeline_when_alone(
    prompt: str, encoder: TextEncoder, stock_pipeline: WanPipeline
) -> None:
    [embedding] = encoder.encode([solo(prompt)])

    assert_equals_stock(embedding, stock_embedding(stock_pipeline, prompt))


def test_encode_equals_the_stock_pipeline_when_batched(encoder: TextEncoder, stock_pipeline: WanPipeline) -> None:
    embeddings = encoder.encode([shared(prompt) for prompt in PROMPTS])

    for prompt, embedding in zip(PROMPTS, embeddings, strict=True):
        assert_equals_stock(embedding, stock_embedding(stock_pipeline, prompt))


def test_encode_gives_the_same_bits_when_a_solo_item_comes_among_others(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(max_cache_bytes=0)
    [alone] = encoder.encode([solo(PROMPTS[0])])

    among = encoder.encode([shared(PROMPTS[2]), solo(PROMPTS[0]), solo(PROMPTS[3])])[1]

    assert np.array_equal(among.values, alone.values)
    assert among.solo


def test_encode_shares_one_forward_and_gives_solo_items_one_each(
    encoder: TextEncoder, registry: CollectorRegistry
) -> None:
    embeddings = encoder.encode([shared("a"), solo("b"), shared("c"), solo("d")])

    assert [embedding.solo for embedding in embeddings] == [False, True, False, True]
    assert registry.get_sample_value("wan_prompt_encode_batch_size_count") == 3
    assert registry.get_sample_value("wan_prompt_encode_batch_size_sum") == 4


def test_encode_encodes_a_text_once_when_a_batch_has_it_twice(
    encoder: TextEncoder, registry: CollectorRegistry
) -> None:
    embeddings = encoder.encode([shared("a cat"), shared("a dog"), shared("a cat")])

    assert embeddings[0] is embeddings[2]
    assert not np.array_equal(embeddings[0].values, embeddings[1].values)
    assert registry.get_sample_value("wan_prompt_encode_batch_size_sum") == 2


def test_encode_keeps_every_bit_of_bfloat16(tiny_folder: Any, make_encoder: MakeEncoder) -> None:
    parts = load_text_parts(tiny_folder, torch.device("cpu"), "bfloat16")
    ids = parts.tokenizer("a red circle", return_tensors="pt")
    with torch.inference_mode():
        expected = parts.text_encoder(ids.input_ids, ids.attention_mask).last_hidden_state

    [embedding] = make_encoder(parts).encode([solo("a red circle")])

    assert (embedding.dtype, embedding.values.dtype) == ("bfloat16", np.int16)
    assert torch.equal(pad_embedding(embedding, expected.shape[1]).view(torch.int16), expected.view(torch.int16))


def test_encode_owns_its_rows_when_the_batch_had_a_longer_text(encoder: TextEncoder) -> None:
    """Rows that were a view kept the whole padded batch alive, so the cache held more than it counted."""
    short, _ = encoder.encode([shared("a cat"), shared("a cat " * 60)])

    assert short.values.flags.owndata


def test_encode_does_nothing_when_there_is_nothing(encoder: TextEncoder) -> None:
    assert encoder.encode([]) == []


# The limit


def test_count_tokens_counts_the_end_token_of_the_cleaned_text(encoder: TextEncoder) -> None:
    assert encoder.tokens.count("prompt", "  a red \n circle ") == 3 + 1
    assert encoder.tokens.count("prompt", "a &amp;amp; b") == encoder.tokens.count("prompt", "a & b")
    assert encoder.tokens.count("prompt", "") == 1


def test_count_tokens_takes_a_text_of_exactly_the_limit(encoder: TextEncoder, stock_pipeline: WanPipeline) -> None:
    text = "cat " * (MAX_LENGTH - 1)

    assert encoder.tokens.count("prompt", text) == MAX_LENGTH
    assert_equals_stock(encoder.encode([solo(text)])[0], stock_embedding(stock_pipeline, text))


def test_count_tokens_refuses_one_more_with_both_numbers(encoder: TextEncoder) -> None:
    with pytest.raises(PromptTooLong) as refusal:
        encoder.tokens.count("negative_prompt", "cat " * MAX_LENGTH)

    assert str(MAX_LENGTH + 1) in refusal.value.detail
    assert str(MAX_LENGTH) in refusal.value.detail.replace(str(MAX_LENGTH + 1), "")
    assert refusal.value.errors[0].field == "negative_prompt"


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=MAX_LENGTH))
def test_a_text_that_surely_fits_is_never_too_long(text_encoder: TextEncoder, text: str) -> None:
    cleaned = clean_prompt(text)
    assume(cleaned.isascii())

    assert surely_fits(cleaned, len(cleaned) + 2)
    assert text_encoder.tokens.count("prompt", text) <= len(cleaned) + 2


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_count_tokens_counts_what_the_stock_pipeline_would_take(
    stock_pipeline: WanPipeline, text_encoder: TextEncoder, text: str
) -> None:
    for prompt in (text, html.escape(text)):
        stock = stock_embedding(stock_pipeline, prompt)

        assert text_encoder.tokens.count("prompt", prompt) == int((stock != 0).any(dim=2).sum())


# The cache


def hits_and_misses(registry: CollectorRegistry) -> tuple[float | None, float | None]:
    return (
        registry.get_sample_value("wan_embedding_cache_hits_total"),
        registry.get_sample_value("wan_embedding_cache_misses_total"),
    )


def test_encode_answers_from_the_cache_and_counts_it(encoder: TextEncoder, registry: CollectorRegistry) -> None:
    first = encoder.encode([shared("a cat"), shared("a dog")])
    assert hits_and_misses(registry) == (0, 2)

    second = encoder.encode([shared("a dog"), shared("a bird")])

    assert second[0] is first[1]
    assert hits_and_misses(registry) == (1, 3)
    assert registry.get_sample_value("wan_prompt_encode_batch_size_sum") == 3


def test_encode_gives_a_solo_reader_nothing_that_was_encoded_in_company(
    encoder: TextEncoder, registry: CollectorRegistry
) -> None:
    in_company, _ = encoder.encode([shared("a cat"), shared("a dog running very fast")])
    assert not in_company.solo

    [alone] = encoder.encode([solo("a cat")])

    assert alone.solo
    assert hits_and_misses(registry) == (0, 3)
    assert encoder.encode([solo("a cat")])[0] is alone
    assert encoder.encode([shared("a cat")])[0] is alone  # anyone may have it


def test_encode_keeps_the_solo_encoding_when_a_batch_wants_both(encoder: TextEncoder) -> None:
    alone = encoder.encode([solo("a cat"), shared("a cat"), shared("a dog")])[0]

    assert encoder.encode([solo("a cat")])[0] is alone


def embedding(num_bytes: int, solo: bool = True) -> TextEmbedding:
    return TextEmbedding(np.zeros((1, num_bytes // 4), np.float32), "float32", solo)


def test_embedding_cache_drops_the_least_recently_used_first() -> None:
    cache = EmbeddingCache(max_bytes=300)
    for text in ("a", "b", "c"):
        cache.put(text, embedding(100))
    assert cache.get("a", solo=True) is not None  # now b is the oldest

    cache.put("d", embedding(100))

    kept = {text for text in "abcd" if cache.get(text, solo=True) is not None}
    assert kept == {"a", "c", "d"}
    assert cache.nbytes == 300


def test_embedding_cache_keeps_nothing_that_alone_is_over_the_bound() -> None:
    cache = EmbeddingCache(max_bytes=300)
    cache.put("small", embedding(100))

    cache.put("large", embedding(304))

    assert cache.get("large", solo=True) is None
    assert cache.get("small", solo=True) is not None


def test_embedding_cache_counts_a_replaced_text_once() -> None:
    cache = EmbeddingCache(max_bytes=300)
    cache.put("a", embedding(100, solo=False))

    cache.put("a", embedding(200))

    assert cache.nbytes == 200


@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, 40), st.booleans()), max_size=40))
def test_embedding_cache_never_holds_more_than_its_bound(puts: list[tuple[str, int, bool]]) -> None:
    cache = EmbeddingCache(max_bytes=100)
    for text, rows, is_solo in puts:
        cache.put(text, embedding(4 * rows, is_solo))

        assert cache.nbytes <= 100
    kept = [cache.get(text, solo=False) for text in "abcdefg"]
    assert cache.nbytes == sum(found.nbytes for found in kept if found is not None)


def test_encode_shows_how_much_the_cache_holds(make_encoder: MakeEncoder, registry: CollectorRegistry) -> None:
    one = 4 * 32 * 4  # 3 words and the end token, 32 dimensions, float32
    encoder = make_encoder(max_cache_bytes=2 * one)

    encoder.encode([shared(f"a {color} circle") for color in ("red", "green", "blue")])

    assert registry.get_sample_value("wan_embedding_cache_bytes") == 2 * one
