"""Reads a file of prompts for `wan-serve batch`; every mistake is named by its line before anything is sent."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from schemas.batches import MAX_BATCH_REQUESTS
from schemas.errors import FieldError
from schemas.requests import GenerateRequest

SUFFIXES: Final = (".txt", ".jsonl", ".ndjson")
_MISTAKES_TOLD: Final = 5


class PromptFileError(Exception):
    """The file can't be a batch; the message says why, and in which lines."""


@dataclass(frozen=True)
class PromptFile:
    """The requests of a file, the line of each (from 1), and the SHA-256 of the file's bytes."""

    path: Path
    requests: tuple[GenerateRequest, ...]
    lines: tuple[int, ...]
    sha256: str

    def located(self, error: FieldError) -> str:
        """A service's mistake, with the line instead of the index."""
        index, _, field = error.field.removeprefix("requests.").partition(".")
        if not (error.field.startswith("requests.") and index.isdecimal() and int(index) < len(self.lines)):
            return f"{error.field}: {error.message}"
        return f"line {self.lines[int(index)]}: {field + ': ' if field else ''}{error.message}"

    def refusal(self, mistakes: list[str]) -> str:
        """One line about the file's mistakes."""
        more = len(mistakes) - _MISTAKES_TOLD
        return f"{self.path}: {'; '.join(mistakes[:_MISTAKES_TOLD])}{f' (and {more} more)' if more > 0 else ''}"


def read_prompt_file(path: Path) -> PromptFile:
    """One request per line that is not empty: a prompt in a .txt file, a JSON object in a .jsonl or .ndjson file.

    Raises PromptFileError.
    """
    if path.suffix not in SUFFIXES:
        raise PromptFileError(f"{path}: a file of prompts ends with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise PromptFileError(f"{path} can't be read: {error.strerror}") from error
    requests, lines, mistakes = list[GenerateRequest](), list[int](), list[str]()
    for number, line in _filled_lines(text):
        try:
            requests.append(
                GenerateRequest(prompt=line) if path.suffix == ".txt" else GenerateRequest.model_validate_json(line)
            )
            lines.append(number)
        except ValidationError as error:
            mistakes.append(f"line {number}: {_in_words(error)}")
    found = PromptFile(path, tuple(requests), tuple(lines), hashlib.sha256(content).hexdigest())
    if mistakes:
        raise PromptFileError(found.refusal(mistakes))
    if not 0 < len(requests) <= MAX_BATCH_REQUESTS:
        raise PromptFileError(f"{path} has {len(requests)} prompts; a batch has 1 to {MAX_BATCH_REQUESTS}")
    return found


def _filled_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines as editors count them; `str.splitlines` would also cut at what a prompt may hold (U+2028)."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _in_words(error: ValidationError) -> str:
    mistake = error.errors()[0]
    name = ".".join(str(part) for part in mistake["loc"])
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "json_invalid":
        return "is not a JSON object: " + message.removeprefix("Invalid JSON: ")
    if mistake["type"] == "extra_forbidden":
        return f"{name} is not a field of a request"
    return f"{name}: {message}" if name else message
