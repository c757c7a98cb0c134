"""Runs that are killed, damaged or out of room go on to the same bits.

A run is killed twice by default; SVD_JAX_KILLS=10 kills ten times, and SVD_JAX_KILL_EXPERIMENT,
_EPOCHS and _SEED choose another run.
"""

import dataclasses
import errno
import gc
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import lenet5, loop, pictures, report
from experiments.errors import UsageError
from run_folders import ROOT, main, metrics_of, state_of, summary_of, without_times

EXPERIMENT = os.environ.get('SVD_JAX_KILL_EXPERIMENT', 'lenet300')
EPOCHS = int(os.environ.get('SVD_JAX_KILL_EPOCHS', 3))
KILLS = int(os.environ.get('SVD_JAX_KILLS', 2))
pytestmark = [
    pytest.mark.usefixtures('quick_compilation'),
    # When one array cannot be read, orbax drops the coroutines that read the others.
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
]

Process = subprocess.Popen[bytes]


def command(out: Path, *options: str, epochs: int = EPOCHS) -> list[str]:
    return [
        sys.executable, '-m', f'experiments.{EXPERIMENT}', '--dataset', 'mnist5k',
        '--epochs', str(epochs), '--checkpoint-seconds', '0', '--out', str(out), *options,
    ]  # fmt: skip


def arrays_of(out: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(state_of(out))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_same_run(out: Path, reference: Path, epochs: int = EPOCHS) -> None:
    """The same parameters and optimiser bit for bit, summary and metrics, apart from times."""
    states = arrays_of(out), arrays_of(reference)
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name, strict=True)
    summaries = [without_times(summary_of(folder)) for folder in (out, reference)]
    assert summaries[0] == summaries[1]
    rows = [[without_times(row) for row in metrics_of(folder)] for folder in (out, reference)]
    assert [row['epoch'] for row in rows[0]] == list(range(1, epochs + 1))
    assert rows[0] == rows[1]


def train(out: Path, *options: str, epochs: int = EPOCHS) -> None:
    """Trains in this process, from the command line on."""
    experiment = importlib.import_module(f'experiments.{EXPERIMENT}')
    main(experiment, *command(out, *options, epochs=epochs)[3:])


@pytest.fixture(scope='module')
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp('reference') / 'run'
    train(out)
    return out


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    return Path(shutil.copytree(reference, tmp_path / 'copy'))


# --- Kills ----------------------------------------------------------------------------------------


def moment_of_start(process: Process, out: Path, rng: random.Random) -> bool:
    """While Python imports or XLA compiles."""
    time.sleep(rng.uniform(0.5, 8.0))
    return True


def moment_of_epoch(process: Process, out: Path, rng: random.Random) -> bool:
    """Somewhere after the next row of metrics.jsonl."""
    before = rows_of(out)
    if not wait_until(process, lambda: rows_of(out) > before):
        return False
    time.sleep(rng.uniform(0.0, 1.0))
    return True


def moment_of_save(process: Process, out: Path, rng: random.Random) -> bool:
    """While orbax writes: its temporary folder is there."""
    folder = out / 'checkpoints'
    old = set(folder.glob('*tmp*'))  # what an earlier kill has left
    if not wait_until(process, lambda: set(folder.glob('*tmp*')) - old):
        return False
    time.sleep(rng.uniform(0.0, 0.04))
    return True


def rows_of(out: Path) -> int:
    path = out / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


