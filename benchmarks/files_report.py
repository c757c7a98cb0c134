"""How the benchmark of files shows what it measured: tables, a page, a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich import box
from rich.table import Table

from benchmarks import formats
from experiments import published
from experiments.errors import UsageError
from experiments.pictures import BLUE, GREEN, ORANGE, PINK, RED, SKY

Row = dict[str, Any]

TITLES = {'lenet300': 'LeNet-300-100', 'lenet5': 'LeNet-5-Caffe'}
MARK = '<!-- tables of benchmarks.files -->'


class Shown(NamedTuple):
    """A table, for a terminal and for a page."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def table(self) -> Table:
        table = Table(title=self.title, title_justify='left', box=box.SIMPLE, pad_edge=False)
        for i, heading in enumerate(self.headings):
            lines = heading.replace(' ', '\n')
            table.add_column(lines, justify='right' if i else 'left', no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ['---', *('---:' for _ in self.headings[1:])]
        lines = [f'| {" | ".join(cells)} |' for cells in (self.headings, rule, *self.rows)]
        return '\n'.join([f'**{self.title}**', '', *lines, ''])


def curve(title: str, on: str, rows: list[Row]) -> Shown:
    """Files of a network, from exact to coarse, and its errors on what."""
    return Shown(
        title,
        ('', 'bytes', 'bits/kept', 'nonzero', f'{on} error', 'loss', 'training loss'),
        [
            (
                row['file'], f'{row["bytes"]:,}', f'{row["bits_per_kept_weight"]:.1f}',
                f'{row["nonzero"]:,}', f'{row["test_error"]:.2f} %', f'{row["test_loss"]:.4f}',
                f'{row["train_loss"]:.4f}',
            )
            for row in rows
        ],
    )  # fmt: skip


def by_format(title: str, others: dict[str, int], rows: list[Row]) -> Shown:
    """Bytes of the same network by other formats and by ours."""
    sizes = others | {f'.svd, {row["file"]}': row['bytes'] for row in rows}
    shares = {name: size / others[formats.DENSE] for name, size in sizes.items()}
    return Shown(
        title,
        ('', 'bytes', 'of dense'),
        [(name, f'{size:,}', f'{shares[name]:.2%}') for name, size in sizes.items()],
    )


def shipped(rows: list[Row]) -> Shown:
    """The files of the package."""
    return Shown(
        'What ships',
        ('', 'tolerance', 'bytes', 'nonzero', 'test error'),
        [
            (
                row['experiment'], f'{row["tolerance"]:g}', f'{row["bytes"]:,}',
                f'{row["nonzero"]:,}', f'{row["test_error"]:.2f} %',
            )
            for row in rows
        ],
    )  # fmt: skip


def large(found: dict[str, Any]) -> Shown:
    """Time and memory of a large file."""
    peak = found['load_peak_bytes'] / found['dense_bytes']
    rows = [('bytes, of the dense ones', f'{found["bytes"] / found["dense_bytes"]:.2%}', '')]
    for name in ('save', 'load'):
        seconds, cpu = found[f'{name}_seconds'], found[f'{name}_cpu_seconds']
        rows.append((f'{name}, s', f'{seconds:.1f}', f'{cpu:.1f}'))
    rows.append(('peak memory of the load, of the dense tree', f'{peak:.2f}', ''))
    zeros = 1 - found['nonzero'] / found['weights']
    title = f'{found["weights"]:,} parameters, {zeros:.1%} zeros'
    return Shown(title, ('', 'measured', 'CPU s'), rows)


def replace_tables(page: Path, tables: list[Shown]) -> None:
    """Puts tables between the two marks of a page."""
    parts = page.read_text().split(MARK)
    if len(parts) != 3:
        raise UsageError(f'{page} needs two lines {MARK!r}, around the place of the tables')
    parts[1] = '\n\n' + '\n'.join(table.markdown() for table in tables) + '\n'
    page.write_text(MARK.join(parts))


def picture(experiment: str, curves: dict[str, list[Row]], path: Path) -> None:
    """Draws test error against bytes, with what others have published."""
    figure = Figure(figsize=(8, 4.2), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, rows), style in zip(curves.items(), ('-', '--', ':', '-.'), strict=False):
        axes.plot(
            [row['bytes'] for row in rows], [row['test_error'] for row in rows], style,
            color=BLUE, marker='o', markersize=4, linewidth=1.5, label=f'svd_jax, {name}',
        )  # fmt: skip
    methods = list(dict.fromkeys(point.method for point in published.FILES[experiment]))
    looks = zip('sD^vP', (ORANGE, GREEN, RED, PINK, SKY), strict=True)
    for method, (marker, color) in zip(methods, looks, strict=False):
        points = [point for point in published.FILES[experiment] if point.method == method]
        axes.scatter(
            [point.nbytes for point in points], [point.error for point in points],
            marker=marker, color=color, s=45, label=method, zorder=3,
        )  # fmt: skip
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f'{TITLES[experiment]}: error against bytes', loc='left', fontweight='bold')
    axes.set_xlabel('bytes of the file')
    axes.set_ylabel('test error, %')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='0.9', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8.5, edgecolor='none', labelcolor='black', framealpha=0.85)
    figure.savefig(path)
