"""experiments.training: networks trained at once, or on streamed images, end as they should."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd
from experiments import averaging, data, lenet300, models
from experiments.config import Config
from experiments.errors import UsageError
from experiments.training import Training
from run_folders import main, metrics_of, params_of, summary_of, without_times

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once', 'no_pictures')
SHORT = ('--dataset', 'mnist5k', '--batch-size', '1000', '--checkpoint-seconds', '0')


def run(out: Path, *options: str) -> dict:
    main(lenet300, *SHORT, '--out', str(out), *options)
    return summary_of(out)


def rows(out: Path) -> list[dict]:
    return [without_times(row) for row in metrics_of(out)]


@pytest.fixture(scope='module')
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds times two KL weights, two epochs."""
    out = tmp_path_factory.mktemp('four') / 'out'
    run(out, '--epochs', '2', '--seeds', '2', '--seed', '3', '--kl-weight', '1', '20')
    return out


@pytest.fixture(scope='module')
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network, one epoch, every option as it is by default."""
    out = tmp_path_factory.mktemp('plain') / 'out'
    run(out, '--epochs', '1')
    return out


NAMES = ['seed3-kl1', 'seed3-kl20', 'seed4-kl1', 'seed4-kl20']


def test_on_a_cpu_each_ends_with_the_same_bits_as_alone(four: Path, tmp_path: Path) -> None:
    if not svd.backend.as_on_cpu():
        pytest.skip('side by side, sums are taken in another order')
    summary = run(tmp_path / 'alone', '--epochs', '2', '--seed', '4', '--kl-weight', '20')
    np.testing.assert_equal(params_of(four / 'seed4-kl20', 2), params_of(tmp_path / 'alone', 2))
    together = summary_of(four / 'seed4-kl20')
    assert without_times(together) == without_times(summary)
    assert rows(four / 'seed4-kl20') == rows(tmp_path / 'alone')
    for file in ('run.json', 'frames', 'model.svd', 'tensorboard'):
        assert (four / 'seed4-kl20' / file).exists() == (tmp_path / 'alone' / file).exists()


def test_side_by_side_each_ends_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(svd.backend.VARIABLE, 'accelerator')
    # JAX's check counts the keys as used when vmap moves their axis to the front for the scan.
    with jax.debug_key_reuse(False):
        run(tmp_path / 'both', '--epochs', '1', '--seeds', '2')
    run(tmp_path / 'alone', '--epochs', '1', '--seed', '1')
    found, wanted = (params_of(tmp_path / name, 1) for name in ('both/seed1', 'alone'))
    start = params_of(tmp_path / 'both/seed0', 1)
    for layer, arrays in wanted.items():
        for name, array in arrays.items():
            # Where a gradient is all but zero, Adam makes a step of the last bit of it.
            distance = np.mean(np.abs(found[layer][name] - array))
            assert distance < 1e-6, (layer, name)
            assert name == 'log_sigma2' or np.mean(np.abs(start[layer][name] - array)) > 1e-4


def test_networks_differ_by_seed_and_kl_weight(four: Path) -> None:
    assert sorted(path.parent.name for path in four.glob('*/summary.json')) == NAMES
    kernels = [params_of(four / name, 2)['Dense_1']['kernel'] for name in NAMES]
    for i in range(4):
        for j in range(i):
            assert np.any(kernels[i] != kernels[j]), (i, j)
    kl_weights = [rows(four / name)[-1]['kl_weight'] for name in NAMES]
    np.testing.assert_allclose(kl_weights[1], 20 * kl_weights[0], rtol=1e-6)


def test_the_summary_holds_means_and_deviations(four: Path) -> None:
    summary = summary_of(four)
    each = [summary_of(four / name) for name in NAMES]
    for field in ('test_error', 'compression', 'nonzero'):
        values = [own[field] for own in each]
        np.testing.assert_allclose(summary[field], np.mean(values))
        np.testing.assert_allclose(summary[f'{field}_sd'], np.std(values, ddof=1))
    layers = [own['sparsity_per_layer']['Dense_0'] for own in each]
    np.testing.assert_allclose(summary['sparsity_per_layer']['Dense_0'], np.mean(layers))
    assert list(summary['networks']) == NAMES
    assert [own['seed'] for own in summary['networks'].values()] == [3, 3, 4, 4]
    assert (summary['experiment'], summary['seed'], summary['epochs']) == ('lenet300', 3, 2)
    assert summary['config']['seeds'] == 2
    shown = rows(four)
    losses = [rows(four / name)[-1]['loss'] for name in NAMES]
    np.testing.assert_allclose(shown[-1]['loss'], np.mean(losses))


@pytest.mark.parametrize(('cycles', 'decay_from'), [(1, 0.0), (1, 0.5), (2, 0.0), (3, 0.5)])
def test_the_learning_rate_falls_once_in_every_cycle(cycles: int, decay_from: float) -> None:
    """What the optimiser's steps measure: of a constant gradient, Adam makes steps of this size."""
    config = Config(
        epochs=4, batch_size=1000, learning_rate=0.5, cycles=cycles, decay_from=decay_from
    )
    training = Training(models.LeNet300, config, data.load('mnist5k'))
    params = {'Dense_0': {'kernel': jnp.zeros(1)}}
    state, sizes = training.tx.init(params), []
    for _ in range(config.epochs * training.steps):
        updates, state = training.tx.update(jax.tree.map(jnp.ones_like, params), state)
        sizes.append(-updates['Dense_0']['kernel'].item())
    # 16 steps: cycles of 16, 8 or 6, the last of these cut short.
    length = {1: 16, 2: 8, 3: 6}[cycles]
    done = np.arange(16) % length / length
    wanted = 0.5 * np.minimum(1, (1 - done) / (1 - decay_from))
    np.testing.assert_allclose(sizes, wanted, rtol=1e-3)
    reported = [training.learning_rate(epoch) for epoch in (1, 2, 3, 4)]
    np.testing.assert_allclose(reported, wanted[::4], rtol=1e-6)


