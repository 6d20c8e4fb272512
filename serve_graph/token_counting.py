"""Counts a text's tokens. Knows no torch: a process without a model checks prompts, too."""

from typing import TYPE_CHECKING

from schemas.errors import PromptTooLong
from schemas.requests import GenerationParameters
from serve_graph.prompts import clean_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenCounter:
    """limit: tokens of one text, the end token included. Safe to call from several threads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit

    def tokenize(self, text: str) -> list[int]:
        """The cleaned text's tokens."""
        ids: list[int] = self._tokenizer(clean_prompt(text), add_special_tokens=True).input_ids
        return ids

    def check(self, parameters: GenerationParameters) -> int:
        """The prompt's tokens. Raises PromptTooLong, for either text; nothing is ever cut."""
        if parameters.does_guidance:
            self.count("negative_prompt", parameters.negative_prompt)
        return self.count("prompt", parameters.prompt)

    def count(self, field: str, text: str) -> int:
        """Tokens of one text. Raises PromptTooLong."""
        num_tokens = len(self.tokenize(text))
        if num_tokens > self._limit:
            raise PromptTooLong(field, num_tokens, self._limit)
        return num_tokens
