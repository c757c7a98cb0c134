"""experiments.gradient_variance against closed forms, and from its command line on."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import svd_jax as svd
from experiments import data, gradient_variance, report
from experiments.errors import UsageError
from experiments.gradient_variance import Additive, Multiplicative, Options
from experiments.models import LeNet300

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHORT = (
    '--dataset', 'mnist5k', '--epochs', '2', '--seeds', '2', '--batches', '2', '--draws', '5',
    '--batch-size', '400', '--learning-rate', '0.01',
)  # fmt: skip


def main(*arguments: str) -> None:
    """From the command line on, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['gradient_variance', *arguments])
        gradient_variance.command_line()


@pytest.fixture(scope='module')
def finished(
    tmp_path_factory: pytest.TempPathFactory, quick_compilation: None
) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp('variance') / 'run'
    main('--out', str(out), *SHORT)
    return out, json.loads((out / 'summary.json').read_text())


def small(kernel: list[float], log_sigma2: list[float]) -> dict:
    """A linear layer with one output."""
    return {
        'Dense_0': {
            'kernel': jnp.asarray(kernel)[:, None],
            'log_sigma2': jnp.asarray(log_sigma2)[:, None],
            'bias': jnp.zeros(1),
        }
    }


POINT = small([0.5, -0.3, 0.2, 1.0], [-1.0, 0.5, 1.0, -6.0])
X, TARGET = jnp.asarray([[1.0, -2.0, 0.5, 1.5]]), 0.4


def quadratic(params: dict, key: jax.Array) -> jax.Array:
    """Half the squared error of the layer, its activation drawn."""
    y, _ = svd.linen.Dense(1).apply({'params': params['Dense_0']}, X, rngs={'noise': key})
    return 0.5 * jnp.sum((y - TARGET) ** 2)


def quadratic_of_weights(params: dict, key: jax.Array) -> jax.Array:
    """The same, the weights drawn."""
    layer = svd.sample(params, key)['Dense_0']
    return 0.5 * jnp.sum((X @ layer['kernel'] - TARGET) ** 2)


# --- Two parametrisations of one posterior --------------------------------------------------------


def test_there_and_back_again() -> None:
    there = gradient_variance.to_multiplicative(POINT)
    assert there['Dense_0'].keys() == {'kernel', 'log_alpha', 'bias'}
    log_alpha = np.log(np.exp(POINT['Dense_0']['log_sigma2']) / POINT['Dense_0']['kernel'] ** 2)
    np.testing.assert_allclose(there['Dense_0']['log_alpha'], log_alpha, rtol=1e-5)
    back = gradient_variance.to_additive(there)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, POINT)


def test_the_same_noise_gives_the_same_loss_and_kl() -> None:
    there = gradient_variance.to_multiplicative(POINT)
    again = gradient_variance.to_additive(there)
    loss = [float(quadratic(params, jax.random.key(3))) for params in (POINT, again)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)
    assert float(svd.kl(POINT)) == pytest.approx(float(svd.kl(again)), rel=1e-5)


def test_a_kernel_of_zero_has_finite_values_and_gradients() -> None:
    point = small([0.0, 1e-30], [-10.0, 3.0])
    there = gradient_variance.to_multiplicative(point)

    def loss(params: dict) -> jax.Array:
        additive = gradient_variance.to_additive(params)['Dense_0']
        return jnp.sum(jnp.exp(additive['log_sigma2']) + additive['kernel'])

    for tree in (there, jax.grad(loss)(there)):
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def test_gradients_against_finite_differences_with_sigma_or_alpha_held() -> None:
    key, step = jax.random.key(5), 1e-2
    found = gradient_variance.gradients(quadratic, POINT, key)
    there = gradient_variance.to_multiplicative(POINT)

    def with_alpha_held(params: dict) -> jax.Array:
        return quadratic(gradient_variance.to_additive(params), key)

    def with_sigma_held(params: dict) -> jax.Array:
        return quadratic(params, key)

    held = {'additive': (with_sigma_held, POINT), 'multiplicative': (with_alpha_held, there)}
    for name, (loss, point) in held.items():
        for i in range(4):

            def moved(by: float, point: dict = point, i: int = i) -> dict:
                kernel = point['Dense_0']['kernel'].at[i].add(by)
                return {'Dense_0': {**point['Dense_0'], 'kernel': kernel}}

            slope = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
            assert float(found[name][i]) == pytest.approx(float(slope), rel=0.02, abs=2e-3)


