"""Training on a smaller network goes on as on the whole one, but for the noise of what went."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import svd_jax as svd
from experiments.models import VGGLike
from svd_jax import convention, noise

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')
THRESHOLD = {'groups/': 1.0, '': 3.0}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.relu(nn.Conv(4, (3, 3), padding='VALID')(x))
        x = nn.relu(nn.Dense(8)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


@pytest.fixture(scope='module', params=[(), None], ids=['groups alone', 'weights and groups'])
def trained(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """A network after a few steps of training, and the units that are then made noise alone."""
    model, tx = Net(), optax.adam(1e-2)
    x = jax.random.normal(jax.random.key(0), (16, 5, 5, 2))
    labels = jax.random.randint(jax.random.key(1), (16,), 0, 3)
    params = model.init(jax.random.key(2), x)['params']
    params = svd.variational(params, request.param, groups={'Conv': 'outputs', 'Dense': 'inputs'})
    state = svd.TrainState.create({'params': params}, tx)
    step = steps(model, tx)
    for seed in range(3):
        state, _ = step(state, (x, labels), jax.random.key(seed))
    dead = {'Conv_0': [0, 3], 'Conv_1': [1], 'Dense_1': [0, 2, 5]}
    return model, tx, killed(state, dead), (x, labels)


def killed(state: svd.TrainState, dead: dict[str, Any]) -> svd.TrainState:
    """With nothing but noise in these units of these layers."""
    params = jax.tree.map(jnp.array, state.params)
    for layer, units in dead.items():
        ((_, group),) = params[layer]['groups'].items()
        flat = group['log_sigma2'].reshape(-1).at[np.asarray(units)].set(4.0)
        group['log_sigma2'] = flat.reshape(group['log_sigma2'].shape)
    return state.replace(params=params)


@pytest.fixture
def started(trained: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy: steps donate their state."""
    model, tx, state, batch = trained
    return model, tx, jax.tree.map(jnp.array, state), batch


def steps(model: Any, tx: optax.GradientTransformation) -> Any:
    def apply(variables: Any, inputs: jax.Array, rngs: Any) -> Any:
        return svd.apply(model, variables, inputs, rngs=rngs, threshold=THRESHOLD)

    return svd.make_train_step(apply, svd.classification_loss, tx, num_data=16, threshold=THRESHOLD)


