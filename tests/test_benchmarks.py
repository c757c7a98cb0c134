"""The benchmark: its arithmetic, and one short run of it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import svd_jax as svd
from benchmarks import step_time
from benchmarks.flops import matrix_flops
from benchmarks.workloads import NUM_BATCHES, WORKLOADS, Variant, variants

pytestmark = pytest.mark.usefixtures('quick_compilation')

ROOT = Path(__file__).parents[1]


def result(implementation, framework, mode, milliseconds, num_samples=1, mib=100.0, flops=None):
    variant = Variant(implementation, framework, mode, num_samples)
    return {
        **variant._asdict(),
        'rounds_ms': milliseconds,
        'step_ms': {'median': float(np.median(milliseconds))},
        'peak_mib': mib,
        'flops': flops,
    }


def test_ratios_are_between_the_fastest_of_each_kind_round_by_round():
    results = [
        result('dense', 'jax', 'step', [1.0, 1.0, 9.0]),
        result('dense', 'jax', 'scan', [2.0, 2.0, 2.0]),
        result('svd_jax', 'jax', 'step', [2.0, 4.0, 6.0], mib=150.0),
        result('svd_jax', 'jax', 'scan', [7.0, 7.0, 7.0]),
        result('svd_jax', 'jax', 'scan', [20.0, 16.0, 30.0], num_samples=8),
        result('dense', 'torch', 'eager', [2.0, 2.0, 2.0]),
        result('hand-written', 'torch', 'compiled', [6.0, 8.0, 60.0]),
        result('cplxmodule', 'torch', 'eager', [90.0, 90.0, 90.0]),
    ]
    assert step_time.ratios(results) == {
        'fastest peer over svd_jax': 3.0,  # of 3, 2, 10
        'svd_jax over its dense': 2.0,  # of 2, 4, 2/3
        'memory of svd_jax over its dense': 1.5,
        'fastest peer over its dense': 4.0,
        '8 draws over 1': 5.0,
    }


def test_the_floor_is_the_flops_at_the_rate_of_large_products():
    results = [
        result('matrix product', 'jax', 'step', [4.0, 2.0], flops=1000),
        result('svd_jax', 'jax', 'scan', [6.0, 3.0], flops=500),  # 2 and 1 ms at that rate
        result('dense', 'jax', 'scan', [2.0, 1.0], flops=250),
    ]
    figures = step_time.ratios(results)
    assert figures['svd_jax over its floor'] == 3.0
    assert figures['our dense over its floor'] == 2.0


def dense_and_convolution(x, kernel, weight):
    x = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return x.reshape(x.shape[0], -1) @ weight


def test_flops_of_products_convolutions_and_loops():
    x, kernel, weight = jnp.ones((2, 6, 5, 3)), jnp.ones((3, 2, 3, 4)), jnp.ones((64, 7))
    once = 2 * (2 * 4 * 4) * (3 * 2 * 3) * 4 + 2 * 2 * 64 * 7
    assert matrix_flops(dense_and_convolution, x, kernel, weight) == once
    assert matrix_flops(jax.jit(dense_and_convolution), x, kernel, weight) == once

    def loop(x, kernel, weight):
        body = lambda c, _: (c, dense_and_convolution(x, kernel, weight))  # noqa: E731
        return jax.lax.scan(body, 0, length=5)

    assert matrix_flops(loop, x, kernel, weight) == 5 * once
    # Backwards, each operand's gradient costs as much as the operation.
    gradient = jax.grad(lambda w: jnp.sum((x[:, 0, :, 0] @ w) ** 2))
    assert matrix_flops(gradient, jnp.ones((5, 4))) == 2 * (2 * 2 * 5 * 4)


@pytest.mark.parametrize('workload', ['lenet300', 'lenet5', 'vgg'])
def test_a_variational_step_has_twice_the_flops_of_a_dense_one(workload):
    from benchmarks import ours

    model, tx, key = ours.network(workload), optax.sgd(1.0), jax.random.key(0)
    batch = tuple(array[0] for array in WORKLOADS[workload].batches())
    step = svd.make_train_step(model.apply, svd.classification_loss, tx, num_data=1)

    def flops(prepare):
        def start(x):
            variables = dict(model.init(key, x))
            variables['params'] = prepare(variables['params'])
            return svd.TrainState.create(variables, tx)

        return matrix_flops(step, jax.eval_shape(start, batch[0]), batch, key)

    dense = flops(lambda params: svd.sparsify(params, float('inf')))
    assert flops(lambda params: params) == 2 * dense


def test_ratios_leave_out_what_was_not_measured():
    assert step_time.ratios([result('svd_jax', 'jax', 'scan', [1.0])]) == {}


def test_batches_have_the_shapes_of_the_workload():
    for workload in WORKLOADS.values():
        inputs, targets = workload.batches()
        assert inputs.shape == (NUM_BATCHES, *workload.input_shape)
        assert targets.shape == (NUM_BATCHES, *workload.target_shape)
        assert 0 <= targets.min() <= targets.max() < workload.classes


@pytest.mark.parametrize('workload', list(WORKLOADS))
def test_our_networks_and_their_peers_have_the_same_number_of_weights(workload):
    torch = pytest.importorskip('torch', exc_type=ImportError)
    from benchmarks import ours, peers

    network, (inputs, _) = ours.network(workload), WORKLOADS[workload].batches()
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs[0])['params']
    ours_total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    handwritten = peers.network(workload, 'hand-written')
    theirs = sum(p.numel() for p in handwritten.parameters() if isinstance(p, torch.nn.Parameter))
    assert ours_total == theirs


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_short_run_writes_what_it_measured(tmp_path):
    out = tmp_path / 'step_time.json'
    command = [
        sys.executable, '-m', 'benchmarks.step_time', '--workloads', 'lenet300',
        '--only', 'jax, step', '--rounds', '2', '--seconds', '0.05', '--out', str(out),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    measured = report['workloads']['lenet300']
    assert [v['implementation'] for v in measured['variants']] == [
        'matrix product', 'dense', 'svd_jax',
    ]  # fmt: skip
    for variant in measured['variants']:
        assert len(variant['rounds_ms']) == 2
        assert 0 < variant['step_ms']['p10'] <= variant['step_ms']['p90']
        assert variant['peak_mib'] > 0
    assert measured['ratios'].keys() == {
        'svd_jax over its dense', 'memory of svd_jax over its dense',
        'svd_jax over its floor', 'our dense over its floor',
    }  # fmt: skip
    assert report['versions']['jax'] == jax.__version__


def test_a_run_that_times_nothing_says_so(capsys):
    with pytest.raises(SystemExit):
        step_time.main(step_time.Options(workloads=('lenet300',), only=('no such variant',)))
    assert 'svd_jax (jax, step)' in capsys.readouterr().err


def test_names_of_variants_tell_them_apart():
    for workload in WORKLOADS:
        names = list(map(str, variants(workload)))
        assert len(set(names)) == len(names)