# --- The variance of the gradient -----------------------------------------------------------------


def test_variance_of_a_linear_layer_in_closed_form() -> None:
    # With y = theta x + s eps and r = theta x - target, the gradient is (r + s eps) x, and with
    # alpha held (r + s eps) (x + eps c), where c = ds/dtheta = alpha theta x^2 / s.
    theta = np.asarray(POINT['Dense_0']['kernel'])[:, 0]
    sigma2 = np.exp(np.asarray(POINT['Dense_0']['log_sigma2']))[:, 0]
    x = np.asarray(X)[0]
    s, r = np.sqrt(x**2 @ sigma2), theta @ x - TARGET
    c = sigma2 / theta * x**2 / s
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = gradient_variance.noise_variance(quadratic, POINT, keys)
    np.testing.assert_allclose(found['additive'], s**2 * x**2, rtol=0.05)
    expected = (s * x + r * c) ** 2 + 2 * s**2 * c**2
    np.testing.assert_allclose(found['multiplicative'], expected, rtol=0.08)


def test_variance_with_drawn_weights_in_closed_form() -> None:
    # w = theta + sigma eps: the gradient is e x with e = w x - target, and with alpha held it is
    # e x (1 + a eps), where a = sigma / theta. e = r + sum_j b_j eps_j with b = sigma x.
    theta = np.asarray(POINT['Dense_0']['kernel'])[:, 0]
    sigma = np.exp(np.asarray(POINT['Dense_0']['log_sigma2']) / 2)[:, 0]
    x, r, a = np.asarray(X)[0], float(theta @ np.asarray(X)[0] - TARGET), sigma / theta
    b = sigma * x
    total = b @ b
    keys = jax.random.split(jax.random.key(1), 20_000)
    found = gradient_variance.noise_variance(quadratic_of_weights, POINT, keys)
    np.testing.assert_allclose(found['additive'], total * x**2, rtol=0.05)
    # e (1 + a eps) = r + r a eps + b eps + rest + a b eps^2 + a rest eps, rest ~ N(0, total - b^2)
    rest = total - b**2
    expected = x**2 * ((r * a + b) ** 2 + rest * (1 + a**2) + 2 * (a * b) ** 2)
    np.testing.assert_allclose(found['multiplicative'], expected, rtol=0.08)


def test_variance_is_that_of_numpy() -> None:
    keys = jax.random.split(jax.random.key(2), 7)
    found = gradient_variance.noise_variance(quadratic, POINT, jnp.copy(keys))
    draws = [gradient_variance.gradients(quadratic, POINT, key) for key in keys]
    for name, variance in found.items():
        expected = np.var([draw[name] for draw in draws], axis=0, ddof=1)
        np.testing.assert_allclose(variance, expected, rtol=1e-4)


def test_bins_of_log_alpha() -> None:
    log_alpha = np.asarray([-99.0, -0.5, 0.0, 0.9, 0.5, 99.0])
    additive = np.asarray([1.0, 1.0, 2.0, 4.0, 0.0, 1.0])
    variance = {'additive': additive, 'multiplicative': additive * [1, 1, 3, 0.5, 1, 9]}
    rows = gradient_variance.by_log_alpha(log_alpha, variance)
    lowest, highest = gradient_variance.EDGES[[0, -2]]
    assert [row['from'] for row in rows] == [lowest, -1, 0, highest]
    (above,) = (row for row in rows if row['from'] == 0)
    assert above['weights'] == 2  # the one without any noise is left out
    assert (above['additive'], above['multiplicative']) == (3, 4)
    assert above['ratio'] == pytest.approx(4 / 3)
    assert above['additive_lower_percent'] == 50


# --- The training ---------------------------------------------------------------------------------


