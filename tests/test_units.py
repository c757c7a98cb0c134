"""The experiments with scales of units: what is left, smaller networks along the way."""

from pathlib import Path

import jax
import numpy as np
import pytest

import svd_jax as svd
from experiments import lenet500300
from experiments.config import Config
from experiments.errors import UsageError
from run_folders import (
    interrupted_in_the_second_epoch,
    main,
    metrics_of,
    params_of,
    summary_of,
    without_times,
)

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once', 'no_pictures')
# From noise of half the scales' size, at a rate that drops units in a few steps.
OPTIONS = (
    '--dataset', 'mnist5k', '--batch-size', '500', '--checkpoint-seconds', '0',
    '--warmup', '0', '0', '--groups', 'units', '--log-sigma2-init', '-1',
    '--log-sigma2-rate', '600', '--epochs', '2', '--fine-tune', '1',
)  # fmt: skip
SHRINK = (
    '--group-kl-weight', '2', '--shrink', '1.2', '--unit-cost', 'flops', '--average', '0.5',
)  # fmt: skip


def run(out: Path, *options: str) -> dict:
    main(lenet500300, *OPTIONS, '--out', str(out), *options)
    return summary_of(out)


@pytest.fixture(scope='module')
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('units') / 'out'
    run(out, *SHRINK)
    return out


def test_the_summary_tells_the_units_that_are_left_and_the_work(shrunk: Path) -> None:
    summary = summary_of(shrunk)
    assert summary['groups'] == 'units'
    assert (shrunk / 'pictures' / 'units.png').stat().st_size > 0
    units = summary['units']
    assert {name: total for name, (_, total) in units.items()} == {
        'Dense_0 inputs': 784, 'Dense_1 inputs': 500, 'Dense_2 inputs': 300,
    }  # fmt: skip
    left = [units[f'Dense_{i} inputs'][0] for i in range(3)]
    assert all(0 < n < total for n, total in zip(left, (784, 500, 300), strict=True))
    assert summary['multiply_adds_dense'] == 784 * 500 + 500 * 300 + 300 * 10
    assert summary['multiply_adds'] == left[0] * left[1] + left[1] * left[2] + left[2] * 10
    # What ships is of the whole network's shapes, with the others' weights at zero.
    loaded = svd.load(shrunk / 'model.svd')
    for i, (alive, shape) in enumerate(zip(left, ((784, 500), (500, 300), (300, 10)), strict=True)):
        kernel = np.asarray(loaded[f'Dense_{i}']['kernel'])
        assert kernel.shape == shape
        assert np.count_nonzero(kernel.any(1)) == alive


def test_what_was_removed_stays_removed(shrunk: Path) -> None:
    gone = []
    for epoch in (2, 3):
        params = params_of(shrunk, epoch)
        scales = [params[f'Dense_{i}']['groups']['inputs']['scale'].ravel() for i in range(3)]
        gone.append([scale == 0 for scale in scales])
    assert any(mask.any() for mask in gone[0])
    for before, after in zip(*gone, strict=True):
        assert not np.any(before & ~after)


def test_an_interrupted_run_ends_with_the_same_bits(shrunk: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with interrupted_in_the_second_epoch(), pytest.raises(SystemExit):
        run(out, *SHRINK)
    run(out, *SHRINK, '--resume')
    jax.tree.map(np.testing.assert_array_equal, params_of(out, 3), params_of(shrunk, 3))
    assert without_times(metrics_of(out)[-1]) == without_times(metrics_of(shrunk)[-1])


def test_the_budget_decides_what_is_left(tmp_path: Path) -> None:
    for budget in (0.5, 0.05):
        out = tmp_path / str(budget)
        found = run(out, '--budget', str(budget), '--group-kl-weight', '3')
        assert found['multiply_adds'] <= budget * found['multiply_adds_dense']
        assert min(left for left, _ in found['units'].values()) >= 1


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'method': 'dense', 'groups': 'units'}, '--groups is for --method svd'),
        ({'shrink': 1.0}, '--shrink must be above 1'),
        ({'groups': 'units', 'budget': 0.0}, '--budget must be a share'),
        ({'budget': 0.1}, '--budget is for --groups units'),
        ({'unit_cost': 'flops'}, '--unit-cost is for --groups units'),
        ({'shrink': 2.0, 'seeds': 2}, '--shrink is for --method svd, one network at a time'),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**options)
