"""svd_jax.diagnosis: on small networks, trained well and in every way that goes wrong."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd
from svd_jax import pretrained

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once')
NUM_DATA, STEPS = 200, 500
BOTH = {'Dense_0': 1.0, 'Dense_1': 1.0}
# Between which steps the KL weight grows.
WARM, COLD, NEVER = (100.0, 250.0), (-1.0, 0.0), (1e6, 2e6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> Any:
        x, kl_0 = svd.linen.Dense(32)(x, deterministic)
        x, kl_1 = svd.linen.Dense(3)(nn.relu(x), deterministic)
        return x, kl_0 + kl_1


def data(kind: str) -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(0).normal(size=(NUM_DATA, 6)).astype(np.float32)
    if kind == 'size':  # what the sign of a unit does not tell, and the spread of many does
        x *= np.where(np.arange(NUM_DATA) % 2, 0.1, 3.0)[:, None]
        return jnp.asarray(x), jnp.arange(NUM_DATA) % 2
    return jnp.asarray(x), jnp.argmax(x[:, :3], axis=1)


@jax.jit
def train(
    params: Any, x: jax.Array, labels: jax.Array, weight: Any, warmup: Any, rate: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Adam; ``weight`` of the KL by layer, warm-up between two steps, learning rates by leaf."""
    tx = optax.scale_by_adam()
    begin, end = warmup

    def loss_of(params, key, kl_weight):
        logits, _ = Net().apply({'params': params}, x, rngs={'noise': key})
        data_term, _ = svd.classification_loss(logits, labels)
        return data_term + kl_weight * svd.kl(params, weight=weight), data_term

    def step(carry, at):
        params, state, key = carry
        key, own = jax.random.split(key)
        kl_weight = jnp.clip((at - begin) / (end - begin), 0.0, 1.0)
        (loss, data_term), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, own, kl_weight
        )
        updates, state = tx.update(gradients, state)
        params = jax.tree.map(
            lambda p, u, r: p - r * u,
            params,
            updates,
            {name: {k: rate['log_sigma2' if k == 'log_sigma2' else 'rest'] for k in layer}
             for name, layer in params.items()},
        )  # fmt: skip
        return (params, state, key), {'loss': loss, 'data_term': data_term, 'kl_weight': kl_weight}

    carry = params, tx.init(params), jax.random.key(0)
    (params, _, _), metrics = jax.lax.scan(step, carry, jnp.arange(float(STEPS)))
    return params, jax.tree.map(lambda m: m[-1], metrics)


