"""svd_jax.train: the bound, and the step that maximises it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')
NUM_DATA = 50
MODEL = svd.linen.Dense(3, log_sigma2_init=-2.0)


class WithBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> Any:
        x, kl = svd.linen.Dense(4, log_sigma2_init=-3.0)(x, deterministic)
        x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(x))
        x, more = svd.linen.Dense(3)(x, deterministic)
        return x, kl + more


def batch(size: int = 8, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, 5)), jnp.float32)
    return x, jnp.asarray(np.argmax(x[:, :3], axis=1))


def start(tx: optax.GradientTransformation, model: nn.Module = MODEL) -> svd.TrainState:
    return svd.TrainState.create(jax.jit(model.init)(jax.random.key(0), batch()[0]), tx)


def copy(tree: Any) -> Any:
    """On the host: steps delete the buffers of the state that they are given."""
    return jax.tree.map(np.array, tree)


def assert_trees_equal(found: Any, wanted: Any, **tolerance: float) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **{'rtol': 0, **tolerance})


def test_elbo_loss_divides_the_kl_once_by_the_data() -> None:
    assert float(svd.elbo_loss(jnp.asarray(2.0), jnp.asarray(600.0), 100)) == 8.0
    assert float(svd.elbo_loss(jnp.asarray(2.0), jnp.asarray(600.0), 100, 0.5)) == 5.0


@pytest.mark.parametrize(
    ('begin', 'end', 'steps', 'weights'),
    [
        (10, 20, [0, 9, 10, 11, 15, 19, 20, 21, 10**6], [0, 0, 0, 0.1, 0.5, 0.9, 1, 1, 1]),
        (0, 4, [0, 1, 2, 4, 5], [0, 0.25, 0.5, 1, 1]),
        (5, 5, [0, 4, 5, 6], [0, 0, 1, 1]),
        (0, 0, [0, 1], [1, 1]),
    ],
)
def test_kl_warmup(begin: int, end: int, steps: list[int], weights: list[float]) -> None:
    schedule = svd.kl_warmup(begin, end)
    np.testing.assert_allclose([schedule(step) for step in steps], weights, rtol=1e-6)
    traced = jax.jit(jax.vmap(schedule))(jnp.asarray(steps))
    np.testing.assert_allclose(traced, weights, rtol=1e-6)


@pytest.mark.parametrize(('begin', 'end'), [(5, 4), (-1, 4), (-2, -1)])
def test_kl_warmup_refuses_what_goes_backwards(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf'begin={begin}, end={end}'):
        svd.kl_warmup(begin, end)


@pytest.mark.parametrize(
    ('arguments', 'begin', 'end'),
    [
        ((60_000, 100, 200), 3_000, 12_000),  # 600 steps an epoch: epochs 5 to 20
        ((60_000, 100, 20), 1_200, 9_000),  # a tenth and three quarters
        ((1_050, 100, 30), 30, 200),  # ten whole batches
        ((1_000, 100, 1), 1, 8),  # 7.5 rounds to even
        ((1_000, 100, 20, (1.0, 2.5)), 10, 25),
        ((10, 10, 0.5), 0, 0),
    ],
)
def test_kl_warmup_for_turns_epochs_into_steps(arguments, begin: int, end: int) -> None:
    schedule, wanted = svd.kl_warmup_for(*arguments), svd.kl_warmup(begin, end)
    steps = jnp.asarray([0, begin, begin + 1, (begin + end) // 2, end - 1, end, end + 1, 10**6])
    for step in steps:
        assert float(schedule(step)) == float(wanted(step))
    assert float(schedule(end)) == 1
    assert begin == end or 0 < float(schedule(end - 1)) < 1
    assert begin == end or float(schedule(begin)) == 0 < float(schedule(begin + 1))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((100, 0, 5), 'batch_size=0, num_data=100'),
        ((100, 101, 5), 'batch_size=101, num_data=100'),
        ((100, 10, 0), 'epochs must be above 0, got 0'),
        ((100, 10, 5, (2.0, 1.0)), 'begin=20, end=10'),
    ],
)
def test_kl_warmup_for_refuses_what_cannot_be(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        svd.kl_warmup_for(*arguments)


@pytest.mark.parametrize('arguments', [{'num_data': 0}, {'num_data': 5, 'num_samples': 0}])
def test_counts_below_one_are_errors(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f'{list(arguments)[-1]} must be at least 1, got 0'):
        svd.make_train_step(MODEL.apply, svd.classification_loss, optax.sgd(0.1), **arguments)


def test_classification_loss_against_numpy() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 4)), rng.integers(0, 4, 20)
    loss, metrics = svd.classification_loss(jnp.asarray(logits), jnp.asarray(labels))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(loss, -np.mean(np.log(p[np.arange(20), labels])), rtol=1e-5)
    np.testing.assert_allclose(metrics['error'], np.mean(p.argmax(1) != labels), rtol=1e-6)


@pytest.mark.parametrize(('num_samples', 'kl_weight'), [(1, 1.0), (8, 0.3)])
def test_gradient_is_the_mean_over_the_documented_keys(num_samples: int, kl_weight: float) -> None:
    tx = optax.sgd(1.0)  # so that the parameters move by the gradient
    state, (x, labels) = start(tx), batch()
    before = copy(state.params)

    @jax.grad
    def gradient(params, key):
        y, kl = MODEL.apply({'params': params}, x, rngs={'noise': key})
        nll = -jnp.mean(jax.nn.log_softmax(y)[jnp.arange(len(labels)), labels])
        return nll + kl_weight * kl / NUM_DATA

    keys = jax.random.split(jax.random.key(7), num_samples)
    singles = [jax.jit(gradient)(before, key) for key in keys]
    wanted = jax.tree.map(lambda *g: np.mean(np.float64(g), axis=0), *singles)
    step = svd.make_train_step(
        MODEL.apply, svd.classification_loss, tx, NUM_DATA, num_samples, kl_weight
    )
    state, metrics = step(state, (x, labels), jax.random.key(7))
    moved = jax.tree.map(lambda a, b: a - np.array(b), before, state.params)
    assert_trees_equal(moved, wanted, atol=1e-6)
    np.testing.assert_allclose(metrics['kl'], svd.kl(before), rtol=1e-5)
    np.testing.assert_allclose(
        metrics['loss'], metrics['data_term'] + kl_weight * metrics['kl'] / NUM_DATA, rtol=1e-6
    )


def test_metrics_count_and_name() -> None:
    state = start(optax.sgd(0.0))
    noise = jnp.where(jnp.arange(15).reshape(5, 3) < 6, 20.0, -20.0)
    state = state.replace(params={**state.params, 'log_sigma2': noise})
    step = svd.make_train_step(
        MODEL.apply, svd.classification_loss, optax.sgd(0.0), NUM_DATA,
        kl_weight=svd.kl_warmup(0, 4),
    )  # fmt: skip
    for i in range(3):
        state, metrics = step(state, batch(), jax.random.key(i))
        assert set(metrics) == {
            'loss', 'data_term', 'kl', 'kl_weight', 'sparsity', 'finite', 'error'
        }  # fmt: skip
        assert all(jnp.shape(value) == () for value in metrics.values())
        np.testing.assert_allclose(metrics['sparsity'], 6 / 15, rtol=1e-6)
        np.testing.assert_allclose(metrics['kl_weight'], i / 4)
        assert metrics['finite']
    assert state.step == 3


def test_sparsity_is_counted_with_a_threshold_for_every_path() -> None:
    model, tx = WithBatchNorm(), optax.sgd(0.0)
    state = start(tx, model)
    params = {
        name: {**layer, **({'kernel': jnp.ones_like(layer['kernel'])} if 'kernel' in layer else {})}
        for name, layer in state.params.items()
    }  # log_alpha is the log_sigma2 of the model: -3 in Dense_0, 5 x 4 weights; -10 in Dense_1
    state = state.replace(params=params)
    threshold = {'Dense_0': -4.0, 'Dense_1': -9.0}
    step = svd.make_train_step(
        model.apply, svd.classification_loss, tx, NUM_DATA, threshold=threshold
    )
    _, metrics = step(state, batch(), jax.random.key(0))
    np.testing.assert_allclose(metrics['sparsity'], 20 / 32, rtol=1e-6)


@pytest.mark.parametrize('num_samples', [1, 3])
def test_second_call_does_not_recompile(num_samples: int) -> None:
    tx, traces = optax.adam(1e-3), []

    def apply_fn(*args: Any, **kwargs: Any) -> Any:
        traces.append(1)
        return MODEL.apply(*args, **kwargs)

    step = svd.make_train_step(apply_fn, svd.classification_loss, tx, NUM_DATA, num_samples)
    state, _ = step(start(tx), batch(), jax.random.key(0))
    after_first = len(traces)
    assert after_first > 0
    for i in range(3):
        state, _ = step(state, batch(seed=i), jax.random.key(i))
    assert len(traces) == after_first


def test_state_is_donated_but_the_callers_parameters_survive() -> None:
    tx = optax.adam(1e-3)
    variables = MODEL.init(jax.random.key(0), batch()[0])
    before = copy(variables)
    state = svd.TrainState.create(variables, tx)
    step = svd.make_train_step(MODEL.apply, svd.classification_loss, tx, NUM_DATA)
    new, _ = step(state, batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    assert_trees_equal(copy(variables), before)


@pytest.mark.parametrize('num_samples', [1, 3])
def test_batch_statistics_are_carried(num_samples: int) -> None:
    model, tx = WithBatchNorm(), optax.sgd(0.0)  # the weights stay: the statistics alone move
    state, (x, labels) = start(tx, model), batch()
    params, stats = copy(state.params), copy(state.collections['batch_stats'])
    keys = jax.random.split(jax.random.key(3), num_samples)
    updates = [
        model.apply(
            {'params': params, 'batch_stats': stats},
            x,
            rngs={'noise': key},
            mutable=['batch_stats'],
        )[1]['batch_stats']
        for key in keys
    ]
    wanted = jax.tree.map(lambda *s: np.mean(s, axis=0), *updates)
    step = svd.make_train_step(model.apply, svd.classification_loss, tx, NUM_DATA, num_samples)
    state, _ = step(state, (x, labels), jax.random.key(3))
    assert_trees_equal(copy(state.collections), {'batch_stats': wanted}, atol=1e-6)
    once = copy(state.collections)
    state, _ = step(state, (x, labels), jax.random.key(4))
    moved = jax.tree.map(lambda a, b: np.any(a != np.array(b)), once, state.collections)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    'tx',
    [
        optax.adam(0.05),
        optax.sgd(0.3, momentum=0.9),
        optax.adamw(0.05),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.03)),
        optax.chain(optax.add_noise(0.01, 0.5, 0), optax.sgd(0.3)),
        optax.contrib.prodigy(0.5),
    ],
    ids=[
        'adam',
        'momentum',
        'adamw',
        'MultiSteps',
        'clipped rmsprop',
        'with a key in its state',
        'with the first parameters in its state',
    ],
)
def test_any_optimiser_trains(tx) -> None:
    tx = optax.GradientTransformation(tx.init, tx.update)
    state = start(tx)
    step = svd.make_train_step(MODEL.apply, svd.classification_loss, tx, 10_000)
    losses = []
    for i in range(60):
        # JAX counts the optimiser's own key as used where the step chooses between old and new.
        with jax.debug_key_reuse(False):
            state, metrics = step(state, batch(64, seed=i), jax.random.key(i))
        losses.append(float(metrics['data_term']))
    assert state.step == 60
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


@pytest.mark.parametrize('what', ['loss', 'gradient', 'a single sample'])
def test_what_is_not_finite_changes_nothing_and_training_goes_on(what: str) -> None:
    model, tx = WithBatchNorm(), optax.adam(0.1)
    x, labels = batch()

    def loss_fn(logits, targets):
        labels, broken = targets
        loss, metrics = svd.classification_loss(logits, labels)
        if what == 'loss':
            loss = jnp.where(broken, jnp.inf, loss)
        elif what == 'gradient':
            # sqrt(0) is finite, its gradient is not.
            loss += jnp.sqrt(jnp.where(broken, 0.0, 1.0) + 0 * loss)
        else:  # about half of the draws
            loss = jnp.where(broken & (logits[0, 0] > logits[1, 0]), jnp.nan, loss)
        return loss, metrics

    num_samples = 16 if what == 'a single sample' else 1
    step = svd.make_train_step(model.apply, loss_fn, tx, NUM_DATA, num_samples)
    state, _ = step(start(tx, model), (x, (labels, jnp.asarray(False))), jax.random.key(0))
    if what == 'a single sample':
        noisy = jax.tree.map(lambda a: a, state.params)
        noisy['Dense_1']['log_sigma2'] = jnp.zeros_like(noisy['Dense_1']['log_sigma2'])
        state = state.replace(params=noisy)
    before = copy(state)
    state, metrics = step(state, (x, (labels, jnp.asarray(True))), jax.random.key(1))
    assert not metrics['finite']
    assert jnp.isfinite(metrics['loss']) == (what == 'gradient')
    assert_trees_equal(copy(state), before)
    state, metrics = step(state, (x, (labels, jnp.asarray(False))), jax.random.key(2))
    assert metrics['finite']
    assert state.step == before.step + 1
    assert np.any(state.params['Dense_0']['kernel'] != before.params['Dense_0']['kernel'])


def test_losses_per_example_are_averaged_and_metrics_are_optional() -> None:
    def per_example(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    found = []
    for loss_fn in (per_example, svd.classification_loss):
        tx = optax.sgd(1.0)
        step = svd.make_train_step(MODEL.apply, loss_fn, tx, NUM_DATA)
        state, metrics = step(start(tx), batch(), jax.random.key(0))
        metrics.pop('error', None)
        found.append((copy(state.params), copy(metrics)))
    assert_trees_equal(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('inside', [lambda f: f, jax.jit, jax.checkpoint], ids=lambda f: f.__name__)
def test_a_log_sigma2_that_no_layer_reads_is_an_error_that_names_it(inside) -> None:
    class Mixed(nn.Module):  # a variational tree, one of whose layers is plain
        @nn.compact
        def __call__(self, x):
            x, kl = svd.linen.Dense(4, name='first')(x)
            return nn.Dense(3, name='second')(x), kl

    model, tx, (x, labels) = Mixed(), optax.sgd(0.1), batch()
    params = model.init(jax.random.key(0), x)['params']
    params = svd.variational(params, where='second')

    def apply_fn(variables, x, rngs):
        return inside(lambda v, x, rngs: model.apply(v, x, rngs=rngs))(variables, x, rngs)

    step = svd.make_train_step(apply_fn, svd.classification_loss, tx, NUM_DATA)
    with pytest.raises(ValueError, match=r'never reads second/log_sigma2: .*svd\.linen') as error:
        step(svd.TrainState.create({'params': params}, tx), (x, labels), jax.random.key(0))
    assert 'first' not in str(error.value)


def test_a_plain_model_with_a_variational_tree_is_an_error() -> None:
    model, tx, (x, labels) = nn.Dense(3), optax.sgd(0.1), batch()

    def apply_fn(variables, x, rngs):
        return model.apply(variables, x, rngs=rngs), 0.0

    params = svd.variational(model.init(jax.random.key(0), x)['params'])
    step = svd.make_train_step(apply_fn, svd.classification_loss, tx, NUM_DATA)
    with pytest.raises(ValueError, match='never reads log_sigma2'):
        step(svd.TrainState.create({'params': params}, tx), (x, labels), jax.random.key(0))


def test_training_lowers_the_loss_and_drops_what_is_only_noise() -> None:
    # A label is the largest of three of the five inputs, for which the diagonal is enough. So few
    # data, in the bound, that the KL weighs much.
    tx = optax.adam(0.05)
    state = start(tx)
    step = svd.make_train_step(
        MODEL.apply, svd.classification_loss, tx, NUM_DATA, kl_weight=svd.kl_warmup(50, 150)
    )
    history = []
    for i in range(450):
        state, metrics = step(state, batch(100, seed=i % 4), jax.random.key(i))
        history.append(copy(metrics))
    assert history[-1]['loss'] < 0.6 * history[0]['loss']
    assert history[0]['sparsity'] < 0.2
    assert history[-1]['sparsity'] >= 0.6
    kept = np.asarray(svd.sparsify(state.params)['kernel']) != 0
    assert np.all(kept[:3].diagonal())
    assert not np.any(kept[3:])
    np.testing.assert_allclose(history[-1]['sparsity'], 1 - kept.mean(), atol=0.1)


@pytest.mark.parametrize('name', ['loss', 'data_term', 'kl', 'kl_weight', 'sparsity', 'finite'])
def test_a_metric_named_as_one_of_the_step_is_refused(name: str) -> None:
    """Not put in its place."""
    model, tx = svd.linen.Dense(2), optax.sgd(0.1)
    state = svd.TrainState.create(model.init(jax.random.key(0), jnp.ones((1, 3))), tx)

    def loss(outputs: jax.Array, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return outputs.sum(), {name: outputs.sum(), 'mine': outputs.mean()}

    step = svd.make_train_step(model.apply, loss, tx, num_data=4)
    with pytest.raises(ValueError, match=f'metric named {name}, which is one of the step: rename'):
        step(state, (jnp.ones((1, 3)), None), jax.random.key(1))


def test_bare_parameters_are_refused() -> None:
    params = svd.variational({'kernel': jnp.ones((3, 2))})
    message = "no collection 'params': pass what model.init returns, or {'params': params}"
    with pytest.raises(ValueError, match=message):
        svd.TrainState.create(params, optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        svd.apply(nn.Dense(2), params, jnp.ones((1, 3)), rngs={'noise': jax.random.key(0)})
