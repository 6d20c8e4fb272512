"""How well a running service's clips show what their prompts say: asked over HTTP, measured on the MP4s.

Knows the tiny Wan's world and the client, and no model: whatever answers `POST /batches` can be measured.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.batches import BatchResult
from schemas.requests import GenerateRequest
from serve_graph.client import WanClient
from serve_graph.tiny_wan.captions import held_out_caption, training_caption
from serve_graph.tiny_wan.measure import NONE, Reading, measure
from serve_graph.tiny_wan.world import COLOURS, HELD_OUT, MOTIONS, SHAPES, SIZES, SPEEDS, Scene, held_out_scene

ATTRIBUTES: Final = ("shape", "colour", "background", "motion")
VALUES: Final = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "motion": tuple(MOTIONS),
}
FIXED_SEED: Final = 2_560
POLL_S: Final = 0.5


class PromptsRefused(Exception):
    """A file of prompts can't be read; the message says why."""


@dataclass(frozen=True)
class Question:
    """A prompt, what its clip must show, and where the words come from: `seen` or `unseen` templates, or `file`."""

    prompt: str
    scene: Scene
    words: str


class Line(BaseModel):
    """One line of a file of prompts."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    shape: str
    colour: str
    background: str
    motion: str


@dataclass(frozen=True)
class Answer:
    """What was seen in a question's clip; None where there is no clip."""

    question: Question
    reading: Reading | None

    def is_right(self, attribute: str) -> bool:
        """Whether the clip shows what was asked for."""
        return self.seen(attribute) == str(getattr(self.question.scene, attribute))

    def seen(self, attribute: str) -> str:
        """The attribute's value in the clip."""
        return NONE if self.reading is None else str(getattr(self.reading, attribute))


class Rates(BaseModel):
    """Shares of clips that are right: by attribute, and in all four."""

    count: int
    shape: float
    colour: float
    background: float
    motion: float
    all: float


class Adherence(BaseModel):
    """The outcome. confusion: attribute -> asked for -> seen -> clips."""

    model: str
    permuted: bool = Field(description="Compared with another prompt's scene: what chance gives.")
    seed: int
    total: Rates
    by_words: dict[str, Rates]
    confusion: dict[str, dict[str, dict[str, int]]]
    clips_missing: int
    seconds: float


