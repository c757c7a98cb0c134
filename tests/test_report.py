"""Tests of experiments.report: what it shows, on a terminal and elsewhere, and what it writes."""

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments.errors import UsageError
from experiments.report import Report, lock, read_history, write_json

LAYERS = ('Conv_0', 'Conv_1', 'Dense_0', 'Dense_1')


def row(epoch: int, dense: bool = False) -> dict:
    values = {
        'epoch': epoch, 'loss': 20.125 / epoch, 'train_error': 3.5, 'test_error': 2.25,
        'compression': 7.5, 'nonzero': 2, 'total': 15, 'images_per_second': 12345.6,
        'sparsity_per_layer': {name: 90.0 + i for i, name in enumerate(LAYERS)},
    }  # fmt: skip
    return values if dense else values | {'kl': 4321.0, 'kl_weight': 0.25}


def report(out: Path, console: Console, history: list = (), epochs: int = 40) -> Report:
    done = history[-1]['epoch'] if history else 0
    return Report(out, 'a title', list(history), done, epochs, 10, console)


def terminal(width: int) -> Console:
    screen = io.StringIO()
    return Console(force_terminal=True, width=width, height=50, file=screen, color_system=None)


def plain() -> Console:
    return Console(force_terminal=False, file=io.StringIO())


def test_terminal_shows_the_last_rows_and_time_left(tmp_path: Path) -> None:
    console = terminal(120)
    with report(tmp_path, console) as live:
        for epoch in range(1, 21):
            live.add(row(epoch))
        live.advance(7)
    # The display is drawn again and again; its last drawing starts with the last title.
    screen = console.file.getvalue().rsplit('a title', 1)[1]
    lines = screen.splitlines()
    shown = [line.split() for line in lines if line.split() and line.split()[0].isdecimal()]
    assert [int(cells[0]) for cells in shown] == list(range(9, 21))
    assert ' '.join(shown[-1]) == (
        '20 1.0063 3.50 % 2.25 % 7.5x 4,321 0.25 90.0 % 91.0 % 92.0 % 93.0 %'
    )
    for name in ('epoch', 'loss', 'compression', 'KL', *LAYERS):
        assert name in screen
    assert '20/40' in screen
    assert '7/10' in screen
    assert '12,346 images/s' in screen
    assert '0:00 left' in screen
    assert all(len(line) <= 120 for line in lines)


def test_narrow_terminal_drops_the_layers_and_cuts_nothing(tmp_path: Path) -> None:
    console = terminal(80)
    with report(tmp_path, console) as live:
        live.add(row(1))
    screen = console.file.getvalue().rsplit('a title', 1)[1]
    assert 'Conv_0' not in screen
    assert '\N{HORIZONTAL ELLIPSIS}' not in screen
    assert '1 20.1250 3.50 % 2.25 % 7.5x 4,321 0.25' in ' '.join(screen.split())


def test_elsewhere_a_line_per_epoch(tmp_path: Path) -> None:
    console = plain()
    with report(tmp_path, console) as live:
        live.add(row(1))
        live.add(row(2))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    for text in ('epoch 2', 'loss 10.0625', 'test error 2.25 %', 'KL 4,321', 'Conv_1 zeros 91.0 %',
                 '12,346 images/s', ' left'):  # fmt: skip
        assert text in lines[1]


def test_dense_network_has_no_variational_columns(tmp_path: Path) -> None:
    console = plain()
    with report(tmp_path, console) as live:
        live.add(row(1, dense=True))
    assert 'KL' not in console.file.getvalue()
    assert 'zeros' not in console.file.getvalue()


def test_every_weight_dropped(tmp_path: Path) -> None:
    console = plain()
    with report(tmp_path, console) as live:
        live.add(row(1) | {'compression': None})
    assert 'compression all' in console.file.getvalue()


def events(folder: Path) -> list[Event]:
    """Reads the records by the format's definition: length, checksum, data, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        with path.open('rb') as file:
            while header := file.read(12):
                (length,) = struct.unpack('<Q', header[:8])
                found.append(Event.FromString(file.read(length)))
                file.read(4)
    return found


def test_files_hold_every_row_as_soon_as_it_is_there(tmp_path: Path) -> None:
    with report(tmp_path, plain()) as live:
        live.add(row(1))
        live.add(row(2))
        # Not closed yet: this is what a kill would leave.
        lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
        written = events(tmp_path / 'tensorboard')
    assert [json.loads(line) for line in lines] == [row(1), row(2)]
    values = {(e.step, v.tag): v.simple_value for e in written for v in e.summary.value}
    assert values[2, 'loss'] == 10.0625
    assert values[1, 'sparsity/Dense_1'] == 93.0
    assert 'epoch' not in {tag for _, tag in values}


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    with report(tmp_path, plain()) as live:
        for epoch in (1, 2, 3):
            live.add(row(epoch))
    history = read_history(tmp_path / 'metrics.jsonl', 2)
    assert history == [row(1), row(2)]
    (tmp_path / 'tensorboard').rename(tmp_path / 'before')
    console = plain()
    with report(tmp_path, console, history) as live:
        assert read_history(tmp_path / 'metrics.jsonl', 99) == history
        live.add(row(3))
    assert read_history(tmp_path / 'metrics.jsonl', 99) == [row(1), row(2), row(3)]
    # TensorBoard forgets what came at or after the step of such an event.
    starts = [e for e in events(tmp_path / 'tensorboard') if e.session_log.status]
    assert [(e.step, e.session_log.status) for e in starts] == [(3, SessionLog.START)]


def test_history_skips_what_a_kill_or_a_crash_left(tmp_path: Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    assert read_history(path, 9) == []
    good = json.dumps(row(1)).encode() + b'\n'
    bad = b'{"epoch": 2, "lo\n12\n\xff\x00\n{"loss": 1}\n'
    path.write_bytes(good + bad + good)
    assert read_history(path, 9) == [row(1)]


def test_json_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'summary.json'
    write_json(path, {'a': 1})

    def full(self: Path, text: str) -> None:
        self.write_bytes(text[:3].encode())
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(OSError, match='No space left'):
        write_json(path, {'a': 2})
    assert json.loads(path.read_bytes()) == {'a': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['summary.json']


def test_lock_keeps_another_process_out(tmp_path: Path) -> None:
    other = (
        'import sys, pathlib; from experiments import report\n'
        'with report.lock(pathlib.Path(sys.argv[1])): print("in")'
    )

    def enter() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, '-c', other, str(tmp_path)], capture_output=True, text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip

    with lock(tmp_path):
        refused = enter()
    assert refused.returncode == 1
    assert 'another process is writing' in refused.stderr
    assert enter().stdout == 'in\n'
    with pytest.raises(UsageError, match='another process'), lock(tmp_path), lock(tmp_path):
        pass
