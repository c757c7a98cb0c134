"""experiments.vgg: batch statistics and dropout where they belong, and errors of plain Flax."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import svd_jax as svd
from experiments import data, vgg
from experiments.errors import UsageError
from experiments.models import VGGLike
from run_folders import (
    interrupted_in_the_second_epoch,
    main,
    metrics_of,
    state_of,
    summary_of,
    without_times,
)

LOAD = data.load  # before a fixture takes its place
TRAIN, TEST, HELD_OUT, FILTERS = 240, 120, 40, 4
SHORT = (
    '--k', str(FILTERS / 64), '--batch-size', '40', '--epochs', '2', '--checkpoint-seconds', '0',
    '--learning-rate', '0.01',
)  # fmt: skip
HOLD_OUT = ('--validation', str(HELD_OUT))
# So that two epochs drop some weights and keep others.
SPARSE = (*HOLD_OUT, '--warmup', '0', '1', '--log-sigma2-init', '-4', '--kl-weight', '0.1')


def coloured(seed: int) -> data.Dataset:
    """Noise whose colour and brightest row go with the label.

    The images for testing are of two of the labels: their own statistics are others.
    """
    rng = np.random.default_rng(seed)
    arrays: list[np.ndarray] = []
    for count, classes in ((TRAIN, 10), (TEST, 2)):
        labels = rng.integers(classes, size=count, dtype=np.int32)
        images = rng.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
        images[..., 0] += (12 * labels).astype(np.uint8)[:, None, None]
        images[np.arange(count), 3 * labels] += 100
        arrays += [images, labels]
    return data.Dataset('cifar10', *arrays)


@pytest.fixture(scope='module', autouse=True)
def small(
    quick_compilation: None, compiled_once: None, no_pictures: Callable[..., None]
) -> Iterator[data.Dataset]:
    """A few images, and only the first stage of the network, which compiles in seconds."""
    dataset = coloured(0)
    first_stage = partial(VGGLike, stages=VGGLike.stages[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg.models, 'VGGLike', first_stage)
        patch.setattr(vgg.data, 'load', lambda *_: dataset)
        yield dataset


def run(out: Path, *options: str) -> dict[str, Any]:
    main(vgg, *SHORT, '--out', str(out), *options)
    return summary_of(out)


@pytest.fixture(scope='module')
def dense(tmp_path_factory: pytest.TempPathFactory, no_pictures: Callable[..., None]) -> Path:
    """Of two seeds, with their pictures."""
    out = tmp_path_factory.mktemp('dense') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('experiments.pictures.write_all', no_pictures)
        run(out, '--method', 'dense', '--seeds', '2')
    return out


@pytest.fixture(scope='module')
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('sparse')
    run(folder / 'dense', *HOLD_OUT, '--method', 'dense')
    run(folder / 'run', *SPARSE, '--pretrained', str(folder / 'dense'))
    return folder / 'run'


# --- Plain Flax, as a reference -------------------------------------------------------------------


class Plain(nn.Module):
    """The first stage and the dense layers."""

    averages: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def normalised(x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=self.averages, momentum=0.9)(x))

        x = normalised(nn.Conv(FILTERS, (3, 3))(x))
        x = normalised(nn.Conv(FILTERS, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        x = normalised(nn.Dense(8 * FILTERS)(x))
        return nn.Dense(10)(x)


def variables_of(out: Path, threshold: float = np.inf) -> dict[str, Any]:
    """Of the last checkpoint, without the weights whose log alpha reaches the threshold."""
    state, params = state_of(out), {}
    for name, layer in state['params'].items():
        params[name] = {k: v for k, v in layer.items() if k != 'log_sigma2'}
        if 'log_sigma2' in layer:
            with np.errstate(divide='ignore'):
                log_alpha = layer['log_sigma2'] - np.log(layer['kernel'].astype(np.float64) ** 2)
            params[name]['kernel'] = np.where(log_alpha < threshold, layer['kernel'], 0)
    return {'params': params, 'batch_stats': state['collections']['batch_stats']}


def normalised(images: np.ndarray, train_images: np.ndarray) -> np.ndarray:
    pixels = train_images.reshape(-1, 3) / 255
    return ((images / 255 - pixels.mean(0)) / pixels.std(0)).astype(np.float32)


def percent_wrong(logits: jax.Array, labels: np.ndarray) -> float:
    return 100 * float(np.mean(np.argmax(logits, 1) != labels))


# --- Runs -----------------------------------------------------------------------------------------


def test_evaluation_uses_the_running_averages(dense: Path, small: data.Dataset) -> None:
    images = normalised(small.test_images, small.train_images)
    for seed in ('seed0', 'seed1'):
        variables = variables_of(dense / seed)
        logits = Plain().apply(variables, images)
        wanted = percent_wrong(logits, small.test_labels)
        # In float32 a tie may fall the other way.
        assert summary_of(dense / seed)['test_error'] == pytest.approx(wanted, abs=100 / TEST)
        assert metrics_of(dense / seed)[-1]['test_error'] == summary_of(dense / seed)['test_error']
        others, _ = Plain(averages=False).apply(variables, images, mutable=['batch_stats'])
        # Which tells them from the statistics of the batch.
        assert abs(percent_wrong(others, small.test_labels) - wanted) > 2 * 100 / TEST


def test_batch_statistics_are_trained_by_seed(dense: Path) -> None:
    first, second = (
        state_of(dense / seed)['collections']['batch_stats'] for seed in ('seed0', 'seed1')
    )
    assert sorted(first) == ['BatchNorm_0', 'BatchNorm_1', 'BatchNorm_2']
    for name, statistics in first.items():
        assert np.all(statistics['mean'] != 0), name
        assert np.all(statistics['var'] != 1), name
        assert np.all(statistics['mean'] != second[name]['mean']), name


@pytest.mark.default_kernels
def test_interrupted_alone_it_ends_with_the_same_bits(
    dense: Path, tmp_path: Path, no_pictures: Callable[..., None]
) -> None:
    """In the second epoch, after its steps; beside another seed it was not interrupted."""
    out, options = tmp_path / 'run', ('--method', 'dense', '--seed', '1')
    with interrupted_in_the_second_epoch(), pytest.raises(SystemExit):
        run(out, *options)
    assert len(metrics_of(out)) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('experiments.pictures.write_all', no_pictures)
        summary = run(out, *options, '--resume')
    np.testing.assert_equal(state_of(out), state_of(dense / 'seed1'))
    assert without_times(summary) == without_times(summary_of(dense / 'seed1'))
    for file in ('curves.png', 'weights.png', 'weights.gif'):
        for folder in (out, dense / 'seed0', dense / 'seed1'):
            assert (folder / 'pictures' / file).stat().st_size > 0


def test_sparse_vd_starts_from_the_dense_network_and_its_statistics(
    dense: Path, tmp_path: Path, small: data.Dataset
) -> None:
    """One step on all images with next to no noise, and a learning rate of nothing."""
    run(
        tmp_path / 'run', '--pretrained', str(dense / 'seed1'), '--epochs', '1',
        '--batch-size', str(TRAIN), '--learning-rate', '1e-30', '--log-sigma2-init', '-40',
        '--shift', '0', '--no-flip',
    )  # fmt: skip
    start, found = variables_of(dense / 'seed1'), variables_of(tmp_path / 'run')
    np.testing.assert_equal(found['params'], start['params'])
    images = normalised(small.train_images, small.train_images)
    _, wanted = Plain(averages=False).apply(start, images, mutable=['batch_stats'])
    assert jax.tree.structure(wanted) == jax.tree.structure({'batch_stats': found['batch_stats']})
    for name, statistics in wanted['batch_stats'].items():
        for moment, values in statistics.items():
            np.testing.assert_allclose(found['batch_stats'][name][moment], values, rtol=1e-3,
                                       atol=1e-4)  # fmt: skip
            moved = np.abs(start['batch_stats'][name][moment] - values)
            assert np.max(moved) > 1e-3, (name, moment)


def test_the_sparse_network_is_evaluated_and_shipped(sparse: Path, small: data.Dataset) -> None:
    summary, split = summary_of(sparse), data.validation_split(small, HELD_OUT)
    assert summary['evaluated_on'] == f'{HELD_OUT} held out'
    assert {'k': FILTERS / 64, 'flip': True, 'shift': 4}.items() <= summary['config'].items()
    left = variables_of(sparse, 3.0)
    kernels = [layer['kernel'] for layer in left['params'].values() if 'kernel' in layer]
    kept = sum(map(np.count_nonzero, kernels))
    assert summary['total'] == sum(kernel.size for kernel in kernels)
    assert summary['nonzero'] == kept
    assert 0.05 < kept / summary['total'] < 0.95
    images = normalised(split.test_images, split.train_images)
    shipped = svd.load(sparse / 'model.svd')
    for end, variables in (
        ('', left), ('', shipped), ('_mean_weights', variables_of(sparse)),
    ):  # fmt: skip
        wanted = percent_wrong(Plain().apply(variables, images), split.test_labels)
        assert summary[f'test_error{end}'] == pytest.approx(wanted, abs=100 / HELD_OUT)


def test_units_go_as_it_trains_and_is_fine_tuned(small: data.Dataset) -> None:
    options = vgg.Config(
        k=FILTERS / 64, batch_size=40, epochs=1, fine_tune=1, learning_rate=0.02, groups='units',
        shrink=1.1,
    )  # fmt: skip
    training = vgg.VGGTraining(vgg.network(options.k, options.dropout), options, small)
    state = training.init()
    params = state.params
    assert [name for name in params if 'groups' in params[name]] == ['Conv_1', 'Dense_0', 'Dense_1']
    # A filter of each convolution, and two neurons.
    dead = {'Conv_1': [2], 'Dense_0': range(1, 16 * 16 * FILTERS, FILTERS), 'Dense_1': [0, 5]}
    for name, units in dead.items():
        scales = params[name]['groups']['inputs']
        flat = scales['log_sigma2'].reshape(-1).at[np.asarray(units)].set(6.0)
        scales['log_sigma2'] = flat.reshape(scales['log_sigma2'].shape)
    before = jax.device_get(state)
    images = normalised(small.test_images, small.train_images)
    for epoch in (1, 2):
        state, (row,) = training.epoch(state, epoch, lambda done: None)
        for name, units in dead.items():
            gone = state.params[name]['groups']['inputs']['scale'].reshape(-1) == 0
            np.testing.assert_array_equal(np.flatnonzero(gone), units)
        statistics = state.collections['batch_stats']['BatchNorm_0']['mean']
        moved = statistics != before.collections['batch_stats']['BatchNorm_0']['mean']
        np.testing.assert_array_equal(moved, np.arange(FILTERS) != 2)
        left = svd.sparsify(state.params, options.thresholds)
        logits = Plain().apply({**state.collections, 'params': left}, images)
        wanted = percent_wrong(logits, small.test_labels)
        assert row['test_error'] == pytest.approx(wanted, abs=100 / TEST)


# --- Dropout --------------------------------------------------------------------------------------


def test_dropout_is_where_the_authors_have_it() -> None:
    """Of the whole network, from what each layer gives in training.

    Layer by layer: in one program XLA may round what it fuses otherwise than what it returns.
    """
    rates = {0: 0.3, 2: 0.4, 4: 0.4, 5: 0.4, 7: 0.4, 8: 0.4, 10: 0.4, 11: 0.4, 13: 0.5}
    model = VGGLike(width=1 / 8, dropout=1.0)
    images = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(1), images[:1]),
    )
    variables['params'] = svd.sparsify(variables['params'], np.inf)
    with svd.backend.override('accelerator'):  # which compiles sooner
        _, found = model.apply(
            variables, images, rngs={'noise': jax.random.key(2)},
            mutable=['batch_stats', 'intermediates'], capture_intermediates=True,
        )  # fmt: skip
    layers = {k: v['__call__'][0] for k, v in found['intermediates'].items() if '__call__' in v}
    given = {k: np.asarray(v) for k, v in layers.items() if k.startswith(('BatchNorm', 'Dropout'))}
    assert sum(name.startswith('Dropout') for name in given) == len(rates)
    for i, (at, rate) in enumerate(rates.items()):
        whole, left = np.maximum(given[f'BatchNorm_{at}'], 0), given[f'Dropout_{i}']
        gone = (left == 0) & (whole > 0)
        assert abs(gone.sum() / np.sum(whole > 0) - rate) < 0.06, at
        np.testing.assert_allclose(left[~gone], whole[~gone] / (1 - rate), rtol=1e-5)


def test_only_dense_networks_are_trained_with_dropout(small: data.Dataset) -> None:
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    dense: Any = None
    for method, dropout, differ in (
        ('dense', 1.0, True), ('dense', 0.0, False), ('svd', 1.0, False),
    ):  # fmt: skip
        options = vgg.Config(method=method, k=FILTERS / 64, dropout=dropout)
        training = vgg.VGGTraining(vgg.network(options.k, options.dropout), options, small)
        # Dense weights in each, so that nothing but dropout is random.
        dense = dense or training.dense_state().variables
        a, b = (
            training._apply(
                dense, images, {'noise': jax.random.key(seed)}, mutable=['batch_stats']
            )[0][0]
            for seed in (0, 1)
        )
        assert bool(jnp.any(a != b)) == differ, (method, dropout)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'k': 0.0}, '--k must be above 1/128'),
        ({'k': -0.25}, '--k must be above 1/128'),
        ({'k': float('nan')}, '--k must be a finite number'),
        ({'dropout': 2.0}, '--dropout must be at least 0 and below 2'),
        ({'dataset': 'mnist'}, '--dataset must be one of'),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(vgg.DEFAULTS, **options)


def test_the_narrowest_network_has_a_filter_in_each_layer() -> None:
    vgg.Config(k=1 / 127)
    shapes = jax.eval_shape(
        VGGLike(width=1 / 127).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    kernels = [weight.values.shape for weight in svd.tree.weights(shapes['params'])]
    assert len(kernels) == 15
    assert all(min(shape) >= 1 for shape in kernels)


def test_images_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg.data, 'load', LOAD)
        with pytest.raises(SystemExit) as exit_:
            main(
                vgg,
                '--dataset',
                'cifar100',
                '--data-dir',
                str(tmp_path),
                '--out',
                str(tmp_path / 'out'),
            )
    assert exit_.value.code == 2
    assert f'error: cifar100 not found in {tmp_path}' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_an_average_of_weights_has_no_batch_statistics(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path / 'out', '--average', '0.9')
    assert exit_.value.code == 2
    assert not any((tmp_path / 'out').iterdir())
