"""Tests of experiments.checkpoint with a small state: damage, full disks, other networks."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint
from experiments.checkpoint import Checkpoints
from experiments.errors import UsageError

# When one array cannot be read, orbax drops the coroutines that read the others.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


class State(NamedTuple):
    step: jax.Array
    params: dict


def state(epoch: int, shape: tuple[int, ...] = (50, 40)) -> State:
    kernel = np.random.default_rng(epoch).normal(size=shape).astype(np.float32)
    return State(jnp.int32(epoch), {'Dense_0': {'kernel': jnp.asarray(kernel)}})


def checkpoints(folder: Path, experiment: str = 'lenet300') -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    return Checkpoints(folder, experiment, 'do something else', said.append), said


def names(folder: Path) -> list[str]:
    """Of the checkpoints and of what is unfinished; each checkpoint has its digests beside it."""
    found = sorted(path.name for path in folder.iterdir())
    epochs = [name for name in found if '.sha256' not in name]
    assert set(found) - set(epochs) == {f'{name}.sha256.json' for name in epochs if '.' not in name}
    return epochs


def assert_is(restored: tuple | None, epoch: int) -> None:
    assert restored is not None
    found, facts = restored
    assert facts['epoch'] == epoch
    np.testing.assert_array_equal(
        found.params['Dense_0']['kernel'],
        np.random.default_rng(epoch).normal(size=(50, 40)).astype(np.float32),
    )
    assert int(found.step) == epoch
    assert found.step.dtype == jnp.int32


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of epochs 2 and 3."""
    folder = tmp_path / 'checkpoints'
    writer, _ = checkpoints(folder)
    for epoch in (1, 2, 3):
        writer.save(epoch, state(epoch), {'seconds': 1.5 * epoch})
    return folder


def test_the_last_two_are_kept_and_the_newest_is_restored(saved: Path) -> None:
    assert names(saved) == ['2', '3']
    reader, said = checkpoints(saved)
    restored = reader.restore(like=state(0))
    assert_is(restored, 3)
    assert restored[1]['seconds'] == 4.5
    assert not said


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / 'absent')[0].restore(like=state(0)) is None
    assert checkpoints(tmp_path)[0].restore(like=state(0)) is None


