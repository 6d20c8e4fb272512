"""What reports are made of: parts, for JSON, and tables of text, for the terminal and for Markdown files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table as RichTable


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column is left-aligned, and so are those in `prose`; numbers are on the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: frozenset[int] = frozenset()

    def markdown(self) -> str:
        rule = ["---" if self._is_prose(i) else "---:" for i in range(len(self.header))]
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, rule, *self.rows)]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if self._is_prose(i) else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def _is_prose(self, column: int) -> bool:
        return column == 0 or column in self.prose


def write_report_files(report: Part, name: str, markdown: str, folder: Path) -> None:
    """Write `name`.json and `name`.md. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(report.model_dump_json(indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown)


def print_tables(tables: Iterable[Table], console: Console) -> None:
    """On a terminal."""
    for table in tables:
        console.print(table.rich())
        console.print()