def test_resumed_they_end_with_the_same_bits(four: Path, tmp_path: Path) -> None:
    """As if killed after the first epoch's checkpoint, with the second epoch half reported."""
    out = shutil.copytree(four, tmp_path / 'killed')
    shutil.rmtree(out / 'checkpoints' / '2')
    shutil.rmtree(out / 'seed3-kl20')
    (out / 'summary.json').unlink()
    options = ('--epochs', '2', '--seeds', '2', '--seed', '3', '--kl-weight', '1', '20')
    with pytest.raises(SystemExit):
        run(out, *options)
    run(out, *options, '--resume')
    for name in NAMES:
        np.testing.assert_equal(params_of(out / name, 2), params_of(four / name, 2))
    assert rows(out) == rows(four)
    assert rows(out / 'seed4-kl1') == rows(four / 'seed4-kl1')


def test_one_of_several_dense_networks_is_a_start(tmp_path: Path) -> None:
    dense = tmp_path / 'dense'
    run(dense, '--epochs', '1', '--method', 'dense', '--seeds', '2')
    start = ('--pretrained', str(dense / 'seed1'), '--log-sigma2-rate', '3')
    options = ('--epochs', '1', '--learning-rate', '1e-30', *start)
    run(tmp_path / 'sparse', *options)
    found = params_of(tmp_path / 'sparse', 1)['Dense_0']['kernel']
    np.testing.assert_array_equal(found, params_of(dense / 'seed1', 1)['Dense_0']['kernel'])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'seeds': 0}, '--seeds must be at least 1'),
        ({'seeds': 2, 'seed': 2**32 - 1}, '--seed must lie between'),
        ({'shift': -1}, '--shift must be at least 0'),
        ({'kl_weight': ()}, '--kl-weight needs one weight or several different ones'),
        ({'kl_weight': (1.0, 1.0)}, '--kl-weight needs one weight or several different ones'),
        ({'kl_weight': (-1.0,)}, '--kl-weight must be at least 0'),
        ({'kl_weight': (float('nan'),)}, '--kl-weight needs finite numbers'),
        ({'kl_weight': (2.0,), 'method': 'dense'}, '--kl-weight is for --method svd'),
        ({'fine_tune': -1}, '--fine-tune must be at least 0'),
        ({'distil': 1.5, 'fine_tune': 1, 'pretrained': Path('dense')}, '--distil must lie between'),
        ({'distil': 0.5, 'fine_tune': 1}, '--distil needs --fine-tune and the dense network of'),
        ({'distil': 0.5, 'pretrained': Path('dense')}, '--distil needs --fine-tune and'),
        ({'group_threshold': 0.0}, '--group-threshold is for --groups units'),
        ({'average': 1.0}, '--average must be at least 0 and below 1'),
        ({'average': 0.9, 'method': 'dense'}, '--average is for --method svd'),
        ({'fine_tune': 1, 'method': 'dense'}, '--fine-tune is for --method svd'),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**options)


