"""Tables of text, for the terminal and in Markdown."""

from collections.abc import Sequence

from hybridflow.errors import InputError

__all__ = ["markdown_table", "text_table"]

Rows = Sequence[Sequence[str]]


def text_table(header: Sequence[str], rows: Rows) -> str:
    """A table for the terminal: the first column to the left, the others to the right.

    Example:
        >>> print(text_table(["head", "accuracy, %"], [["flow", "95.8"], ["discriminator", "97.2"]]))
        head           accuracy, %
        -------------  -----------
        flow                  95.8
        discriminator         97.2
    """
    _check(header, rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """The same in Markdown.

    Example:
        >>> print(markdown_table(["head", "accuracy, %"], [["flow", "95.8"]]))
        | head | accuracy, % |
        |---|---:|
        | flow | 95.8 |
    """
    _check(header, rows)
    ruler = "|".join(["---", *["---:"] * (len(header) - 1)])
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|{ruler}|", *lines[1:]])


def _check(header: Sequence[str], rows: Rows) -> None:
    for row in rows:
        if len(row) != len(header):
            raise InputError(f"rows: got one of {len(row)} cells, want {len(header)}")
