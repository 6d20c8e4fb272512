"""`wan-serve eval`: how often a running service's clips show what their prompts say, as tables and JSON."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from serve_graph.adherence import (
    ATTRIBUTES,
    VALUES,
    Adherence,
    PromptsRefused,
    Question,
    ask,
    fresh_questions,
    held_out_questions,
    permute,
    questions_of,
    report,
    write_answers,
)
from serve_graph.cli_client import (
    PATIENCE_S,
    WRONG_USAGE,
    AsJson,
    Patience,
    Url,
    UrlDefault,
    add_row,
    client_of,
    fail,
    print_json,
    stderr,
    stdout,
    table,
)
from serve_graph.tiny_wan.measure import NONE

HELD_OUT_PROMPTS = 256


def evaluate(
    prompts: Annotated[
        Path | None,
        typer.Option(help="Your own, as JSON Lines: prompt, shape, colour, background, motion.", metavar="FILE"),
    ] = None,
    fresh: Annotated[int | None, typer.Option(min=0, help="Draw a new set with this number.", metavar="SEED")] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many prompts; not with --prompts.")] = (
        HELD_OUT_PROMPTS
    ),
    seed: Annotated[int, typer.Option(min=0, help="The first clip's; the next one's is one more.")] = 0,
    permuted: Annotated[bool, typer.Option("--permuted", help="Compare with other prompts: chance.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the clips and answers.jsonl here.", metavar="FOLDER")
    ] = None,
    patience: Patience = PATIENCE_S,
    url: Url = UrlDefault,
    as_json: AsJson = False,
) -> None:
    """Measure adherence on held-out prompts of the tiny Wan's world: one shape, two colours, one motion."""
    try:
        questions = _questions(prompts, fresh, count)
    except PromptsRefused as error:
        fail(str(error), WRONG_USAGE, as_json)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", WRONG_USAGE, as_json)
    with client_of(url, as_json, patience) as client, _folder(output) as folder:
        model = client.models()[0].name
        began = time.monotonic()
        console = stderr()
        with console.status(f"asking {len(questions)} prompts …") as status:
            answers = ask(client, questions, seed, folder, lambda n: status.update(f"{n} of {len(questions)} clips"))
        seconds = time.monotonic() - began
        write_answers(answers, folder / "answers.jsonl")
    found = report(
        permute(answers) if permuted else answers, model=model, permuted=permuted, seed=seed, seconds=seconds
    )
    if as_json:
        print_json(found)
    else:
        _show(found)


def _questions(prompts: Path | None, fresh: int | None, count: int) -> list[Question]:
    if prompts is not None:
        return questions_of(prompts)
    return held_out_questions(count) if fresh is None else fresh_questions(count, fresh)


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="wan-eval-") as folder:
        yield Path(folder)


def _show(found: Adherence) -> None:
    console = stdout()
    rates = table("prompts", "count", *ATTRIBUTES, "all four")
    for name, row in {**found.by_words, "all": found.total}.items():
        shares = [getattr(row, attribute) for attribute in (*ATTRIBUTES, "all")]
        add_row(rates, name, str(row.count), *(f"{share:.1%}" for share in shares))
    console.print(rates)
    for attribute in ATTRIBUTES:
        confusion = found.confusion[attribute]
        columns = [v for v in (*VALUES[attribute], NONE) if any(v in seen for seen in confusion.values())]
        counts = table(f"\n{attribute}: asked, seen →", *(f"\n{column}" for column in columns))
        for asked, seen in confusion.items():
            add_row(counts, asked, *(str(seen.get(column, "·")) for column in columns))
        console.print(counts)
    notes = [f"model {found.model}", f"{found.seconds:.0f} s", f"seed {found.seed}"]
    notes += ["held against other prompts (chance)"] if found.permuted else []
    notes += [f"{found.clips_missing} clips missing"] if found.clips_missing else []
    console.print("\n" + ", ".join(notes))