def test_both_start_from_the_same_posterior() -> None:
    options = Options(dataset='mnist5k', epochs=1, seeds=2)
    dataset = data.load('mnist5k')
    first, second = (
        kind(LeNet300, options.training(), dataset) for kind in (Additive, Multiplicative)
    )
    state = second.init()
    assert 'log_alpha' in state.params['Dense_0']
    assert 'log_sigma2' not in state.params['Dense_0']
    for a, b in zip(first.split(first.init()), second.split(state), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.params, b.params)


def test_a_run_writes_what_it_says(finished, capsys: pytest.CaptureFixture) -> None:
    out, summary = finished
    assert {path.name for path in out.iterdir()} == {'summary.json', 'pictures'}
    assert (out / 'pictures' / 'gradient_variance.png').read_bytes().startswith(b'\x89PNG')
    assert (summary['experiment'], summary['dataset']) == ('gradient_variance', 'mnist5k')
    assert summary['measured_epochs'] == [1, 2]
    assert {'matplotlib', 'jax', 'svd_jax'} <= summary['versions'].keys()
    for networks in summary['by_epoch'].values():
        assert networks.keys() == {'seed0', 'seed1'}
        for rows in networks.values():
            assert [row['epoch'] for row in rows] == [0, 1, 2]
            for row in rows:
                assert row['bound'] == pytest.approx(-row['data_term'] - row['kl'] / 4000)
                assert 0 <= row['sparsity'] <= 100
                assert 0 <= row['test_error'] <= 100
    starts = [networks['seed0'][0] for networks in summary['by_epoch'].values()]
    assert starts[0] == pytest.approx(starts[1], rel=1e-3)  # the same posterior and noise
    # Even so short: sigma grows beside a shrinking theta, which alpha alone does not let it.
    for column in ('bound', 'sparsity'):
        assert summary['findings'][column] == {'networks': 2, 'additive_higher': 2}


def test_variances_of_a_run(finished) -> None:
    _, summary = finished
    points = summary['gradient_variance']
    measured = [(point['epoch'], point['seed'], point['noise_of']) for point in points]
    noises = ('activations', 'weights')
    assert measured == [(e, s, noise) for e in (1, 2) for s in (0, 1) for noise in noises]
    for noise, counts in summary['findings']['gradient_variance'].items():
        bins = [r for p in points if p['noise_of'] == noise for r in p['bins'] if r['from'] >= 0]
        assert counts['bins_above_0'] == len(bins) > 10
        lower = sum(row['additive'] < row['multiplicative'] for row in bins)
        assert counts['additive_lower'] == lower > 0.9 * len(bins)
    # Where the noise is small beside the mean, the two are one; elsewhere they part.
    last = [p for p in points if (p['noise_of'], p['epoch']) == ('activations', 2)]
    for point in last:
        ratios = {row['from']: row['ratio'] for row in point['bins']}
        assert ratios[-4] == pytest.approx(1, abs=0.1)
        assert ratios[8] > 10


def test_its_own_folder_is_written_again(finished, capsys: pytest.CaptureFixture) -> None:
    out, summary = finished
    gradient_variance._say(gradient_variance.Console(width=200), out, summary)
    printed = capsys.readouterr().out
    assert f'{summary["findings"]["gradient_variance"]["weights"]["bins_above_0"]} bins' in printed
    assert str(out) in printed
    with report.claimed(out, gradient_variance.NAME):
        pass


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'what'),
    [
        (('--epochs', '0'), '--epochs must'),
        (('--seeds', '0'), '--seeds must'),
        (('--seed', '-1'), '--seed must'),
        (('--draws', '1'), '--draws must'),
        (('--batches', '0'), '--batches must'),
        (('--batches', '41'), '--batches must be at most 40'),
        (('--learning-rate', 'nan'), '--learning-rate must'),
        (('--warmup', '3', '1'), '--warmup needs'),
        (('--batch-size', '5000'), 'batch size 5000'),
        (('--dataset', 'mnits'), "unknown dataset 'mnits'"),
    ],
)
def test_bad_options_are_one_line(
    arguments: tuple, what: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main('--dataset', 'mnist5k', '--out', str(tmp_path / 'run'), *arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {what}')
    assert not (tmp_path / 'run').exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'summary.json').write_text('{"experiment": "lenet300"}')
    with pytest.raises(UsageError, match='something else'):
        gradient_variance.run(Options(dataset='mnist5k', out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['summary.json']