def test_labels_that_the_network_has_no_output_for() -> None:
    dataset = data.load('mnist5k')
    more = dataset._replace(train_labels=dataset.train_labels + 1)
    with pytest.raises(UsageError, match=r'mnist5k has 11 classes, this network 10: .*--dataset'):
        Training(models.LeNet300, Config(), more)


def test_it_starts_with_what_flax_initialises() -> None:
    """Flax runs the network for that, a training doesn't."""
    training = Training(models.LeNet5, Config(seed=3), data.load('mnist5k'))
    key, _ = jax.random.split(jax.random.key(3))
    wanted = models.LeNet5().init(key, jnp.zeros((1, 28, 28, 1)))['params']
    jax.tree.map(np.testing.assert_array_equal, training.init().params, wanted)


def test_several_networks_without_a_weight_left(tmp_path: Path) -> None:
    summary = run(tmp_path / 'out', '--epochs', '1', '--seeds', '2', '--threshold', '-20')
    assert (summary['compression'], summary['nonzero']) == (None, 0)


def test_an_average_can_start_again() -> None:
    tx = optax.chain(optax.sgd(1.0), averaging.average(0.75))
    state = svd.TrainState.create({'params': {'kernel': jnp.zeros(2)}}, tx)
    _, opt_state = tx.update({'kernel': jnp.ones(2)}, state.opt_state, state.params)
    moved = state.replace(params={'kernel': -jnp.ones(2)}, opt_state=opt_state)
    for found, wanted in ((moved, -0.25), (averaging.restarted(moved), -1.0)):
        np.testing.assert_array_equal(averaging.averaged(found).params['kernel'], wanted)


@pytest.mark.default_kernels
def test_streamed_images_give_the_same_bits(plain: Path, tmp_path: Path) -> None:
    options = ('--epochs', '1', '--shift', '2', '--flip')
    run(tmp_path / 'streamed', *options, '--stream', 'yes')
    run(tmp_path / 'resident', *options, '--stream', 'no')
    found, wanted = (params_of(tmp_path / name, 1) for name in ('streamed', 'resident'))
    np.testing.assert_equal(found, wanted)
    unchanged = params_of(plain, 1)['Dense_0']['kernel']
    assert np.mean(unchanged != wanted['Dense_0']['kernel']) > 0.5  # the images were changed


def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32(
    plain: Path, tmp_path: Path
) -> None:
    run(tmp_path / 'half', '--epochs', '1', '--dtype', 'bfloat16')
    half, full = (params_of(out, 1)['Dense_0'] for out in (tmp_path / 'half', plain))
    for name, array in full.items():
        assert half[name].dtype == array.dtype == np.float32
        distance = np.mean(np.abs(half[name] - array)) / np.mean(np.abs(array))
        assert 0 < distance < 0.02, name


@pytest.fixture(scope='module')
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('dense') / 'run'
    run(out, '--method', 'dense', '--epochs', '1')
    return out