def held_out_questions(count: int) -> list[Question]:
    """The fixed set: combinations that training never saw, each once before any comes twice; every second in a
    template that training never saw."""
    rng = np.random.default_rng(FIXED_SEED)
    combinations = sorted(HELD_OUT)
    order = [combinations[i] for _ in range(count // len(combinations) + 1) for i in rng.permutation(len(combinations))]
    scenes = [
        Scene(shape, colour, background, motion, str(rng.choice(list(SIZES))), _speed(motion, rng))
        for shape, colour, background, motion in order[:count]
    ]
    return [_question(scene, i, rng) for i, scene in enumerate(scenes)]


def fresh_questions(count: int, seed: int) -> list[Question]:
    """Another draw of held-out scenes and words for every seed."""
    rng = np.random.default_rng((FIXED_SEED, seed))
    return [_question(held_out_scene(rng), i, rng) for i in range(count)]


def questions_of(path: Path) -> list[Question]:
    """A file of JSON Lines: prompt, shape, colour, background, motion. Raises PromptsRefused, OSError."""
    questions = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            raise PromptsRefused(f"{path}:{number}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
        for attribute, values in VALUES.items():
            if getattr(line, attribute) not in values:
                raise PromptsRefused(f"{path}:{number}: {attribute} must be one of {', '.join(values)}")
        questions.append(Question(line.prompt, Scene(line.shape, line.colour, line.background, line.motion), "file"))
    if not questions:
        raise PromptsRefused(f"{path}: no prompts")
    return questions


def _question(scene: Scene, index: int, rng: np.random.Generator) -> Question:
    """Every second one in unseen words."""
    if index % 2:
        return Question(held_out_caption(scene, rng), scene, "unseen")
    return Question(training_caption(scene, rng, complete=True), scene, "seen")


def _speed(motion: str, rng: np.random.Generator) -> str:
    return "medium" if motion == "still" else str(rng.choice(list(SPEEDS)))


def ask(
    client: WanClient, questions: Sequence[Question], seed: int, folder: Path, on_change: Callable[[int], None]
) -> list[Answer]:
    """One batch of all prompts with the service's defaults and seeds from `seed` on; the clips stay in `folder`.

    on_change: told how many clips have been measured. Raises ClientError, OSError.
    """
    requests = [GenerateRequest(prompt=question.prompt, seed=seed + i) for i, question in enumerate(questions)]
    batch = client.submit_batch(requests)
    answers: dict[int, Answer] = {}
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        ended = client.batch(batch.batch_id).state == "ended"
        for result in client.batch_results(batch.batch_id):
            if result.state.is_terminal and result.index not in answers:
                answers[result.index] = Answer(questions[result.index], _reading(client, result, folder))
                on_change(len(answers))
        if ended:
            return [answers.get(i, Answer(question, None)) for i, question in enumerate(questions)]
        time.sleep(POLL_S)  # between looks over HTTP


def _reading(client: WanClient, result: BatchResult, folder: Path) -> Reading | None:
    if result.clip is None:
        return None
    path = client.download(result.clip, folder / f"{result.index:04}.mp4")
    import av  # not before it is needed: every command of `wan-serve` imports this module

    from serve_graph.mp4_frames import read_frames

    try:
        return measure(read_frames(path))
    except av.FFmpegError:
        return None


def permute(answers: Sequence[Answer]) -> list[Answer]:
    """The same clips held against other prompts' scenes: a fixed shuffle. What it gives is chance."""
    order = np.random.default_rng(FIXED_SEED).permutation(len(answers))
    return [Answer(answers[j].question, answer.reading) for answer, j in zip(answers, order, strict=True)]


def report(answers: Sequence[Answer], *, model: str, permuted: bool, seed: int, seconds: float) -> Adherence:
    """Count. A clip that is missing is wrong in everything."""
    words = dict.fromkeys(answer.question.words for answer in answers)
    return Adherence(
        model=model,
        permuted=permuted,
        seed=seed,
        total=_rates(answers),
        by_words={name: _rates([a for a in answers if a.question.words == name]) for name in words},
        confusion={attribute: _confusion(answers, attribute) for attribute in ATTRIBUTES},
        clips_missing=sum(answer.reading is None for answer in answers),
        seconds=round(seconds, 1),
    )


def _rates(answers: Sequence[Answer]) -> Rates:
    right = {name: [answer.is_right(name) for answer in answers] for name in ATTRIBUTES}
    return Rates(
        count=len(answers),
        **{name: float(np.mean(values)) for name, values in right.items()},
        all=float(np.mean(np.all(list(right.values()), axis=0))),
    )


def _confusion(answers: Sequence[Answer], attribute: str) -> dict[str, dict[str, int]]:
    counts = Counter((str(getattr(a.question.scene, attribute)), a.seen(attribute)) for a in answers)
    return {
        asked: {seen: counts[asked, seen] for seen in (*VALUES[attribute], NONE) if counts[asked, seen]}
        for asked in VALUES[attribute]
        if any(key[0] == asked for key in counts)
    }


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """One line of JSON per clip: the prompt, what it asks for, what was seen."""
    lines = [
        json.dumps(
            {
                "prompt": answer.question.prompt,
                "words": answer.question.words,
                "asked": {name: getattr(answer.question.scene, name) for name in ATTRIBUTES},
                "seen": {name: answer.seen(name) for name in ATTRIBUTES},
            }
        )
        for answer in answers
    ]
    path.write_text("\n".join(lines) + "\n")