def wait_until(process: Process, condition: Callable[[], object]) -> bool:
    """Whether the condition holds before the process ends."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def test_killed_run_ends_with_the_same_bits(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / 'killed'
    rng = random.Random(int(os.environ.get('SVD_JAX_KILL_SEED', 0)))
    moments = [moment_of_save, moment_of_epoch, moment_of_start]
    for kill in range(KILLS):
        moment = moments[kill % len(moments)]
        options = ['--resume'] if kill else []
        process = subprocess.Popen(
            command(out, *options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        started = time.monotonic()
        reached = False
        try:
            # In the moments that wait, the run may come to its end instead.
            reached = moment(process, out, rng)
        finally:
            process.send_signal(signal.SIGKILL)
            _, stderr = process.communicate()
        left = sorted(p.name for p in out.glob('checkpoints/*'))
        print(
            f'kill {kill + 1}: {moment.__name__} reached={reached}, after '
            f'{time.monotonic() - started:.1f} s: exit {process.returncode}, '
            f'{rows_of(out)} rows, checkpoints {left}'
        )
        assert process.returncode in (0, -signal.SIGKILL), stderr.decode()
    subprocess.run(command(out, '--resume'), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_same_run(out, reference)
    assert not list(out.glob('checkpoints/*tmp*'))


# --- Damage ---------------------------------------------------------------------------------------


def truncate_largest(folder: Path) -> None:
    files = [path for path in folder.rglob('*') if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_damaged_checkpoint(reference: Path, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truncate_largest(copy / 'checkpoints' / str(EPOCHS))
    train(copy, '--resume')
    said = capfd.readouterr()
    assert said.err == ''
    lines = [line for line in said.out.splitlines() if ' is damaged' in line]
    assert len(lines) == 1
    assert f'epoch {EPOCHS} is damaged' in lines[0]
    assert f'resuming after epoch {EPOCHS - 1} of {EPOCHS}' in said.out
    assert_same_run(copy, reference)


def test_all_checkpoints_damaged(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for epoch in (EPOCHS - 1, EPOCHS):
        truncate_largest(copy / 'checkpoints' / str(epoch))
    assert_refused(copy, '--resume', match=r'no checkpoint in .* can be read', capfd=capfd)


def assert_refused(out: Path, *options: str, match: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train(out, *options)
    assert exit_.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(f'error: .*{match}', lines[0])


# --- Resuming what is complete, or another run ----------------------------------------------------


def test_complete_run_only_writes_its_summary_again(
    reference: Path, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = summary_of(copy)
    (copy / 'summary.json').unlink()
    shutil.rmtree(copy / 'pictures')
    before = [p.stat().st_mtime_ns for p in sorted((copy / 'checkpoints').rglob('*'))]
    train(copy, '--resume')
    assert f'all {EPOCHS} epochs are done' in capfd.readouterr().out
    assert summary_of(copy) == summary  # with its times
    assert (copy / 'pictures' / 'weights.gif').is_file()
    assert [p.stat().st_mtime_ns for p in sorted((copy / 'checkpoints').rglob('*'))] == before
    assert_same_run(copy, reference)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ((), 'already holds a run: .*--resume'),
        (('--resume', '--seed', '1'), '--seed 0, not 1'),
        (('--resume', '--learning-rate', '0.01'), '--learning-rate 0.001, not 0.01'),
        (('--resume', '--method', 'dense'), '--method svd, not dense'),
        (('--resume', '--validation', '500'), 'examples|--validation'),
    ],
)
def test_folder_of_another_run(
    reference: Path, options: tuple[str, ...], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(reference, *options, match=match, capfd=capfd)


def test_other_number_of_epochs(reference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(reference, '--resume', epochs=EPOCHS + 1)
    assert f'--epochs {EPOCHS}, not {EPOCHS + 1}' in capfd.readouterr().err


def test_another_network(reference: Path) -> None:
    options = dataclasses.replace(
        lenet5.DEFAULTS, dataset='mnist5k', epochs=EPOCHS, out=reference, resume=True
    )
    with pytest.raises(UsageError, match='holds a run with experiment lenet300, not lenet5'):
        lenet5.run(options)


def test_damaged_run_json(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text in ('', '{"epochs": 3', '[1, 2]', '\x00'):
        (copy / 'run.json').write_text(text)
        assert_refused(copy, '--resume', match='run.json is damaged', capfd=capfd)


def test_folder_in_use(reference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with report.lock(reference):
        assert_refused(reference, '--resume', match='another process is writing', capfd=capfd)


# --- A full disk ----------------------------------------------------------------------------------


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ('module', 'name'),
    [(report, '_write'), (report, 'EventsWriter'), (pictures, 'write_all'), (loop, 'write_json')],
)
def test_full_disk_at_the_end(
    reference: Path, copy: Path, module: object, name: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full_disk)
        assert_refused(copy, '--resume', match='No space left on device.*--resume', capfd=capfd)
    gc.collect()  # a file that was left open warns here
    np.testing.assert_equal(arrays_of(copy), arrays_of(reference))
    assert metrics_of(copy) == metrics_of(reference)


def test_disk_that_fills_up_while_training(
    reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk has room for two checkpoints, not for the third that comes before a deletion."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    size = sum(p.stat().st_size for p in (reference / 'checkpoints').rglob('*')) // 2
    mount = ['mount', '-t', 'tmpfs', 'none', str(disk), '-o']
    try:
        subprocess.run([*mount, f'size={size * 5 // 2}'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('may not mount a tmpfs')
    try:
        out = disk / 'run'
        assert_refused(out, match='no space left to save epoch 3 .* epoch 2 is intact', capfd=capfd)
        assert sorted(p.name for p in (out / 'checkpoints').iterdir() if p.is_dir()) == ['1', '2']
        subprocess.run([*mount, 'remount,size=100m'], check=True)
        train(out, '--resume')
        assert_same_run(out, reference)
    finally:
        subprocess.run(['umount', str(disk)], check=True)