@pytest.mark.parametrize(('share', 'decay'), [(0.0, 0.0), (0.5, 0.5)])
def test_fine_tuning_trains_what_is_left_by_plain_adam(
    tmp_path: Path, dense: Path, share: float, decay: float
) -> None:
    """On the labels; or also on the predictions of the dense network, and averaged."""
    out = tmp_path / 'out'
    # In so few epochs only noisy weights are dropped.
    fine_tune = (
        '--fine-tune', '1', '--pretrained', str(dense), '--distil', str(share),
        '--average', str(decay),
    )  # fmt: skip
    run(out, '--epochs', '2', '--log-sigma2-init', '-5', *fine_tune)
    before, after, teacher = params_of(out, 2), params_of(out, 3), params_of(dense, 1)
    dataset = data.load('mnist5k')
    images = dataset.train_images.astype(np.float32).reshape(len(dataset.train_labels), -1) / 255
    images -= images.mean(0)
    steps = len(images) // 1000

    def left(params: dict) -> dict:
        """A kernel's entries where log alpha is below 3."""
        dropped = {
            k: v['log_sigma2'] - 2 * jnp.log(jnp.abs(v['kernel'])) for k, v in params.items()
        }
        return {k: jnp.where(dropped[k] < 3, v['kernel'], 0) for k, v in params.items()}

    def logits(params: dict, kernels: dict, x: np.ndarray) -> jax.Array:
        for name, kernel in kernels.items():
            x = x @ kernel + params[name]['bias'][None]
            x = x if name == 'Dense_2' else jax.nn.relu(x)
        return x

    def loss(params: dict, x: np.ndarray, y: np.ndarray) -> jax.Array:
        ours = logits(params, left(params), x)
        theirs = logits(teacher, {k: v['kernel'] for k, v in teacher.items()}, x)
        hard = optax.softmax_cross_entropy_with_integer_labels(ours, y).mean()
        # Cross-entropy in place of the KL divergence: the same gradient.
        soft = optax.softmax_cross_entropy(ours / 4, jax.nn.softmax(theirs / 4)).mean()
        return (1 - share) * hard + share * 16 * soft

    tx = optax.adam(lambda step: 1e-3 * (1 - step / steps), eps=1e-8 / len(images))
    params, state, average = before, tx.init(before), before
    for batch in data.epoch_permutation(0, 3, len(images), 1000):
        gradient = jax.grad(loss)(params, images[batch], dataset.train_labels[batch])
        updates, state = tx.update(gradient, state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    for name, kernel in left(before).items():
        assert 0.01 < np.mean(kernel != 0) < 0.99
        np.testing.assert_array_equal(after[name]['log_sigma2'], before[name]['log_sigma2'])
        moved = np.abs(params[name]['kernel'] - before[name]['kernel'])
        assert moved.max() > 1e-3
        assert not np.any(moved[kernel == 0])
        # Rounding decides which way Adam goes where there is next to no gradient.
        distance = np.abs(after[name]['kernel'] - average[name]['kernel'])
        assert np.mean(distance) < 0.01 * np.mean(moved)
    assert [row['kl_weight'] == 0 for row in metrics_of(out)] == [False, False, True]
    summary = summary_of(out)
    assert summary['epochs'] == 2
    options = [summary['config'][name] for name in ('fine_tune', 'distil', 'average')]
    assert options == [1, share, decay]


def test_stopped_before_fine_tuning_it_ends_with_the_same_bits(tmp_path: Path, dense: Path) -> None:
    options = (
        '--epochs', '1', '--fine-tune', '1', '--seeds', '2',
        '--pretrained', str(dense), '--distil', '1', '--average', '0.5',
    )  # fmt: skip
    run(tmp_path / 'whole', *options)
    out = shutil.copytree(tmp_path / 'whole', tmp_path / 'stopped')
    shutil.rmtree(out / 'checkpoints' / '2')
    for name in ('seed0', 'seed1'):
        shutil.rmtree(out / name)
    run(out, *options, '--resume')
    for name in ('seed0', 'seed1'):
        whole = params_of(tmp_path / 'whole' / name, 2)
        np.testing.assert_equal(params_of(out / name, 2), whole)
