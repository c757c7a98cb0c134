"""What a run shows and writes while it trains: a live table, metrics.jsonl, TensorBoard events."""

import json
import os
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from tensorboardX import SummaryWriter

Row = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, also when killed."""
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    os.replace(temporary, path)


def read_history(path: Path, last_epoch: int) -> list[Row]:
    """The rows of a metrics.jsonl up to an epoch; a line that a kill left unfinished is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row['epoch'] <= last_epoch:
            rows.append(row)
    return rows


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Report:
    """The live table of a run, and its files; a context manager.

    On a terminal the last rows and a progress bar; elsewhere a line per epoch.

    Args:
      out: the run's folder.
      title: shown above the table.
      history: the rows of the epochs before, when resuming.
      epochs, steps: epochs of the run, steps of an epoch.
    """

    _SHOWN = 12

    def __init__(
        self, out: Path, title: str, history: list[Row], epochs: int, steps: int, console: Console
    ) -> None:
        self.history, self._out, self._title, self._epochs = history, out, title, epochs
        self._console = console
        self._progress = Progress(
            TextColumn('[bold]{task.description}'),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn('{task.fields[note]}'),
            console=console,
            expand=True,
        )
        self._epoch = self._progress.add_task('epoch', total=epochs, completed=len(history), note='')
        self._step = self._progress.add_task('step', total=steps, note='')
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)
        self._started, self._already = time.perf_counter(), len(history)

    def __enter__(self) -> Self:
        with (self._out / 'metrics.jsonl').open('w') as file:  # what came after the checkpoint goes
            file.writelines(json.dumps(row) + '\n' for row in self.history)
        self._metrics = (self._out / 'metrics.jsonl').open('a')
        self._events = SummaryWriter(
            str(self._out / 'tensorboard'), purge_step=len(self.history) + 1
        )
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        self._metrics.close()
        self._events.close()

    def advance(self, done: int) -> None:
        """Steps of the current epoch that are done."""
        self._progress.update(self._step, completed=done)

    def add(self, row: Row) -> None:
        """Reports an epoch."""
        self.history.append(row)
        self._metrics.write(json.dumps(row) + '\n')
        self._metrics.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != 'epoch':
                self._events.add_scalar(name, value, row['epoch'])
        for layer, percent in row['sparsity_per_layer'].items():
            self._events.add_scalar(f'sparsity/{layer}', percent, row['epoch'])
        self._events.flush()
        passed = time.perf_counter() - self._started
        left = passed / (len(self.history) - self._already) * (self._epochs - len(self.history))
        note = f'{_duration(left)} left'
        self._update(self._epoch, len(self.history), note)
        self._update(self._step, 0, f'{row["images_per_second"]:,.0f} images/s')
        if not self._console.is_terminal:
            self._console.print(self._line(row, note), soft_wrap=True)

    def _update(self, task: TaskID, completed: int, note: str) -> None:
        self._progress.update(task, completed=completed, note=note)

    def _line(self, row: Row, note: str) -> str:
        cells = zip(self._columns(row), self._cells(row), strict=True)
        return '  '.join(f'{name} {cell}' for name, cell in cells) + f'  {note}'

    @staticmethod
    def _columns(row: Row) -> list[str]:
        layers = list(row['sparsity_per_layer']) if 'kl' in row else []
        variational = ['compression', 'KL', 'weight'] if layers else []
        return ['epoch', 'loss', 'train %', 'test %', *variational, *layers, 'images/s']

    @staticmethod
    def _cells(row: Row) -> list[str]:
        variational = []
        if 'kl' in row:
            ratio = row['compression']
            variational = ['all' if ratio is None else f'{ratio:.1f}x', f'{row["kl"]:,.0f}',
                           f'{row["kl_weight"]:.2f}']  # fmt: skip
            variational += [f'{percent:.1f} %' for percent in row['sparsity_per_layer'].values()]
        return [
            str(row['epoch']), f'{row["loss"]:.4f}', f'{row["train_error"]:.2f}',
            f'{row["test_error"]:.2f}', *variational, f'{row["images_per_second"]:,.0f}',
        ]  # fmt: skip

    def _render(self) -> Group:
        table = Table(title=self._title, caption='zeros per layer in percent', expand=True)
        shown = self.history[-self._SHOWN :]
        for name in self._columns(shown[-1]) if shown else ['epoch']:
            table.add_column(name, justify='right')
        for row in shown:
            table.add_row(*self._cells(row))
        return Group(table, self._progress)
