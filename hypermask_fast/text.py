"""Tables as text, the same on a terminal as in a file."""

import io
from collections.abc import Iterable, Sequence

from .extras import needed_for

_WIDEST = 100_000  # characters: a terminal may wrap a line, but nothing is cut


def text_table(rows: Iterable[Sequence[str]], align: str, gap: int = 1) -> str:
    """Rows of cells in aligned columns, one line per row.

    Args:
        rows: cells of each row, from left to right.
        align: "<" or ">" for each column.
        gap: spaces between columns.

    Raises:
        InputError: the package rich is missing.
    """
    with needed_for("a text table"):
        from rich.console import Console
        from rich.table import Table
    table = Table.grid(padding=(0, gap, 0, 0))
    for side in align:
        table.add_column(justify="left" if side == "<" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=_WIDEST, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
