"""experiments.random_labels: labels that say nothing, and runs that agree with NumPy."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import data, models, random_labels
from experiments.config import fingerprint
from experiments.errors import UsageError
from run_folders import (
    interrupted_in_the_second_epoch,
    main,
    metrics_of,
    params_of,
    refused,
    summary_of,
    without_times,
)

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once', 'no_pictures')
SHORT = (
    '--dataset', 'mnist5k', '--width', '32', '--epochs', '2', '--batch-size', '500',
    '--checkpoint-seconds', '0',
)  # fmt: skip
# So that two epochs drop some weights and keep others.
SPARSE = (
    '--method', 'svd', '--warmup', '0', '1', '--learning-rate', '0.02', '--log-sigma2-init', '-3',
    '--kl-weight', '0.3',
)  # fmt: skip
# So that none is kept.
STRONG = (
    '--kl-weight', '1000', '--warmup', '0', '0', '--learning-rate', '0.05',
    '--log-sigma2-init', '-3', '--log-sigma2-rate', '2',
)  # fmt: skip
DENSE = ('--method', 'dense', '--dropout', '0.5', '--learning-rate', '0.003')


def run(out: Path, *options: str) -> dict:
    main(random_labels, *SHORT, '--out', str(out), *options)
    return summary_of(out)


def rows(out: Path) -> list[dict]:
    return [without_times(row) for row in metrics_of(out)]


@pytest.fixture(scope='module')
def digits() -> data.Dataset:
    """With their true labels."""
    return data.load('mnist5k')


@pytest.fixture(scope='module', params=['svd', 'dense'])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('finished') / request.param
    run(out, *options_of(out))
    return out


def options_of(finished: Path) -> tuple[str, ...]:
    return SPARSE if finished.name == 'svd' else DENSE


# --- Labels ---------------------------------------------------------------------------------------


def test_labels_are_uniform_and_independent_of_the_true_ones(digits: data.Dataset) -> None:
    drawn = random_labels.with_random_labels(digits, 0)
    for truth, labels in (
        (digits.train_labels, drawn.train_labels),
        (digits.test_labels, drawn.test_labels),
    ):
        assert (labels.dtype, labels.shape) == (truth.dtype, truth.shape)
        table = np.zeros((10, 10), int)
        np.add.at(table, (truth, labels), 1)
        assert stats.chisquare(table.sum(0)).pvalue > 0.01
        assert stats.chi2_contingency(table).pvalue > 0.01
    # Neither are those for testing a copy of the first ones for training.
    assert np.mean(drawn.test_labels == drawn.train_labels[: len(drawn.test_labels)]) < 0.2


def test_labels_are_a_function_of_their_seed(digits: data.Dataset) -> None:
    first, again, other = (random_labels.with_random_labels(digits, seed) for seed in (0, 0, 1))
    for field in ('train_labels', 'test_labels'):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
        assert 0.05 < np.mean(getattr(first, field) == getattr(other, field)) < 0.15
    assert other.train_images is digits.train_images
    assert other.test_images is digits.test_images


def test_labels_do_not_hang_on_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of several seeds learn the same labels, each as it would alone."""
    told: list[dict] = []
    monkeypatch.setattr(
        random_labels.loop, 'run_training', lambda make, options, facts: told.append(facts)
    )
    for options in ({}, {'seed': 5}, {'label_seed': 5}):
        random_labels.run(random_labels.Config(dataset='mnist5k', **options))
    assert told[0] == told[1]
    assert told[0]['examples'] != told[2]['examples']


def test_some_of_the_images(digits: data.Dataset) -> None:
    some = random_labels.first(digits, 7)
    np.testing.assert_array_equal(some.train_images, digits.train_images[:7])
    np.testing.assert_array_equal(some.train_labels, digits.train_labels[:7])
    assert some.test_images is digits.test_images
    for everything in (0, 4000):
        kept = random_labels.first(digits, everything)
        np.testing.assert_array_equal(kept.train_images, digits.train_images)
    with pytest.raises(UsageError, match='--images is for up to 4000 images of mnist5k'):
        random_labels.first(digits, 4001)


def test_a_run_learns_some_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[random_labels.MemoryTraining] = []
    monkeypatch.setattr(
        random_labels.loop, 'run_training', lambda make, *_: trainings.append(make())
    )
    random_labels.run(random_labels.Config(dataset='mnist5k', images=500, batch_size=100))
    (training,) = trainings
    assert (len(training.dataset.train_labels), training.steps) == (500, 5)


# --- Dropout --------------------------------------------------------------------------------------


