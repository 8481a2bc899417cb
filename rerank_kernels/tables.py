"""Tables that fit their screen: numbers keep every digit, text folds or ends in an ellipsis, no line is wider than the screen.

Where a screen cannot hold all the numbers side by side, a row becomes a block of lines. Its texts come first, then each number
behind its name, as many to a line as there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from rerank_kernels.printable import printable

LEAST = 10  # columns of a text beside numbers; a screen that leaves it fewer stacks the rows
WORD = 20  # letters of a word that is not broken while there is room


@dataclass(frozen=True)
class Column:
    """number: never cut, folded or shrunk, and to the right. ellipsis: a text of one line that ends in … where it has no room;
    other texts fold. named: a text that in a block stands behind its name, as the numbers do."""

    name: str
    number: bool = False
    ellipsis: bool = False
    named: bool = False


@dataclass
class Table:
    """Rows of cells under columns; rich's console.print prints it."""

    columns: Sequence[Column]
    title: str = ""
    rows: list[tuple[Sequence[str], str]] = field(default_factory=list)

    def add_row(self, *cells: str, style: str = "") -> None:
        self.rows.append((tuple(map(printable, cells)), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        screen = options.max_width
        names = [column.name for column in self.columns]
        folded = [c.name.replace(" ", "\n") if c.number else c.name for c in self.columns]
        for heads, squeezed in ((names, False), (folded, True)):
            if (widths := self._widths(heads, screen, squeezed)) is not None:
                yield self._side_by_side(heads, widths)
                return
        yield from self._stacked(screen)

    def _widths(self, heads: Sequence[str], screen: int, squeezed: bool) -> list[int] | None:
        """What each column gets: what its cells want; if squeezed, texts have what is left. None: there is no room."""
        columns = [(head, *(row[i] for row, _ in self.rows)) for i, head in enumerate(heads)]
        widths = [max(1, *map(_width, cells)) for cells in columns]
        words = [max((_width(word) for cell in cells for word in cell.split()), default=1) for cells in columns]
        texts = sorted((i for i, c in enumerate(self.columns) if not c.number), key=widths.__getitem__)
        # a border and two spaces each, and the last border
        room = screen - 3 * len(widths) - 1 - sum(width for i, width in enumerate(widths) if i not in texts)
        for word in (WORD, LEAST):  # whole words, if there is room for them
            least = {i: min(widths[i], max(LEAST, min(word, words[i]))) for i in texts}
            least |= {i: min(widths[i], LEAST) for i in texts if self.columns[i].ellipsis}
            least |= {} if squeezed else {i: widths[i] for i in texts if not self.columns[i].ellipsis}
            if sum(least.values()) <= room:
                break
        else:
            return None
        for place, i in enumerate(texts):  # what the narrow ones do not take is the others'
            left = texts[place + 1 :]
            fair = max(least[i], room // (len(left) + 1))
            widths[i] = min(widths[i], fair, room - sum(least[other] for other in left))
            room -= widths[i]
        return widths

    def _side_by_side(self, heads: Sequence[str], widths: Sequence[int]) -> RichTable:
        table = RichTable(title=Text(self.title) if self.title else None, title_justify="left")
        for column, head, width in zip(self.columns, heads, widths, strict=True):
            table.add_column(
                Text(head),
                width=width,
                justify="right" if column.number else "left",
                no_wrap=column.number or column.ellipsis,
                overflow="ellipsis" if column.ellipsis else "fold",
            )
        for cells, style in self.rows:
            table.add_row(*map(Text, cells), style=style)
        return table

    def _stacked(self, screen: int) -> Iterator[Text]:
        if self.title:
            yield Text(self.title, overflow="fold")
        for cells, style in self.rows:
            named = []
            for column, cell in zip(self.columns, cells, strict=True):
                if cell and (column.number or column.named):
                    named.append(f"{column.name} {cell}")
                elif cell:
                    yield Text(cell, style=style, overflow="ellipsis" if column.ellipsis else "fold", no_wrap=column.ellipsis)
            yield from (Text(line, style=style, overflow="fold") for line in _packed(named, screen))


def _width(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _packed(parts: Sequence[str], screen: int) -> list[str]:
    """The parts, in order, as many to a line as fit, two spaces apart, behind two spaces."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + 2 + cell_len(part) <= screen:
            lines[-1] += "  " + part
        else:
            lines.append("  " + part if cell_len(part) + 2 <= screen else part)
    return lines
