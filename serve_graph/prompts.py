"""What Wan does to a prompt's text before the tokeniser sees it, and the hash by which logs name a prompt.

Pure text: knows nothing of tokenisers, models or logs. Never imports diffusers, which costs seconds.
"""

import hashlib
import hmac
import html
import re
from typing import Final

import ftfy

PROMPT_HASH_CHARS: Final = 16
"""64 bits: two prompts of one service share a hash by chance once in billions, and a log line stays short."""

_WHITESPACE = re.compile(r"\s+")


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities twice, collapse white space: as `WanPipeline` does.

    It is not idempotent (`&amp;amp;amp;lt;` loses a layer each time), so clean a prompt once.
    Source: diffusers pipeline_wan.py, `prompt_clean`.
    """
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITESPACE.sub(" ", unescaped).strip()


def surely_fits(cleaned: str, max_tokens: int) -> bool:
    """Whether a cleaned text is within a limit of tokens without being tokenised.

    A SentencePiece token stands for at least one character, besides the mark of the text's beginning and the end
    token. Only for ASCII, since normalisation makes one character of another script many. False says nothing.
    """
    return cleaned.isascii() and len(cleaned) + 2 <= max_tokens


def prompt_hash(secret: bytes, prompt: str) -> str:
    """A keyed hash of the cleaned prompt: 16 hex digits of HMAC-SHA256.

    Without the secret nobody can confirm a guessed prompt against the logs.

    Args:
        secret: The service's own; at least one byte.
        prompt: As the client sent it; it is cleaned here.

    Raises:
        ValueError: The secret is empty, which would make the hash a public one.
    """
    if not secret:
        raise ValueError("the secret of the prompt hash is empty")
    message = clean_prompt(prompt).encode("utf-8", errors="surrogatepass")
    return hmac.new(secret, message, hashlib.sha256).hexdigest()[:PROMPT_HASH_CHARS]