# --- Damage ---------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return sorted((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def truncate_largest(folder: Path) -> None:
    largest = files(folder)[-1]
    os.truncate(largest, largest.stat().st_size // 2)


def flip_bits_of_largest(folder: Path) -> None:
    largest = files(folder)[-1]
    data = bytearray(largest.read_bytes())
    for i in range(0, len(data), 97):
        data[i] ^= 1
    largest.write_bytes(data)


def flip_one_bit_of_largest(folder: Path) -> None:
    largest = files(folder)[-1]
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def delete(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (found,) = folder.glob(name)
        shutil.rmtree(found) if found.is_dir() else found.unlink()

    damage.__name__ = f'delete_{name}'
    return damage


def empty_all(folder: Path) -> None:
    for path in files(folder):
        os.truncate(path, 0)


@pytest.mark.parametrize(
    'damage',
    [
        truncate_largest, flip_bits_of_largest, flip_one_bit_of_largest, empty_all, delete('state'),
        delete('facts'), delete('state/_METADATA'),
        delete('state/manifest.ocdbt'), delete('state/d'),
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over(
    saved: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    damage(saved / '3')
    reader, said = checkpoints(saved)
    assert_is(reader.restore(like=state(0)), 2)
    assert len(said) == 1
    assert 'epoch 3 is damaged' in said[0]
    assert '\n' not in said[0]
    assert capfd.readouterr().err == ''
    # The run goes on: the damaged one takes no place of a good one.
    reader.save(4, state(4), {})
    assert names(saved) == ['2', '4']
    damage(saved / '4')
    reader, said = checkpoints(saved)
    assert_is(reader.restore(like=state(0)), 2)
    reader.save(4, state(4), {})  # the same epoch again
    assert_is(checkpoints(saved)[0].restore(like=state(0)), 4)


def test_all_damaged(saved: Path) -> None:
    truncate_largest(saved / '2')
    truncate_largest(saved / '3')
    reader, said = checkpoints(saved)
    with pytest.raises(UsageError, match=r'no checkpoint in .* can be read: do something else'):
        reader.restore(like=state(0))
    assert len(said) == 2


def test_leftovers_of_killed_saves_neither_disturb_nor_stay(saved: Path) -> None:
    shutil.copytree(saved / '3', saved / '4.orbax-checkpoint-tmp')
    truncate_largest(saved / '4.orbax-checkpoint-tmp')
    reader, said = checkpoints(saved)
    assert_is(reader.restore(like=state(0)), 3)
    assert not said
    reader.save(5, state(5), {})
    assert names(saved) == ['3', '5']


# --- Other checkpoints ----------------------------------------------------------------------------


def test_another_network(saved: Path) -> None:
    with pytest.raises(UsageError, match='is of lenet300, not of lenet5: do something else'):
        checkpoints(saved, 'lenet5')[0].restore(like=state(0))


def test_other_shapes(saved: Path) -> None:
    with pytest.raises(UsageError, match='other names or shapes: do something else'):
        checkpoints(saved)[0].restore(like=state(0, (50, 41)))


def test_a_later_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, said = checkpoints(tmp_path)
    writer.save(1, state(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'FORMAT', checkpoint.FORMAT + 1)
        writer.save(2, state(2), {})
    with pytest.raises(UsageError, match='format 2, this version reads up to 1: upgrade svd_jax'):
        writer.restore(like=state(0))
    assert not said


@pytest.mark.parametrize('text', [None, '', '{"state/_META'])
def test_one_without_digests_as_a_kill_may_leave(saved: Path, text: str | None) -> None:
    digests = saved / '3.sha256.json'
    digests.unlink() if text is None else digests.write_text(text)
    reader, said = checkpoints(saved)
    assert_is(reader.restore(like=state(0)), 3)
    assert not said


def test_damage_that_orbax_alone_notices(saved: Path) -> None:
    (saved / '3.sha256.json').unlink()
    shutil.rmtree(saved / '3' / 'state' / 'd')
    reader, said = checkpoints(saved)
    assert_is(reader.restore(like=state(0)), 2)
    assert len(said) == 1


# --- A full disk ----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of a size at a folder; skips the test where that needs more rights."""
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('may not mount a tmpfs')
    try:
        yield
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def test_full_disk_keeps_what_was_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / 'disk'
    with small_disk(disk, '2m'):
        folder = disk / 'checkpoints'
        writer, _ = checkpoints(folder)
        writer.save(1, state(1), {})
        writer.save(2, state(2), {})
        ballast = disk / 'ballast'
        with contextlib.suppress(OSError), ballast.open('wb', buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(UsageError, match=r'no space .* epoch 3 .* epoch 2 is intact') as caught:
            writer.save(3, state(3), {})
        assert '\n' not in str(caught.value)
        assert capfd.readouterr().err == ''  # nor does orbax log its own traceback
        assert names(folder) == ['1', '2']
        assert_is(checkpoints(folder)[0].restore(like=state(0)), 2)
        ballast.unlink()
        writer.save(3, state(3), {})
        assert_is(checkpoints(folder)[0].restore(like=state(0)), 3)


def test_full_disk_at_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, 'save', full)
    with pytest.raises(UsageError, match=r'no space .* none was saved yet'):
        checkpoints(tmp_path)[0].save(1, state(1), {})


def test_other_failures_of_a_save_are_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError('a bug')

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, 'save', broken)
    with pytest.raises(ValueError, match='a bug'):
        checkpoints(tmp_path)[0].save(1, state(1), {})
