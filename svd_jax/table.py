"""Tables of text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of cells as lines with columns of one width.

    Args:
      rows: all of the same length.
      left: how many columns, from the first, are flush left; the others are flush right.

    Returns:
      A line for every row.

    Example:
      >>> from svd_jax import table
      >>> print('\\n'.join(table.aligned([('layer', 'units'), ('Dense_0', '5')])))
      layer    units
      Dense_0      5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