def test_dropout_is_for_training_alone() -> None:
    """Of the hidden units, by NumPy: each is zero or scaled up."""
    model = random_labels.Memoriser(width=64, dropout=0.25)
    images = jax.random.normal(jax.random.key(0), (50, 28, 28, 1))
    params = model.init(jax.random.key(1), images)['params']
    params = {layer: {k: v for k, v in leaves.items() if k != 'log_sigma2'}
              for layer, leaves in params.items()}  # fmt: skip

    def hidden(deterministic: bool, seed: int = 2) -> list[np.ndarray]:
        """What the second and the third layer are given."""
        _, found = model.apply(
            {'params': params}, images, deterministic, rngs={'noise': jax.random.key(seed)},
            mutable='intermediates', capture_intermediates=True,
        )  # fmt: skip
        return [np.asarray(units) for units in found['intermediates']['Dropout_0']['__call__']]

    whole, dropped, other = hidden(True), hidden(False), hidden(False, seed=3)
    relu = np.maximum(np.asarray(images).reshape(50, -1) @ params['Dense_0']['kernel'], 0)
    np.testing.assert_allclose(whole[0], relu, atol=1e-4)
    alive = whole[0] > 0
    gone = alive & (dropped[0] == 0)
    assert abs(gone.sum() / alive.sum() - 0.25) < 0.05
    np.testing.assert_allclose(dropped[0][~gone], whole[0][~gone] / 0.75, rtol=1e-6)
    for a, b in zip(dropped, other, strict=True):
        assert np.any((a == 0) != (b == 0))
    # The second layer's units are dropped apart from those of the first.
    assert np.any((dropped[0] == 0)[whole[1] > 0] != (dropped[1] == 0)[whole[1] > 0])


def test_only_the_dense_network_has_dropout(digits: data.Dataset) -> None:
    """Training as a run does it, with the keys that it has."""
    images = jnp.asarray(digits.train_images[:8], jnp.float32) / 255
    for method, dropout, differ in (
        ('dense', 0.5, True), ('dense', 0.0, False), ('svd', 0.5, False),
    ):  # fmt: skip
        options = random_labels.Config(method=method, width=16, dropout=dropout)
        training = random_labels.make_training(options, digits)
        # Dense weights either way, so that nothing but dropout is random.
        params = training.dense_state().params
        a, b = (
            training._apply({'params': params}, images, {'noise': jax.random.key(seed)})[0]
            for seed in (0, 1)
        )
        assert np.any(a != b) == differ, (method, dropout)


# --- Runs -----------------------------------------------------------------------------------------


def sparse_of(params: dict, threshold: float) -> dict:
    """By NumPy: zeros where log(sigma^2 / weight^2) reaches the threshold."""
    left = {}
    for name, layer in params.items():
        kernel = layer['kernel'].astype(np.float64)
        if 'log_sigma2' in layer:
            with np.errstate(divide='ignore'):
                log_alpha = layer['log_sigma2'] - np.log(kernel**2)
            kernel = np.where(log_alpha < threshold, kernel, 0)
        left[name] = {'kernel': kernel, 'bias': layer['bias']}
    return left


def error(params: dict, images: np.ndarray, labels: np.ndarray, mean: np.ndarray) -> float:
    """Percent of wrong answers, without dropout."""
    x = (images / 255 - mean).reshape(len(images), -1)
    for name in ('Dense_0', 'Dense_1'):
        x = np.maximum(x @ params[name]['kernel'] + params[name]['bias'], 0)
    logits = x @ params['Dense_2']['kernel'] + params['Dense_2']['bias']
    return 100 * float(np.mean(np.argmax(logits, 1) != labels))


def test_errors_agree_with_numpy(finished: Path, digits: data.Dataset) -> None:
    summary, params = summary_of(finished), params_of(finished, 2)
    drawn = random_labels.with_random_labels(digits, 0)
    mean = drawn.train_images.mean(axis=0) / 255
    for end, threshold in (('', 3.0), ('_mean_weights', np.inf)):
        left = sparse_of(params, threshold)
        for split in ('train', 'test'):
            images, labels = getattr(drawn, f'{split}_images'), getattr(drawn, f'{split}_labels')
            # In float32 a tie may fall the other way.
            wanted = pytest.approx(error(left, images, labels, mean), abs=0.11)
            assert summary[f'{split}_error{end}'] == wanted, (split, end)
    last = metrics_of(finished)[-1]
    # There are fewer images than are followed: all of them are.
    assert last['train_error'] == summary['train_error']
    assert last['test_error'] == summary['test_error']


