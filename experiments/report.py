"""What a run shows and writes while it trains: a live table, metrics.jsonl, TensorBoard events."""

import collections
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from experiments.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, also when killed."""
    _write(path, json.dumps(value, indent=2) + '\n')


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix('.tmp')
    try:
        temporary.write_text(text)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, until this one leaves or dies.

    Raises:
      UsageError: another process is in it.
    """
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f'another process is writing to {folder}: wait for it, or choose another --out'
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(opened)


def claim_of(out: Path, resume: bool) -> dict[str, Any] | None:
    """What the ``run.json`` of a folder says of its run; None if there is none.

    Raises:
      UsageError: there is one, and it is not to go on; or it is damaged.
    """
    path = out / 'run.json'
    if not path.exists():
        return None
    if not resume:
        raise UsageError(
            f'{out} already holds a run: go on with it by --resume, or choose another --out'
        )
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UsageError(f'{path} is damaged: choose another --out') from error


@contextlib.contextmanager
def claimed(out: Path, experiment: str) -> Iterator[None]:
    """Makes the output folder of an experiment that has no checkpoints, and is alone in it.

    What an earlier run of the experiment wrote may be written again; anything else is safe.

    Raises:
      UsageError: the folder holds something else, or cannot be written to, now or later; another
        process is in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out):
            if any(out.iterdir()) and not _is_of(experiment, out / 'summary.json'):
                raise UsageError(f'{out} holds something else: choose another --out')
            yield
    except OSError as error:
        raise UsageError(f'cannot write to {out} ({error}): choose another --out') from error


def _is_of(experiment: str, summary: Path) -> bool:
    try:
        return json.loads(summary.read_bytes())['experiment'] == experiment
    except (OSError, ValueError, TypeError, KeyError):
        return False


def read_history(path: Path, last_epoch: int) -> list[Row]:
    """The rows of a metrics.jsonl up to an epoch; a line that a kill left unfinished is skipped."""
    rows = {}
    for line in path.read_text(errors='replace').splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if row['epoch'] <= last_epoch:
                rows[row['epoch']] = row
    return [rows[epoch] for epoch in sorted(rows)]


def mean_row(rows: list[Row]) -> Row:
    """What is shown of several networks: their mean, and of speed and skipped steps the sum."""
    found: Row = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, dict):
            found[name] = mean_row(values)
        elif name == 'epoch':
            found[name] = first
        elif None in values:  # no weight left in one of them
            found[name] = None
        elif name.endswith('_per_second') or name == 'skipped_steps':
            found[name] = sum(values)
        else:
            found[name] = float(np.mean(values))
    return found


class Measure(NamedTuple):
    """How good a network is, by a field of a row or a summary, and how that is shown."""

    field: str
    heading: str
    digits: int
    unit: str = ''

    def text(self, values: Row) -> str:
        """The value, with its standard deviation if there is one."""
        names = [name for name in (self.field, f'{self.field}_sd') if name in values]
        return ' +- '.join(f'{values[name]:.{self.digits}f}' for name in names) + self.unit


def measure(values: Row) -> Measure:
    """The measure that counts."""
    if 'bits_per_character' in values:
        return Measure('bits_per_character', 'bits per character', 3)
    return Measure('test_error', 'error', 2, ' %')


def quality(values: Row) -> str:
    """A summary's measure in words."""
    found = measure(values)
    return f'{found.heading} {found.text(values)}'


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Report:
    """The live table of a run, and its files; a context manager.

    On a terminal the last rows and progress bars; elsewhere a line per epoch.

    Args:
      out: the run's folder.
      title: shown above the table.
      history: the rows of the epochs before, when resuming.
      done: how many epochs that are.
      epochs, steps: epochs of the run, steps of an epoch.
      console: where to show it.
    """

    _SHOWN = 12

    def __init__(
        self, out: Path, title: str, history: list[Row], done: int, epochs: int, steps: int,
        console: Console,
    ) -> None:  # fmt: skip
        self.history, self._out, self._title = history, out, Text(title, style='bold')
        self._done, self._epochs, self._console = done, epochs, console
        self._progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn('{task.fields[note]}', justify='right'),
            console=console,
            expand=True,
        )
        self._epoch = self._progress.add_task('epochs', total=epochs, completed=done, note='')
        self._step = self._progress.add_task('steps', total=steps, note='compiling')
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)
        self._ends = collections.deque([time.perf_counter()], maxlen=20)  # of epochs

    def __enter__(self) -> Self:
        # What came after the checkpoint goes.
        path = self._out / 'metrics.jsonl'
        _write(path, ''.join(json.dumps(row) + '\n' for row in self.history))
        with contextlib.ExitStack() as opened:  # a full disk may come between any two lines
            self._metrics = opened.enter_context(path.open('a'))
            folder = self._out / 'tensorboard'
            folder.mkdir(exist_ok=True)
            # Not SummaryWriter: its thread dies of a full disk, and the next row waits for it.
            self._events = EventsWriter(str(folder / 'events'))
            opened.callback(self._events.close)
            # TensorBoard forgets this epoch and later ones.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(
                Event(wall_time=time.time(), step=self._done + 1, session_log=start)
            )
            if self._console.is_terminal:
                self._live.start()
                opened.callback(self._live.stop)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def advance(self, done: int) -> None:
        """Steps of the current epoch that are done."""
        self._progress.update(self._step, completed=done)

    def add(self, row: Row) -> None:
        """Reports an epoch."""
        self.history.append(row)
        self._done = row['epoch']
        self._metrics.write(json.dumps(row) + '\n')
        self._metrics.flush()
        self._add_event(row)
        self._ends.append(time.perf_counter())
        # The median: the first epoch includes the compilation.
        left = float(np.median(np.diff(self._ends))) * (self._epochs - self._done)
        speed = next(
            f'{value:,.0f} {name.removesuffix("_per_second")}/s'
            for name, value in row.items()
            if name.endswith('_per_second')
        )
        self._progress.update(self._epoch, completed=self._done, note=f'{_duration(left)} left')
        self._progress.update(self._step, completed=0, note=speed)
        if not self._console.is_terminal:
            cells = '  '.join(f'{name} {cell}' for name, cell in _cells(row).items())
            self._console.print(
                f'{cells}  {speed}  {_duration(left)} left', soft_wrap=True, highlight=False
            )

    def _add_event(self, row: Row) -> None:
        values = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != 'epoch'}
        values |= {f'sparsity/{k}': v for k, v in row['sparsity_per_layer'].items()}
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._events.write_event(Event(wall_time=time.time(), step=row['epoch'], summary=summary))
        self._events.flush()

    def _render(self) -> Group:
        if not self.history:
            return Group(self._title, self._progress)
        table = self._table(layers=True)
        unlimited = self._console.options.update(max_width=10_000)
        if Measurement.get(self._console, unlimited, table).maximum > self._console.width:
            table = self._table(layers=False)
        return Group(self._title, table, self._progress)

    def _table(self, layers: bool) -> Table:
        table = Table(box=box.SIMPLE, show_edge=False)
        shown = [_cells(row, layers) for row in self.history[-self._SHOWN :]]
        for name in shown[-1]:
            table.add_column(name.replace(' ', '\n'), justify='right', no_wrap=True)
        for cells in shown:
            table.add_row(*cells.values())
        return table


def _cells(row: Row, layers: bool = True) -> dict[str, str]:
    """What is shown of an epoch, by column."""
    cells = {
        'epoch': str(row['epoch']), 'loss': f'{row["loss"]:.4f}',
        'train error': f'{row["train_error"]:.2f} %', 'test error': f'{row["test_error"]:.2f} %',
    }  # fmt: skip
    if 'bits_per_character' in row:
        cells['bits per character'] = f'{row["bits_per_character"]:.3f}'
    if 'kl' not in row:  # a dense network
        return cells
    ratio = row['compression']
    cells['compression'] = 'all' if ratio is None else f'{ratio:.1f}x'
    cells |= {'KL': f'{row["kl"]:,.0f}', 'KL weight': f'{row["kl_weight"]:.2f}'}
    if layers:
        for name, percent in row['sparsity_per_layer'].items():
            cells[f'{name} zeros'] = f'{percent:.1f} %'
    return cells
