"""experiments.kl_approximation against sampling and power series, from its command line on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from experiments import kl_approximation
from experiments.errors import UsageError
from experiments.kl_approximation import Options

PAPER = [0.63576, 1.87320, 1.48695]
WIDE = np.linspace(-10, 10, 201)


def main(*arguments: str) -> None:
    """From the command line on, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['kl_approximation', *arguments])
        kl_approximation.command_line()


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp('kl') / 'run'
    main('--out', str(out))
    return out, json.loads((out / 'summary.json').read_text())


# --- The exact value ------------------------------------------------------------------------------


def test_moments_against_sampling() -> None:
    samples = np.random.default_rng(0).standard_normal(200_000)
    log_alpha = np.asarray([-10.0, -4.0, -1.0, 0.0, 2.0, 10.0])
    logs = np.log(np.abs(1 + np.exp(log_alpha[:, None] / 2) * samples))
    for power in (1, 2):
        values = logs**power
        error = values.std(axis=1) / np.sqrt(len(samples))
        exact = kl_approximation.log_moment(log_alpha, power)
        assert np.all(np.abs(values.mean(axis=1) - exact) < 4 * error)


def test_the_density_has_unit_mass() -> None:
    grid = np.linspace(-20, 20, 81)
    np.testing.assert_allclose(kl_approximation.log_moment(grid, 0), 1, rtol=1e-12)


def test_exact_kl_against_a_mixture_of_digammas() -> None:
    # (eps / sqrt(alpha))^2 is a noncentral chi-squared: a Poisson mixture of central ones, of each
    # of which the mean logarithm is a digamma function.
    for log_alpha in (-4.0, 0.0, 3.0, 10.0):
        u = np.exp(-log_alpha) / 2
        k = np.arange(400)
        poisson = np.exp(k * np.log(u) - u - special.gammaln(k + 1))
        expected = poisson @ (special.digamma(k + 0.5) + np.log(2)) / 2  # E log|eps| - log(alpha)/2
        constant = (np.euler_gamma + np.log(2)) / 2
        found = kl_approximation.exact_kl(np.asarray([log_alpha]))
        np.testing.assert_allclose(found, expected + constant, rtol=1e-11, atol=1e-13)


# --- The fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize('constants', [(0.6, 1.5, 1.2), (0.7, 2.5, 2.0)])
def test_the_fit_finds_whatever_constants_the_data_has(constants: tuple) -> None:
    # In the fit's convention, by which the constant of the KL is k1.
    k1, k2, k3 = constants
    negative = k1 / (1 + np.exp(-k2 - k3 * WIDE)) - 0.5 * np.log1p(np.exp(-WIDE))
    found = kl_approximation.fit(WIDE, kl_approximation.CONSTANT - negative)
    np.testing.assert_allclose(found.x, constants, rtol=1e-6)


def test_sampling_error_is_the_spread_of_fits_to_samples() -> None:
    kl = kl_approximation.exact_kl(WIDE)
    fitted = kl_approximation.fit(WIDE, kl)
    rng, samples, fits = np.random.default_rng(1), 500, []
    for _ in range(100):
        eps = 1 + np.exp(WIDE / 2) * rng.standard_normal((samples, len(WIDE)))
        sampled = kl_approximation.CONSTANT - WIDE / 2 + np.log(np.abs(eps)).mean(axis=0)
        fits.append(kl_approximation.fit(WIDE, sampled).x)
    error = kl_approximation.sampling_error(WIDE, fitted.jac, samples)
    np.testing.assert_allclose(np.std(fits, axis=0), error, rtol=0.3)


def test_constants_are_the_least_squares_of_the_authors_procedure(finished) -> None:
    _, summary = finished
    grid = np.linspace(-10, 10, 1000)
    target = kl_approximation.CONSTANT - kl_approximation.exact_kl(grid)

    def loss(k: np.ndarray) -> float:
        fitted = k[0] * special.expit(k[1] + k[2] * grid) - 0.5 * np.log1p(np.exp(-grid))
        return np.sum((target - fitted) ** 2)

    found = np.asarray(summary['constants'])
    assert summary['sum_of_squares'] == pytest.approx(loss(found), rel=1e-6)
    for step in 1e-3 * np.concatenate([np.eye(3), -np.eye(3)]):
        assert loss(found + step) > loss(found)
    # The notebook is a draw of the same; the paper's constants are close, and not the same.
    notebook = summary['constants_of_the_notebook']
    assert np.all(np.abs(found - notebook) < 3 * np.asarray(summary['sampling_error']))
    assert summary['largest_difference'] == pytest.approx(np.max(np.abs(found - PAPER)))
    assert 1e-3 < summary['largest_difference'] < 2.5e-3
    assert not summary['within_tolerance']


def test_errors_of_the_approximations(finished) -> None:
    _, summary = finished
    errors, small = summary['errors'], summary['errors_to_alpha_1']
    assert errors['exact']['error'] < 2e-6
    assert errors['molchanov']['error'] == pytest.approx(0.0094, abs=1e-4)
    assert errors['molchanov']['log_alpha'] == pytest.approx(-3.5, abs=0.1)
    # ARD lacks the constant as alpha vanishes; Kingma's two are for alpha up to 1.
    assert errors['ard']['error'] == pytest.approx(0.635, abs=1e-3)
    assert small['cubic']['error'] < 0.05 < 0.2 < small['bound']['error'] < 0.3
    assert all(values['log_alpha'] <= 0 for values in small.values())
    assert errors['bound']['error'] > 4


# --- The command line -----------------------------------------------------------------------------


def test_files_and_what_is_printed(finished, capsys: pytest.CaptureFixture) -> None:
    out, summary = finished
    assert {path.name for path in out.iterdir()} == {'summary.json', 'pictures'}
    assert (out / 'pictures' / 'kl_approximation.png').read_bytes().startswith(b'\x89PNG')
    assert summary['experiment'] == 'kl_approximation'
    assert {'scipy', 'numpy', 'svd_jax'} <= summary['versions'].keys()
    main('--out', str(out), '--points', '60', '--reach', '8')  # its own folder, again
    again = json.loads((out / 'summary.json').read_text())
    assert (again['points'], again['reach']) == (60, 8)
    printed = capsys.readouterr().out
    assert f'{again["constants"][1]:.5f}' in printed
    assert str(out) in printed.replace('\n', '')


@pytest.mark.parametrize(
    ('arguments', 'what'),
    [
        (('--points', '10'), '--points'),
        (('--points', '1000000'), '--points'),
        (('--reach', '1'), '--reach'),
        (('--reach', 'nan'), '--reach'),
        (('--reach', 'inf'), '--reach'),
    ],
)
def test_bad_options_are_one_line(
    arguments: tuple, what: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main('--out', str(tmp_path / 'run'), *arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {what} must')
    assert not (tmp_path / 'run').exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    for content in ('{"experiment": "lenet300"}', '[]', 'no JSON'):
        (tmp_path / 'summary.json').write_text(content)
        with pytest.raises(UsageError, match='something else'):
            kl_approximation.run(Options(out=tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ['summary.json']
        assert (tmp_path / 'summary.json').read_text() == content


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='another --out'):
        kl_approximation.run(Options(out=tmp_path / 'file' / 'run'))
