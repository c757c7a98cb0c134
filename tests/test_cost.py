"""What units cost, against counts by hand, and the weights and factors made of it."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import svd_jax as svd
from experiments import budget
from svd_jax import cost
from svd_jax.tree import units

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(3, (2, 2), padding='VALID')(x))
        return nn.Dense(5)(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def network() -> tuple[nn.Module, jax.Array, dict]:
    model, x = Net(), jnp.ones((1, 4, 4, 2))
    params = model.init(jax.random.key(0), x)['params']
    groups = {'Conv': 'outputs', 'Dense': 'inputs'}
    return model, x, svd.variational(params, (), groups=groups)


FILTERS, INPUTS = 'Conv_0/groups/outputs', 'Dense_0/groups/inputs'


def test_the_cost_of_a_unit_is_the_work_that_it_takes_part_in(network) -> None:
    model, x, params = network
    # A filter: 9 positions of 4 pixels of 2 channels, and 9 inputs of 5 neurons.
    assert svd.unit_costs(model, params, x) == {FILTERS: 9 * 8 + 9 * 5, INPUTS: 5}
    # In numbers: its kernel and bias, and the rows of the dense layer.
    assert svd.unit_costs(model, params, x, measure=cost.numbers) == {
        FILTERS: 8 + 1 + 9 * 5, INPUTS: 5,
    }  # fmt: skip
    measured = svd.unit_costs(
        model, params, x, measure=lambda small: small.params['Dense_0']['kernel'].size
    )
    assert measured == {FILTERS: 45, INPUTS: 5}


def test_units_that_are_gone_cost_nothing(network) -> None:
    model, x, params = network
    group = params['Conv_0']['groups']['outputs']
    group = {**group, 'log_sigma2': group['log_sigma2'].at[..., 0].set(5.0)}
    params = {**params, 'Conv_0': {**params['Conv_0'], 'groups': {'outputs': group}}}
    variables = {'params': params}
    assert svd.unit_costs(model, variables, x)[FILTERS] == 9 * 8 + 9 * 5
    none = jax.tree.map(lambda _: jnp.full((1, 1, 1, 3), 5.0), group)
    params = {**params, 'Conv_0': {**params['Conv_0'], 'groups': {'outputs': none}}}
    assert svd.unit_costs(model, params, x, threshold=0.5)[FILTERS] == 0


def test_weights_are_in_proportion_to_costs_and_have_the_mean_that_is_asked(network) -> None:
    *_, params = network
    found = svd.kl_weights({FILTERS: 117.0, INPUTS: 5.0}, params, mean=30.0)
    assert found[FILTERS] / found[INPUTS] == pytest.approx(117 / 5)
    sizes = {FILTERS: 3, INPUTS: 27}
    total = sum(found[group] * size for group, size in sizes.items())
    assert total / sum(sizes.values()) == pytest.approx(30)


def test_a_cost_below_zero_is_noise_of_measuring(network) -> None:
    *_, params = network
    assert svd.kl_weights({FILTERS: -1e-5, INPUTS: 2.0}, params) == {
        FILTERS: 0, INPUTS: pytest.approx(30 / 27)
    }  # fmt: skip
    assert svd.kl_weights({FILTERS: 0.0, INPUTS: -1.0}, params, 4.0) == {FILTERS: 4, INPUTS: 4}


def test_without_groups_nothing_has_a_cost(network) -> None:
    model, x, params = network
    with pytest.raises(ValueError, match='no weight has groups'):
        svd.unit_costs(model, svd.variational(svd.sparsify(params)), x)


def test_the_budget_pulls_harder_the_further_it_is_off() -> None:
    factors = [budget.kl_factor(share, 0.1, progress=1.0) for share in (0.5, 0.2, 0.1, 0.05)]
    assert np.all(np.diff(factors) < 0)
    assert factors[2] == 1
    # A network that shrinks steadily on its way is where it should be.
    assert budget.kl_factor(0.1**0.5, 0.1, progress=0.35) == pytest.approx(1)


@pytest.fixture(params=[False, True], ids=['normal', 'log-normal'])
def noisy(network, request: pytest.FixtureRequest) -> tuple[dict, dict]:
    """Scales of any noise, none of it so high that a unit would be dropped; and log alphas."""
    *_, params = network
    groups = {'Conv': 'outputs', 'Dense': 'inputs'}
    params = svd.variational(
        svd.sparsify(params, np.inf), (), groups=groups, log_normal=request.param
    )
    rng = np.random.default_rng(0)
    flat = {
        path: jnp.asarray(rng.uniform(-6, -1, leaf.shape), jnp.float32)
        if path[-1] == 'log_sigma2'
        else leaf
        for path, leaf in flatten_dict(params).items()
    }
    params = unflatten_dict(flat)
    levels = {path[:-1]: leaf for path, leaf in flatten_dict(svd.log_alpha(params)).items()}
    return params, levels


@pytest.mark.parametrize('wanted', [0.7, 0.4, 0.25])
def test_the_noisiest_units_go_until_the_budget_is_met(network, noisy, wanted: float) -> None:
    model, x, _ = network
    params, levels = noisy

    def share(params: dict) -> float:
        dense, left = svd.compact(model, svd.sparsify(params), x).report.multiply_adds
        return left / dense

    assert share(params) == 1
    found = budget.within(params, share, wanted, 3.0)
    assert share(found) <= wanted
    assert budget.within(params | {'nothing': {}}, share, wanted, 3.0)['nothing'] == {}
    before, after = flatten_dict(params), flatten_dict(found)
    dropped = {}
    for path, leaf in after.items():
        changed = np.asarray(leaf != before[path])
        if path[:-1] in levels and path[-1] == 'log_sigma2':
            dropped[path[:-1]] = changed
            assert not changed.all()
        else:
            assert not changed.any()
    kept = [np.asarray(levels[path])[~gone] for path, gone in dropped.items()]
    # Apart from the least noisy unit of a group, which stays.
    others = np.concatenate([np.sort(noise)[1:] for noise in kept])
    gone = np.concatenate([np.asarray(levels[path])[where] for path, where in dropped.items()])
    assert others.max(initial=-np.inf) < gone.min()
    # One unit less would be one too few.
    least = {
        (*path, 'log_sigma2'): jnp.where(
            np.asarray(levels[path]) == gone.min(), before[(*path, 'log_sigma2')],
            after[(*path, 'log_sigma2')],
        )
        for path in levels
    }  # fmt: skip
    assert share(unflatten_dict(after | least)) > wanted


def test_within_the_budget_nothing_changes(noisy) -> None:
    params, _ = noisy
    assert budget.within(params, lambda params: 0.3, 0.3, 3.0) is params


@pytest.mark.parametrize('wanted', [0.9, 0.7])
def test_units_come_back_where_there_is_room(network, noisy, wanted: float) -> None:
    """Where a threshold drops too much, as many are left as where it drops nothing."""
    model, x, _ = network
    params, levels = noisy

    def share(threshold: float, params: dict) -> float:
        report = svd.compact(model, svd.sparsify(params, threshold), x).report
        return report.multiply_adds[1] / report.multiply_adds[0]

    # Just above the least noisy unit of each group; what a log-normal posterior takes off is added.
    least = max(float(noise.min()) for noise in levels.values())
    log_normal = any(path[-1] == 'log_scale' for path in flatten_dict(params))
    low = least + 1e-3 + 3.0 * log_normal
    found = budget.within(params, partial(share, low), wanted, low)
    assert share(low, params) < 0.5 < share(low, found) <= wanted
    expected = budget.within(params, partial(share, 3.0), wanted, 3.0)
    jax.tree.map(np.testing.assert_array_equal, units(found, low), units(expected, 3.0))