def test_the_summary_says_what_was_trained(finished: Path) -> None:
    summary = summary_of(finished)
    method = 'sparse_vd' if finished.name == 'svd' else 'dense'
    expected = {
        'experiment': 'random_labels', 'method': method, 'dataset': 'mnist5k', 'seed': 0,
        'epochs': 2, 'evaluated_on': 'test set', 'total': 784 * 32 + 32 * 32 + 32 * 10,
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    assert {'label_seed': 0, 'width': 32}.items() <= summary['config'].items()
    assert not {'validation', 'shift', 'flip'} & summary['config'].keys()
    left = sparse_of(params_of(finished, 2), 3.0)
    kept = sum(int(np.count_nonzero(layer['kernel'])) for layer in left.values())
    assert summary['nonzero'] == kept
    assert (kept < 0.9 * summary['total']) == (method == 'sparse_vd')
    assert kept > 0


@pytest.mark.parametrize('finished', ['dense'], indirect=True)
def test_an_interrupted_run_goes_on_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """In the second epoch, after its steps and before its row."""
    options = options_of(finished)
    with interrupted_in_the_second_epoch(), pytest.raises(SystemExit) as exit_:
        run(tmp_path / 'run', *options)
    assert exit_.value.code == 130
    assert len(metrics_of(tmp_path / 'run')) == 1
    summary = run(tmp_path / 'run', *options, '--resume')
    np.testing.assert_equal(params_of(tmp_path / 'run', 2), params_of(finished, 2))
    assert rows(tmp_path / 'run') == rows(finished)
    assert without_times(summary) == without_times(summary_of(finished))


@pytest.mark.parametrize('finished', ['dense'], indirect=True)
def test_no_run_goes_on_with_other_labels(
    finished: Path, digits: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Neither with another seed of theirs, nor if NumPy came to draw others from the same."""
    out, options = tmp_path / 'run', options_of(finished)
    shutil.copytree(finished, out)
    before = fingerprint(*random_labels.with_random_labels(digits, 0)[1:])
    other = random_labels.with_random_labels(digits, 1)
    assert f'"examples": "{before}"' in (out / 'run.json').read_text()
    with pytest.raises(SystemExit) as exit_:
        run(out, *options, '--resume', '--label-seed', '1')
    assert exit_.value.code == 2
    monkeypatch.setattr(random_labels, 'with_random_labels', lambda *_: other)
    with pytest.raises(SystemExit) as exit_:
        run(out, *options, '--resume')
    assert exit_.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    for line in (first, second):
        assert f'holds a run with examples {before}, not {fingerprint(*other[1:])}' in line


def test_without_a_weight_left_it_predicts_a_constant(
    tmp_path: Path, digits: data.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'run'
    summary = run(out, *STRONG, '--epochs', '8')
    assert (summary['nonzero'], summary['compression']) == (0, None)
    assert set(summary['sparsity_per_layer'].values()) == {100.0}
    assert 'no weights left' in capsys.readouterr().out
    drawn = random_labels.with_random_labels(digits, 0)
    constant = int(np.argmax(params_of(out)['Dense_2']['bias']))
    for split in ('train', 'test'):
        others = np.mean(getattr(drawn, f'{split}_labels') != constant)
        assert summary[f'{split}_error'] == pytest.approx(100 * others)


def test_dropout_learns_by_heart(tmp_path: Path) -> None:
    """What it has learned says nothing about other images."""
    options = ('--method', 'dense', '--width', '256', '--batch-size', '50', '--epochs', '15')
    summary = run(tmp_path / 'run', *options)
    assert summary['train_error'] < 50
    assert summary['test_error'] > 80


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    """Images of CIFAR's shape, and of the VGG-like network its first stage alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (150, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(10, size=150, dtype=np.int32)
    dataset = data.Dataset('cifar10', images[:100], labels[:100], images[100:], labels[100:])
    first_stage = partial(models.VGGLike, stages=models.VGGLike.stages[:1])
    monkeypatch.setattr(models, 'VGGLike', first_stage)
    monkeypatch.setattr(random_labels.data, 'load', lambda *_: dataset)
    return dataset


VGG = ('--dataset', 'cifar10', '--k', '0.0625', '--batch-size', '50')


def test_on_cifar_the_vgg_like_network_learns_by_heart(
    tmp_path: Path, colours: data.Dataset
) -> None:
    options = (*VGG, '--method', 'dense', '--epochs', '12', '--learning-rate', '0.005')
    out = tmp_path / 'run'
    summary = run(out, *options)
    assert {'Conv_0', 'Conv_1', 'BatchNorm_0', 'Dense_0', 'Dense_1'} < set(params_of(out))
    assert summary['train_error'] < 10
    assert summary['test_error'] > 75


def test_on_cifar_sparse_vd_drops_every_weight(tmp_path: Path, colours: data.Dataset) -> None:
    summary = run(tmp_path / 'run', *VGG, *STRONG, '--epochs', '20')
    assert summary['nonzero'] == 0
    drawn = random_labels.with_random_labels(colours, 0)
    bias = params_of(tmp_path / 'run')['Dense_1']['bias']
    others = np.mean(drawn.train_labels != np.argmax(bias))
    assert summary['train_error'] == pytest.approx(100 * others)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'k': 0.001}, '--k must be above 1/128'),
        ({'label_seed': -1}, '--label-seed must lie between 0 and'),
        ({'width': 0}, '--width must be at least 1'),
        ({'width': 6.5}, '--width must be a whole number'),
        ({'dropout': 1.0}, '--dropout must be at least 0 and below 1'),
        ({'dropout': float('nan')}, '--dropout must be a finite number'),
        ({'epochs': 0}, '--epochs must be at least 1'),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(random_labels.DEFAULTS, **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--dropout', '1.5'), '--dropout must be at least 0 and below 1'),
        (('--batch-size', '5000'), 'batch size 5000 does not fit'),
        (('--dataset', 'svhn'), "unknown dataset 'svhn'"),
    ],
)
def test_bad_input_is_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ('--dataset', 'mnist5k', '--out', str(tmp_path / 'out'), *options)
    assert message in refused(capfd, random_labels, *given)