@jax.jit
def errors(params: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shares of wrong answers, of the mean weights and of sampled ones."""
    mean, _ = Net().apply({'params': params}, x, deterministic=True)
    sampled, _ = Net().apply({'params': params}, x, rngs={'noise': jax.random.key(1)})
    return tuple(svd.classification_loss(y, labels)[1]['error'] for y in (mean, sampled))


def trained(
    kind: str = 'argmax',
    weight: dict[str, float] = BOTH,
    warmup: tuple[float, float] = WARM,
    divided_by: float = NUM_DATA,
    num_data: int = NUM_DATA,
    rate: float = 0.05,
    rate_of_log_sigma2: float = 0.05,
) -> dict[str, Any]:
    """Everything that diagnose takes, of a network trained so."""
    x, labels = data(kind)
    dense = svd.sparsify(jax.jit(Net().init)(jax.random.key(0), x)['params'], np.inf)
    initial = svd.variational(dense)
    scaled = {name: factor / divided_by for name, factor in weight.items()}
    rates = {'rest': rate, 'log_sigma2': rate_of_log_sigma2}
    params, metrics = train(initial, x, labels, scaled, warmup, rates)
    deterministic_error, sampled_error = errors(params, x, labels)
    return {
        'params': params,
        'initial': initial,
        'metrics': metrics,
        'num_data': num_data,
        'weight': weight,
        'deterministic_error': deterministic_error,
        'sampled_error': sampled_error,
    }


@pytest.mark.parametrize(
    ('how', 'wrong'),
    [
        ({}, set()),
        ({'divided_by': 25, 'num_data': 25}, set()),
        ({'divided_by': 25, 'num_data': 25, 'warmup': COLD}, {'everything dropped'}),
        ({'divided_by': 1}, {'everything dropped', 'KL too heavy'}),
        ({'divided_by': 20}, {'KL too heavy'}),
        ({'divided_by': NUM_DATA**2}, {'KL too light'}),
        ({'rate_of_log_sigma2': 1e-4}, {'stuck'}),
        ({'rate': 1e-4, 'rate_of_log_sigma2': 1e-4}, {'stuck'}),
        ({'warmup': NEVER}, {'nothing dropped'}),
        ({'weight': {'Dense_0': 300.0, 'Dense_1': 0.0}}, {'dead layer'}),
    ],
    ids=lambda value: ', '.join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_what_went_wrong_in_training_is_told_and_nothing_else(how, wrong: set[str]) -> None:
    facts = trained(**how)
    diagnosis = svd.diagnose(**facts)
    assert set(diagnosis.names) == wrong
    assert diagnosis.is_healthy == (not wrong)
    # What the tree alone shows, the table says without being asked.
    told = svd.sparsity(facts['params']).warnings
    assert {finding.name for finding in told} == {name for name in wrong if 'KL' not in name}
    sparse = svd.sparsify(facts['params'])  # has no noise to be judged by
    told = svd.sparsity(sparse).warnings
    assert {finding.name for finding in told} == wrong & {'everything dropped', 'dead layer'}


def test_signal_in_the_variance_is_told() -> None:
    # The KL depends on alpha alone: pressed hard, the mean vanishes and the variance works on.
    # The label is how large an input is, which the spread of many units tells as well.
    facts = trained('size', {'Dense_0': 1000.0, 'Dense_1': 0.0}, warmup=(0.0, 1.0))
    assert facts['sampled_error'] < 0.1
    assert facts['deterministic_error'] > 0.4
    found = svd.diagnose(**facts)
    assert found.names[-1] == 'signal in the variance'
    assert set(found.names) <= {'signal in the variance', 'dead layer'}
    assert 'mean weights are wrong on 50.0 %' in ' '.join(str(found).split())


def test_a_tree_that_is_not_trained_gets_a_note() -> None:
    params = {'a': {'kernel': jax.random.normal(jax.random.key(0), (50, 50)) / 50}}
    full = svd.variational(params)
    found = svd.diagnose(full)
    assert found.names == ['untrained']
    assert found.is_healthy
    assert 'note: not trained yet' in str(svd.sparsity(full))
    assert svd.sparsity(params).warnings == ()
    assert svd.sparsity(svd.sparsify(full)).warnings == ()


@pytest.mark.parametrize(
    ('init', 'names'),
    [(-8.0, ['untrained']), (-1.0, ['noisy start']), (9.0, ['everything dropped'])],
)
def test_a_start_with_too_much_noise_is_told(init: float, names: list[str]) -> None:
    params = {'a': {'kernel': jax.random.normal(jax.random.key(0), (50, 50)) / 10}}
    found = svd.diagnose(svd.variational(params, log_sigma2_init=init))
    assert found.names == names
    assert found.is_healthy == (names == ['untrained'])
    assert names == ['untrained'] or 'log_sigma2_init is too high' in ' '.join(str(found).split())


def test_a_layer_that_starts_at_zero_is_told() -> None:
    tree = svd.variational({'a': {'kernel': jnp.ones(4)}, 'b': {'kernel': jnp.zeros(4)}})
    dead, note = svd.sparsity(tree).warnings
    assert (dead.name, note.name) == ('dead layer', 'untrained')
    assert 'no weight of b is left' in dead.text
    assert 'exactly zero' in dead.text
    assert 'smaller KL weight' in dead.text  # svd.shrink makes zeros of what training dropped


@pytest.mark.parametrize('leaf', ['kernel', 'log_sigma2'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_told_before_all_else(leaf: str, value: float) -> None:
    tree = svd.variational({'a': {'kernel': jnp.ones(4)}, 'b': {'kernel': jnp.ones(4)}})
    tree['b'][leaf] = tree['b'][leaf].at[1].set(value)
    (found,) = svd.diagnose(tree).findings
    assert found.name == 'not finite'
    assert found.text.startswith('b: ')


def test_a_start_that_differs_from_weight_to_weight_has_to_be_given() -> None:
    start = {'kernel': jnp.ones(100), 'log_sigma2': jnp.linspace(-10, -8, 100)}
    nearly = {**start, 'log_sigma2': start['log_sigma2'] + 0.01}
    assert svd.diagnose(nearly).names == ['nothing dropped']
    assert svd.diagnose(nearly, initial=start).names == ['stuck']
    far = {**start, 'log_sigma2': start['log_sigma2'] + jnp.linspace(0, 14, 100)}
    assert svd.diagnose(far, initial=start).names == []
    assert svd.diagnose(far, {'kernel': 7.0}).names == ['nothing dropped']


def test_metrics_of_the_training_step_are_what_diagnose_takes() -> None:
    model, tx, (x, labels) = svd.linen.Dense(3), optax.sgd(0.1), data('argmax')
    for broken, names in ((0.0, ['stuck']), (np.inf, ['untrained', 'step skipped'])):
        state = svd.TrainState.create(jax.jit(model.init)(jax.random.key(0), x), tx)
        step = svd.make_train_step(
            model.apply,
            lambda logits, targets: svd.classification_loss(logits, targets[0])[0] + targets[1],
            tx,
            num_data=NUM_DATA,
            kl_weight=0.5,
        )
        state, metrics = step(state, (x, (labels, jnp.float32(broken))), jax.random.key(1))
        assert svd.diagnose(state.params, metrics=metrics, num_data=NUM_DATA).names == names
        if not broken:
            for num_data, wrong in (
                (NUM_DATA * 20, 'KL too heavy'),
                (NUM_DATA // 20, 'KL too light'),
            ):
                found = svd.diagnose(state.params, metrics=metrics, num_data=num_data)
                assert found.names == [*names, wrong]
            assert svd.diagnose(state.params, metrics=metrics).names == names


def test_the_trained_network_of_this_package_looks_right() -> None:
    lenet = pretrained.load_pretrained('lenet300')
    assert svd.sparsity(lenet).warnings == ()
    found = svd.diagnose(lenet, deterministic_error=0.0193, sampled_error=0.0195)
    assert str(found) == 'nothing looks wrong'


@pytest.mark.parametrize(
    ('mean', 'sampled'), [(0.019, 0.02), (0.03, 0.02), (0.02, 0.0), (0.6, 0.5)]
)
def test_errors_that_differ_by_chance_are_no_finding(mean: float, sampled: float) -> None:
    tree = {'kernel': jnp.ones(3)}
    assert svd.diagnose(tree, deterministic_error=mean, sampled_error=sampled).names == []


@pytest.mark.parametrize(
    ('facts', 'message'),
    [
        ({'deterministic_error': 0.1}, 'pass both deterministic_error and sampled_error'),
        ({'deterministic_error': 1.9, 'sampled_error': 2.0}, 'must be a share, from 0 to 1'),
        ({'metrics': {'loss': 1.0, 'kl': 2.0}}, 'metrics lack data_term: they hold loss, kl'),
        ({'threshold': {'nothing': 1.0}}, "threshold: the pattern 'nothing'"),
        ({'params': {'bias': jnp.ones(2)}}, 'no leaf named .*: nothing to diagnose'),
    ],
)
def test_errors_say_what_is_missing(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        svd.diagnose(**{'params': {'kernel': jnp.ones(2), 'log_sigma2': jnp.ones(2)}, **facts})


def test_sparsity_prints_a_table_and_the_warnings_under_it() -> None:
    tree = {
        'Conv_0': {'kernel': jnp.ones(2000), 'bias': jnp.ones(9)},
        'Dense_0': {'kernel': jnp.ones(4), 'log_sigma2': jnp.asarray([9.0, 9.0, 9.0, -9.0])},
        'Dense_1': {'kernel': jnp.ones(5), 'log_sigma2': jnp.full(5, 9.0)},
    }
    printed = str(svd.sparsity(tree)).splitlines()
    lines = [line.split() for line in printed[:7] if '---' not in line]
    assert lines == [
        ['layer', 'nonzero', 'of', 'zeros', 'compression'],
        ['Conv_0', '2,000', '2,000', '0.00', '%', '1.0x'],
        ['Dense_0', '1', '4', '75.00', '%', '4.0x'],
        ['Dense_1', '0', '5', '100.00', '%', 'infx'],
        ['total', '2,001', '2,009', '0.40', '%', '1.0x'],
    ]
    assert len({len(line) for line in printed[:7]}) == 1
    assert printed[7].startswith('warning: no weight of Dense_1 is left: ')
    assert all(line.startswith('  ') for line in printed[8:])
    assert max(map(len, printed)) <= 79


def names(tree: Any) -> list[str]:
    return [finding.name for finding in svd.diagnose(tree).findings]


def test_scales_have_a_start_and_numbers_of_their_own() -> None:
    params = {'kernel': jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
    start = {'groups/': -6.0, '': -10.0}
    tree = svd.variational(params, log_sigma2_init=start, groups='outputs')
    assert names(tree) == ['untrained']
    scale = tree['groups']['outputs']['scale']
    tree['groups']['outputs']['scale'] = scale.at[0, 1].set(jnp.nan)
    assert names(tree) == ['not finite']


def test_what_was_pruned_before_is_no_noise() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(60, 40)) * (rng.random((60, 40)) < 0.1)
    params = {'kernel': jnp.asarray(kernel, jnp.float32)}
    assert names(svd.variational(params)) == ['untrained']
    assert names(svd.variational(params, log_sigma2_init=3.0)) == ['noisy start']