def test_training_goes_on_as_it_would_have(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tx, state, batch = started
    # Of what is removed, the noise goes too: without any, the two trainings are the same.
    monkeypatch.setattr(noise, 'standard_normal', lambda key, shape: jnp.zeros(shape))
    smaller, small, report, *_ = svd.shrink(model, state, tx, batch[0], threshold=THRESHOLD)
    assert small.params['Conv_0']['kernel'].shape == (3, 3, 2, 4)
    assert small.params['Conv_1']['kernel'].shape == (3, 3, 4, 3)
    assert small.params['Conv_1']['groups']['outputs']['scale'].shape == (1, 1, 1, 3)
    assert small.params['Dense_0']['kernel'].shape == (27, 5)
    assert small.params['Dense_0']['groups']['inputs']['scale'].shape == (27, 1)
    assert small.params['Dense_1']['kernel'].shape == (5, 3)
    assert report.multiply_adds[1] < report.multiply_adds[0]
    x, _ = batch
    shipped = svd.sparsify(state.params, THRESHOLD)
    left = svd.sparsify(small.params, THRESHOLD)
    np.testing.assert_allclose(smaller(left, x), smaller.apply({'params': left}, x), rtol=1e-5)
    if svd.backend.as_on_cpu():  # by patches
        assert 'conv_general_dilated' not in str(jax.make_jaxpr(smaller.__call__)(left, x))
    np.testing.assert_allclose(
        smaller.apply({'params': left}, x), model.apply({'params': shipped}, x),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip

    # A step of each; from then on they part, since a constant unit's bias learns no more.
    state, whole = steps(model, tx)(state, batch, jax.random.key(0))
    small, after = steps(smaller, tx)(small, batch, jax.random.key(0))
    np.testing.assert_allclose(after['data_term'], whole['data_term'], rtol=1e-5)
    assert small.step == state.step
    last = np.setdiff1d(np.arange(8), [0, 2, 5])
    for name in ('kernel', 'log_sigma2'):
        if name in state.params['Dense_1']:
            found, wanted = (s.params['Dense_1'][name] for s in (small, state))
            np.testing.assert_allclose(found, wanted[last], rtol=1e-3, atol=1e-4)


def test_the_optimiser_knows_what_it_knew(started: Any) -> None:
    model, tx, state, (x, _) = started
    _, small, *_ = svd.shrink(model, state, tx, x, threshold=THRESHOLD)
    kept = np.setdiff1d(np.arange(6), [0, 3])
    for moments in ('mu', 'nu'):
        whole, left = (getattr(s.opt_state[0], moments)['Conv_0'] for s in (state, small))
        np.testing.assert_array_equal(left['kernel'], whole['kernel'][..., kept])
        scales = (node['groups']['outputs']['scale'] for node in (left, whole))
        np.testing.assert_array_equal(next(scales), next(scales)[..., kept])
    assert small.opt_state[0].count == state.opt_state[0].count


def test_expanding_gives_the_whole_state_with_zeros_that_shrink_again(started: Any) -> None:
    model, tx, state, (x, _) = started
    shrunk = svd.shrink(model, state, tx, x, threshold=THRESHOLD)
    whole = shrunk.expand(shrunk.state)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, state)
    np.testing.assert_allclose(
        model.apply({'params': svd.sparsify(whole.params, THRESHOLD)}, x),
        model.apply({'params': svd.sparsify(state.params, THRESHOLD)}, x),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    for threshold in (THRESHOLD, float('inf')):  # what was removed is dropped at any
        again = svd.shrink(model, whole, tx, x, threshold=threshold)
        jax.tree.map(np.testing.assert_array_equal, again.state, shrunk.state)


def test_it_can_shrink_again_and_be_shipped(started: Any, tmp_path: Any) -> None:
    model, tx, state, (x, _) = started
    smaller, small, *_ = svd.shrink(model, state, tx, x, threshold=THRESHOLD)
    params = jax.tree.map(jnp.array, small.params)
    group = params['Dense_1']['groups']['inputs']
    group['log_sigma2'] = group['log_sigma2'].at[0].set(4.0)
    small = small.replace(params=params)
    again, smallest, *_ = svd.shrink(smaller, small, tx, x, threshold=THRESHOLD)
    assert smallest.params['Dense_1']['kernel'].shape == (4, 3)
    left = svd.sparsify(smallest.params, THRESHOLD)
    np.testing.assert_allclose(
        again.apply({'params': left}, x),
        smaller.apply({'params': svd.sparsify(params, THRESHOLD)}, x),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    svd.save(tmp_path / 'left.svd', left)
    loaded = svd.load(tmp_path / 'left.svd')
    assert [w.values.shape for w in convention.weights(loaded)] == [
        w.values.shape for w in convention.weights(left)
    ]


def test_what_cannot_shrink_is_refused(started: Any) -> None:
    model, tx, state, (x, _) = started
    with pytest.raises(ValueError, match='the state has batch_stats: pass training='):
        svd.shrink(model, state.replace(collections={'batch_stats': {}}), tx, x)
    with pytest.raises(ValueError, match='no unit is left'):
        svd.shrink(model, state, tx, x, threshold=-99.0)
    factored = optax.adafactor(0.1, min_dim_size_to_factor=2)
    other = svd.TrainState.create(state.variables, factored)
    with pytest.raises(
        ValueError, match=r'v_row.* of the optimiser is no array like its parameter'
    ):
        svd.shrink(model, other, factored, x)


class ReadAgain(nn.Module):
    """Units that something other than a product reads: a normalisation, a sum, the output."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(6)(x)))
        return nn.Dense(4)(nn.Dense(6)(x) + x)


def test_constants_that_are_read_are_there_in_the_whole_network_too() -> None:
    model, x = ReadAgain(), jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    params = model.init(jax.random.key(0), x)['params']
    params = svd.variational(jax.tree.map(lambda leaf: leaf + 0.1, params))
    for layer, unit in (('Dense_0', 2), ('Dense_1', 1), ('Dense_2', 3)):
        log_sigma2 = params[layer]['log_sigma2'].at[:, unit].set(10.0)
        params[layer]['log_sigma2'] = log_sigma2
    tx = optax.adam(0.1)
    state = svd.TrainState.create({'params': params}, tx)
    shrunk = svd.shrink(model, state, tx, x)
    wanted = model.apply({'params': svd.sparsify(params)}, x)
    for found in (
        shrunk.model(svd.sparsify(shrunk.state.params), x),
        model.apply({'params': svd.sparsify(shrunk.expand(shrunk.state).params)}, x),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


# --- Batch statistics -----------------------------------------------------------------------------


class Normed(nn.Module):
    """With a residual block, and a counter that training alone knows of."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def normed(x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

        if train:
            self.variable('counts', 'steps', lambda: jnp.zeros(())).value += 1
        x = normed(nn.Conv(6, (3, 3))(x))
        inner = normed(nn.Conv(5, (3, 3))(x))
        x += normed(nn.Conv(6, (3, 3), use_bias=False)(inner))
        x = normed(nn.Conv(4, (3, 3), padding='VALID')(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = normed(nn.Dense(8)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


class Stage(VGGLike):
    """The first of the experiments' network; its KL is that of svd.apply."""

    stages: Any = VGGLike.stages[:1]
    width: float = 1 / 8
    classes: int = 3
    options: Any = (('weights', False),)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return super().__call__(x, not train)[0]


class Case(NamedTuple):
    """A network, and the units of its layers' inputs that are made noise alone."""

    model: nn.Module
    dead: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


CASES = {
    # Of the channels that a sum makes both of its parts go, if no part has another reader.
    'residual': Case(
        Normed(),
        {'Conv_1': [4], 'Conv_2': [0, 1], 'Conv_3': [4], 'Dense_0': [0, *range(1, 16, 4)]},
        {
            'Conv_0': (3, 3, 2, 5), 'Conv_1': (3, 3, 5, 3), 'Conv_2': (3, 3, 3, 5),
            'Conv_3': (3, 3, 5, 3), 'Dense_0': (11, 8),
        },
    ),
    'vgg': Case(
        Stage(),
        {'Conv_1': [0, 3, 4], 'Dense_0': range(3, 32, 8), 'Dense_1': [1, 60]},
        {
            'Conv_0': (3, 3, 2, 5), 'Conv_1': (3, 3, 5, 7), 'Dense_0': (28, 62),
            'Dense_1': (62, 3),
        },
    ),
}  # fmt: skip


class Run(NamedTuple):
    """A training in progress, without noise: with it, that of what is removed is gone."""

    case: Case
    tx: optax.GradientTransformation
    step: Any
    state: svd.TrainState
    batch: tuple[jax.Array, jax.Array]

    def shrunk(self, state: svd.TrainState, threshold: Any = THRESHOLD) -> svd.Shrunk:
        x, _ = self.batch
        return svd.shrink(
            self.case.model, state, self.tx, x[:1], threshold=threshold, train=False,
            training=partial(self.case.model.apply, train=True, mutable=list(state.collections)),
        )  # fmt: skip

    def evaluated(self, model: Any, state: svd.TrainState) -> Any:
        """What the network that would ship returns."""
        return model.apply(left(state), self.batch[0], train=False)

    def trained(self, model: Any, state: svd.TrainState) -> Any:
        """The same in training, and the new collections."""
        mutable = list(state.collections)
        return model.apply(left(state), self.batch[0], train=True, mutable=mutable)


def left(state: svd.TrainState) -> Any:
    return {**state.collections, 'params': svd.sparsify(state.params, THRESHOLD)}


@pytest.fixture(scope='module', params=CASES)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    case = CASES[request.param]
    # Of a bias before a normalisation the gradient is rounding alone, which Adam would enlarge.
    tx = optax.sgd(0.05, momentum=0.9)
    x = jax.random.normal(jax.random.key(0), (16, 4, 4, 2))
    batch = x, jax.random.randint(jax.random.key(1), (16,), 0, 3)
    variables = case.model.init(jax.random.key(2), x, train=True)
    params = svd.variational(
        variables['params'], (), groups=lambda path: None if 'Conv_0' in path else 'inputs'
    )
    state = svd.TrainState.create({**variables, 'params': params}, tx)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, 'standard_normal', lambda key, shape: jnp.zeros(shape))
        step = normed_steps(case.model, tx)
        for seed in range(2):
            state, _ = step(state, batch, jax.random.key(seed))
        yield Run(case, tx, step, killed(state, case.dead), batch)


def normed_steps(model: Any, tx: optax.GradientTransformation) -> Any:
    apply = partial(svd.apply, model, threshold=THRESHOLD, train=True)
    return svd.make_train_step(apply, svd.classification_loss, tx, 16, threshold=THRESHOLD)


def close(found: Any, wanted: Any) -> None:
    def same(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)

    jax.tree.map(same, found, wanted)


def test_batch_statistics_go_on_as_they_would_have(run: Run) -> None:
    shrunk = run.shrunk(run.state)
    shapes = {name: shrunk.state.params[name]['kernel'].shape for name in run.case.shapes}
    assert shapes == run.case.shapes
    step = normed_steps(shrunk.model, run.tx)
    whole, small = jax.tree.map(jnp.array, (run.state, shrunk.state))
    for seed in range(3):
        key = jax.random.key(seed)
        whole, wanted = run.step(whole, run.batch, jax.random.clone(key))
        small, found = step(small, run.batch, key)
        np.testing.assert_allclose(found['data_term'], wanted['data_term'], rtol=1e-4)
    # Whether it is made smaller before the steps or after: all of it, statistics and moments too.
    close(small, run.shrunk(whole).state)


def test_the_whole_network_evaluates_as_the_smaller_one(run: Run) -> None:
    model, (x, _) = run.case.model, run.batch
    shrunk = run.shrunk(run.state)
    close(run.evaluated(shrunk.model, shrunk.state), run.evaluated(model, run.state))
    found, updates = run.trained(shrunk.model, shrunk.state)
    close(found, run.trained(model, run.state)[0])
    # With other statistics, as after a step.
    moved = shrunk.state.replace(collections=updates)
    whole, wanted = shrunk.expand(moved), run.evaluated(shrunk.model, moved)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, run.state)
    close(run.evaluated(model, whole), wanted)
    close(svd.compact(model, left(whole), x[:1], train=False)(x), wanted)
    for threshold in (THRESHOLD, float('inf')):
        again = run.shrunk(whole, threshold)
        jax.tree.map(np.testing.assert_array_equal, again.state, moved)


def test_a_smaller_network_with_batch_statistics_can_shrink_again(run: Run) -> None:
    smaller, small, *_ = run.shrunk(run.state)
    small = killed(small, {'Dense_0': [0, 2], 'Conv_1': [0]})
    again = run._replace(case=run.case._replace(model=smaller)).shrunk(small)
    assert again.report.multiply_adds[1] < again.report.multiply_adds[0]
    close(run.evaluated(again.model, again.state), run.evaluated(smaller, small))
    found, updates = run.trained(again.model, again.state)
    close(found, run.trained(smaller, small)[0])
    by_patches = again.model(left(again.state), run.batch[0], mutable=list(updates))
    close(by_patches, (found, updates))


@pytest.mark.parametrize('run', ['residual'], indirect=True)
def test_constants_stay_since_batch_statistics_make_others_of_them(run: Run) -> None:
    state = killed(run.state, {'Conv_2': range(5)})  # zero before the normalisation
    shrunk = run.shrunk(state)
    close(run.evaluated(shrunk.model, shrunk.state), run.evaluated(run.case.model, state))
    found, updates = run.trained(shrunk.model, shrunk.state)
    wanted, all_updates = run.trained(run.case.model, state)
    close(found, wanted)
    means = (each['batch_stats']['BatchNorm_2']['mean'] for each in (updates, all_updates))
    close(next(means), jnp.delete(next(means), 4))
    assert updates['counts']['steps'] == state.collections['counts']['steps'] + 1


@pytest.mark.parametrize('run', ['residual'], indirect=True)
def test_random_numbers_in_training_are_refused(run: Run) -> None:
    x, _ = run.batch
    model, key = Normed(dropout=0.5), jax.random.key(0)
    training = partial(
        model.apply, train=True, mutable=['batch_stats', 'counts'], rngs={'dropout': key}
    )
    with pytest.raises(ValueError, match='draws random numbers in training'):
        svd.shrink(model, run.state, run.tx, x, training=training, train=False)


class DroppedInLoops(nn.Module):
    """Dropout in training in a loop, or in a branch, and no other random numbers.

    Attributes:
      keys: raw ones, which only the loop or the branch makes keys of.
      branch: rather than the loop.
    """

    keys: tuple[tuple[int, int], ...]
    branch: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        keys = np.asarray(self.keys, np.uint32)

        def dropped(h: jax.Array, key: jax.Array) -> jax.Array:
            return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0)

        if train and self.branch:
            x = lax.cond(x.sum() > 0, dropped, lambda h, _: h, x, keys[0])
        elif train:
            x, _ = lax.scan(lambda h, key: (dropped(h, key), ()), x, keys)
        return nn.Dense(2)(x)


@pytest.mark.parametrize('branch', [True, False])
def test_so_are_those_in_loops_and_branches(branch: bool) -> None:
    model, x, tx = DroppedInLoops(((0, 1), (0, 2)), branch), jnp.ones((4, 3)), optax.adam(1e-3)
    variables = model.init(jax.random.key(0), x, train=False)
    params = svd.variational(variables['params'], where='Dense_0')
    state = svd.TrainState.create({**variables, 'params': params}, tx)
    training = partial(model.apply, train=True, mutable=['batch_stats'])
    with pytest.raises(ValueError, match='draws random numbers in training'):
        svd.shrink(model, state, tx, x, training=training, train=False)


class Recurring(nn.Module):
    """A cell along time, which draws nothing."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.RNN(nn.SimpleCell(6))(x))


def test_a_loop_without_them_is_trained_on() -> None:
    model, x, tx = Recurring(), jnp.ones((4, 5, 3)), optax.adam(1e-3)
    variables = model.init(jax.random.key(0), x, train=False)
    params = svd.variational(variables['params'], where=(), groups={'Dense_1': 'inputs'})
    scales = params['Dense_1']['groups']['inputs']
    scales['log_sigma2'] = scales['log_sigma2'].at[0, 0].set(9.0)
    state = svd.TrainState.create({**variables, 'params': params}, tx)
    training = partial(model.apply, train=True, mutable=['batch_stats'])
    small = svd.shrink(model, state, tx, x, training=training, train=False)
    assert small.state.params['Dense_1']['kernel'].shape == (5, 2)


def test_without_collections_nothing_is_mutable(started: Any) -> None:
    model, tx, state, (x, _) = started
    smaller, small, *_ = svd.shrink(model, state, tx, x, threshold=THRESHOLD)
    with pytest.raises(ValueError, match='leave mutable out'):
        smaller.apply(small.variables, x, mutable=['batch_stats'])


class Slashed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name='b')(nn.relu(nn.Dense(6, name='enc/a')(x)))


def test_names_with_a_slash_keep_their_posteriors() -> None:
    model, x, tx = Slashed(), jnp.ones((2, 4)), optax.adam(1e-2)
    params = model.init(jax.random.key(0), x)['params']
    params = svd.variational(params, groups={'^b': 'inputs'})
    scales = params['b']['groups']['inputs']
    scales['log_sigma2'] = scales['log_sigma2'].at[:2].set(6.0)
    state = svd.TrainState.create({'params': params}, tx)
    shrunk = svd.shrink(model, state, tx, x)
    left = shrunk.state.params
    np.testing.assert_array_equal(left['enc/a']['log_sigma2'], params['enc/a']['log_sigma2'][:, 2:])
    np.testing.assert_array_equal(left['enc/a']['kernel'], params['enc/a']['kernel'][:, 2:])
    whole = shrunk.expand(shrunk.state).params
    np.testing.assert_allclose(
        model.apply({'params': svd.sparsify(whole)}, x),
        model.apply({'params': svd.sparsify(params)}, x),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def numbered(variables: Any, x: jax.Array) -> jax.Array:
    first, second = (variables['params'][i] for i in (0, 1))
    x = nn.relu(x @ first['kernel'] + first['bias'][None])
    return x @ second['kernel'] + second['bias'][None]


@pytest.mark.parametrize('tree', [list, tuple, lambda layers: dict(enumerate(layers))])
def test_layers_may_be_numbered(tree: Any) -> None:
    rng, x = np.random.default_rng(0), jnp.ones((2, 4))
    kernels = [np.float32(rng.normal(size=size)) for size in ((4, 6), (6, 3))]
    kernels[0][:, :2] = 0
    layers = [{'kernel': kernel, 'bias': np.zeros(kernel.shape[1])} for kernel in kernels]
    params = svd.variational(tree(layers))
    tx = optax.adam(1e-2)
    state = svd.TrainState.create({'params': params}, tx)
    shrunk = svd.shrink(numbered, state, tx, x)
    whole = shrunk.expand(shrunk.state).params
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    for name in ('kernel', 'log_sigma2'):
        left = shrunk.state.params['0'][name]
        np.testing.assert_array_equal(left, params[0][name][:, 2:])
        np.testing.assert_array_equal(whole[0][name][:, 2:], left)
    np.testing.assert_allclose(
        numbered({'params': svd.sparsify(whole)}, x),
        numbered({'params': svd.sparsify(params)}, x), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_a_layer_that_nothing_reads_shares_a_scale_with_one_that_is_read() -> None:
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(6, name='first')(x))
            a, b = nn.Dense(4, name='a')(h), nn.Dense(4, name='b')(h)
            return nn.Dense(3, name='of_a')(nn.tanh(a)) + nn.Dense(3, name='of_b')(nn.tanh(b))

    model, x, rng = Shared(), jnp.ones((2, 4)), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
    dense = jax.tree.map(lambda a: rng.uniform(0.1, 0.7, a.shape).astype(np.float32), shapes)
    dense['of_b']['kernel'][:] = dense['a']['kernel'][2] = 0
    together = svd.Shared('inputs', ('a', 'b'))
    params = svd.variational(
        dense, log_sigma2_init=-40.0,
        groups=lambda path: together if path.split('/')[-2] in 'ab' else None,
    )  # fmt: skip
    tx = optax.adam(1e-3)
    shrunk = svd.shrink(model, svd.TrainState.create({'params': params}, tx), tx, x)
    assert shrunk.state.params['a']['kernel'].shape == (5, 4)
    rngs = {'noise': jax.random.key(0)}
    y, _ = svd.apply(shrunk.model, shrunk.state.variables, x, rngs=rngs)
    np.testing.assert_allclose(y, model.apply({'params': dense}, x), rtol=1e-5)
