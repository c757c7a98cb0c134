"""experiments.baselines against the papers, and experiments.compare from its command line on."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from scipy import integrate, stats

from experiments import baselines, compare, results, summaries
from experiments.errors import UsageError

pytestmark = pytest.mark.usefixtures('quick_compilation')

SHAPES = {'Conv_0': (3, 3, 1, 4), 'Dense_0': (20, 10)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}


def small(seed: int = 0) -> dict[str, Any]:
    """Two layers, random weights."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32),
            'bias': jnp.zeros(shape[-1]),
        }
        for name, shape in SHAPES.items()
    }


def zeros(tree: dict[str, Any]) -> dict[str, int]:
    return {name: int(np.sum(np.asarray(own['kernel']) == 0)) for name, own in tree.items()}


def train(
    pruning: optax.GradientTransformation, steps: int, params: dict[str, Any]
) -> list[dict[str, Any]]:
    """The parameters after every step of a regression with noise that moves every weight."""
    tx = optax.chain(optax.adam(0.05), pruning)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(leaves, keys, strict=True)
        noise = [0.3 * leaf + jax.random.normal(own, leaf.shape) for leaf, own in pairs]
        updates, state = tx.update(jax.tree.unflatten(treedef, noise), state, params)
        return optax.apply_updates(params, updates), state

    state, found = tx.init(params), []
    for key in jax.random.split(jax.random.key(7), steps):
        params, state = step(params, state, key)
        found.append(jax.device_get(params))
    return found


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('count', [0, 1, 17, 99, 100])
def test_largest_against_sorting(count: int) -> None:
    scores = np.abs(np.random.default_rng(1).normal(size=100)).astype(np.float32)
    expected = np.zeros(100, bool)
    expected[np.argsort(-scores)[:count]] = True
    found = baselines.largest(jnp.asarray(scores), count)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        jax.jit(baselines.largest)(jnp.asarray(scores), jnp.int32(count)), expected
    )


def test_largest_of_equal_scores_are_exactly_so_many() -> None:
    scores = jnp.asarray([2.0, 0.0, 1.0, 1.0, -1.0, 1.0, 0.0, -1.0])
    order = [0, 2, 3, 5, 1, 6, 4, 7]  # of equal ones, the first; -1 last
    for count in range(9):
        kept = np.flatnonzero(baselines.largest(scores, count))
        assert sorted(order[:count]) == kept.tolist()


def test_pruning_all_layers_together_against_sorting() -> None:
    params = small()
    own = {k: np.asarray(v) for k, v in baselines.kernels(params).items()}
    found = baselines.prune(
        baselines.magnitude(baselines.kernels(params)), baselines.all_kept(params), 0.9
    )
    every = np.sort(np.concatenate([np.abs(kernel).ravel() for kernel in own.values()]))
    border = every[round(0.9 * every.size)]
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, np.abs(own[name]) >= border)
    shares = [float(np.mean(mask)) for mask in found.values()]
    assert shares[0] != pytest.approx(shares[1], abs=1e-3)  # not layer by layer


def test_kernels_of_nested_trees_and_no_others() -> None:
    tree = {'Block_0': small(), 'Norm_0': {'scale': jnp.ones(3)}}
    assert list(baselines.kernels(tree)) == ['Block_0/Conv_0', 'Block_0/Dense_0']
    masks = {name: jnp.zeros_like(own, bool) for name, own in baselines.kernels(tree).items()}
    found = baselines.masked(tree, masks)
    assert zeros(found['Block_0']) == SIZES
    np.testing.assert_array_equal(found['Norm_0']['scale'], 1)


# --- Gradual pruning ------------------------------------------------------------------------------


def test_schedule_is_the_papers_formula() -> None:
    begin, every, prunings, final = 300, 50, 12, 0.87
    for t in range(begin, begin + prunings * every + 1, every):
        # Equation 1 of Zhu & Gupta with s_i = 0.
        expected = final + (0 - final) * (1 - (t - begin) / (prunings * every)) ** 3
        found = final * baselines.cubic(t, begin, prunings * every)
        assert float(found) == pytest.approx(expected, abs=1e-6)
    assert [float(baselines.cubic(t, 300, 600)) for t in (0, 300, 900, 5000)] == [0, 0, 1, 1]


@pytest.mark.parametrize('sparsity', [{'Conv_0': 0.5, 'Dense_0': 0.93}, 0.9])
def test_gradual_pruning_has_the_asked_zeros_at_every_step(sparsity: Any) -> None:
    begin, every, end, steps = 4, 3, 21, 30  # prunings at 4, 7, ..., 19
    pruning = baselines.gradual_pruning(sparsity, begin, end, every)
    history = train(pruning, steps, small())
    before, changes = dict.fromkeys(SHAPES, 0), set()
    for t, params in enumerate(history):
        last = min(t, 19) - (min(t, 19) - begin) % every
        share = 0 if t < begin else 1 - (1 - (last - begin) / 15) ** 3
        found = zeros(params)
        if isinstance(sparsity, dict):
            for name, size in SIZES.items():
                assert found[name] == round(share * round(sparsity[name] * size))
        else:
            assert sum(found.values()) == round(share * round(sparsity * sum(SIZES.values())))
        if found != before:
            changes.add(t)
        before = found
    assert changes == {7, 10, 13, 16, 19}  # at 4, the formula gives 0
    assert np.all(history[-1]['Conv_0']['bias'] != 0)


def test_what_is_pruned_was_the_smallest_and_never_comes_back() -> None:
    sparsity = {'Conv_0': 0.5, 'Dense_0': 0.9}
    history = train(baselines.gradual_pruning(sparsity, 2, 14, 3), 25, small())
    for name in SHAPES:
        kernels = np.stack([params[name]['kernel'].ravel() for params in history])
        gone = kernels == 0
        assert np.all(gone[:-1] <= gone[1:])  # masks only grow
        assert 0 < gone[6].sum() < gone[-1].sum()
        # What is left goes on being trained.
        assert np.all((kernels[-1] != kernels[-2]) | gone[-1])


def test_each_pruning_takes_the_smallest_of_the_weights_as_they_are_then() -> None:
    params, rng = small(), np.random.default_rng(5)
    tx = baselines.gradual_pruning({'Conv_0': 0.5, 'Dense_0': 0.9}, 0, 8, 2)
    state, prunings = tx.init(params), 0
    update = jax.jit(tx.update)
    for _ in range(9):
        moves = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype('f4'), params)
        moved = jax.tree.map(np.add, params, moves)
        updates, state = update(moves, state, params)
        after = optax.apply_updates(params, updates)
        for name in SHAPES:
            was, now = (np.asarray(own[name]['kernel']) for own in (params, after))
            size = np.abs(moved[name]['kernel'])
            new = (now == 0) & (was != 0)
            if new.any():
                prunings += 1
                assert size[new].max() <= size[now != 0].min()
            np.testing.assert_allclose(np.abs(now)[now != 0], size[now != 0], rtol=1e-6)
        params = after
    assert prunings == 7  # at 2, 4, 6 and 8; rounding leaves the smaller layer none at 8


def test_random_pruning_keeps_the_share_of_each_layer_and_ignores_the_weights() -> None:
    sparsity = {'Conv_0': 0.5, 'Dense_0': 0.9}
    gone = []
    for seed, params in ((0, small(0)), (0, small(1)), (1, small(0))):
        score = baselines.random_score(seed)
        history = train(baselines.gradual_pruning(sparsity, 1, 9, 2, score), 12, params)
        assert zeros(history[-1]) == {'Conv_0': 18, 'Dense_0': 180}
        assert np.all(
            (history[4]['Dense_0']['kernel'] != 0) | (history[-1]['Dense_0']['kernel'] == 0)
        )
        gone.append(history[-1]['Dense_0']['kernel'] == 0)
    np.testing.assert_array_equal(gone[0], gone[1])
    assert np.any(gone[0] != gone[2])


def test_no_steps_to_prune_in() -> None:
    with pytest.raises(ValueError, match='no 100 steps between begin=5 and end=50'):
        baselines.gradual_pruning(0.9, 5, 50)


def test_pruning_asks_for_the_parameters() -> None:
    tx = baselines.fixed_masks(baselines.all_kept(small()))
    with pytest.raises(ValueError, match='needs the parameters'):
        tx.update(small(), tx.init(small()))


# --- Iterated pruning -----------------------------------------------------------------------------


class Recorded:
    """Stands in for a training: a random walk of every weight that says what it was given."""

    def __init__(self, epochs: int) -> None:
        self.config = type('Config', (), {'epochs': epochs})
        self.tx = optax.chain(optax.sgd(1.0), baselines.fixed_masks(baselines.all_kept(small())))
        self.calls: list[tuple[int, Any, Any]] = []

    def init(self) -> Any:
        return compare.svd.TrainState.create({'params': small()}, self.tx)

    def epoch(self, state: Any, epoch: int, advance: Any) -> Any:
        rng = np.random.default_rng((epoch, len(self.calls)))
        gradients = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), state.params
        )
        updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        self.calls.append((epoch, jax.device_get(state.params), jax.device_get(params)))
        return state.replace(params=params, opt_state=opt_state), []


def test_iterated_pruning_rewinds_the_weights_that_are_left() -> None:
    training, sparsity, epochs = Recorded(4), {'Conv_0': 0.5, 'Dense_0': 0.84}, []
    state = compare.iterated(
        training, training.init(), sparsity, rounds=3, rewind=2, advance=lambda: epochs.append(1)
    )  # fmt: skip
    assert [epoch for epoch, *_ in training.calls] == [1, 2, 3, 4, 3, 4, 3, 4]
    assert len(epochs) == 8
    early = training.calls[1][2]
    assert zeros(early) == dict.fromkeys(SHAPES, 0)
    # After one pruning of two: the square root of what is left in the end.
    for call, share in ((4, {'Conv_0': 1 - 0.5**0.5, 'Dense_0': 0.6}), (6, sparsity)):
        before, started = training.calls[call - 1][2], training.calls[call][1]
        for name, size in SIZES.items():
            kernel = started[name]['kernel']
            left = kernel != 0
            assert np.sum(~left) == round(share[name] * size)
            np.testing.assert_array_equal(kernel[left], early[name]['kernel'][left])
            np.testing.assert_array_equal(started[name]['bias'], early[name]['bias'])
            trained = np.abs(
                before[name]['kernel']
            )  # by which they were chosen, not the early ones
            assert trained[~left].max() <= trained[left].min()
    assert zeros(jax.device_get(state.params)) == {'Conv_0': 18, 'Dense_0': 168}


# --- L0 -------------------------------------------------------------------------------------------


LOCATIONS = np.asarray([-6.0, -2.5, -0.5, 0.0, 1.0, 3.0])


def numpy_gates(location: float, count: int) -> np.ndarray:
    """The hard concrete distribution by a logistic draw, as its section 4 describes it."""
    logistic = np.random.default_rng(3).logistic(size=count)
    s = 1 / (1 + np.exp(-(logistic + location) / (2 / 3)))
    return np.clip(s * 1.2 - 0.1, 0, 1)


@pytest.mark.parametrize('location', LOCATIONS)
def test_a_gate_is_open_as_often_as_drawn_ones_are(location: float) -> None:
    drawn = numpy_gates(location, 200_000) > 0
    found = float(baselines.open_probability(jnp.float32(location)))
    assert found == pytest.approx(drawn.mean(), abs=5 * np.sqrt(found * (1 - found) / 200_000))
    # Equation 12, in the numbers of the paper.
    expected = 1 / (1 + np.exp(-(location - 2 / 3 * np.log(0.1 / 1.1))))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('location', LOCATIONS)
def test_drawn_gates_have_the_distribution_of_numpys(location: float) -> None:
    params = baselines.gated({'Dense_0': {'kernel': jnp.ones((200, 100))}})
    params['Dense_0']['gate'] = jnp.full((200, 100), location, jnp.float32)
    drawn = np.asarray(baselines.draw_gates(params, jax.random.key(4))['Dense_0']['kernel'])
    ours, theirs = drawn.ravel(), numpy_gates(location, 20_000)
    for border in (0.0, 1.0):
        assert np.mean(ours == border) == pytest.approx(np.mean(theirs == border), abs=0.02)
    assert stats.ks_2samp(ours, theirs).statistic < 0.02


def test_expected_l0_counts_open_gates() -> None:
    params = baselines.gated(small(), drop_rate=0.2)
    location = np.log(0.8 / 0.2)
    np.testing.assert_allclose(params['Dense_0']['gate'], location, rtol=1e-5)
    # P(gate > 0) from the density of the logistic distribution.
    least = -location + 2 / 3 * np.log((0.1 / 1.2) / (1 - 0.1 / 1.2))
    chance, _ = integrate.quad(stats.logistic.pdf, least, 60)
    found = float(baselines.expected_l0(params))
    assert found == pytest.approx(chance * sum(SIZES.values()), rel=1e-4)
    draw = jax.jit(baselines.draw_gates)
    draws = [
        sum(zeros(draw(params, key)).values()) for key in jax.random.split(jax.random.key(0), 50)
    ]
    left = sum(SIZES.values()) - np.mean(draws)
    assert left == pytest.approx(found, abs=4 * np.sqrt(sum(SIZES.values()) / 50) / 2)


def test_gates_of_the_trained_network() -> None:
    params = baselines.gated({'Dense_0': {'kernel': jnp.full((1, 6), 2.0), 'bias': jnp.ones(6)}})
    params['Dense_0']['gate'] = jnp.asarray(LOCATIONS, jnp.float32)[None]
    found = baselines.close_gates(params)
    assert found['Dense_0'].keys() == {'kernel', 'bias'}
    # Equation 13: sigmoid(log alpha) (zeta - gamma) + gamma, clipped.
    expected = np.clip(1.2 / (1 + np.exp(-LOCATIONS)) - 0.1, 0, 1)
    np.testing.assert_allclose(found['Dense_0']['kernel'][0], 2 * expected, rtol=1e-5)
    assert np.asarray(expected == 0).tolist() == [True, True, False, False, False, False]


# --- The comparison -------------------------------------------------------------------------------


SHORT = (
    '--dataset', 'mnist5k', '--epochs', '4', '--rounds', '2', '--batch-size', '400',
    '--prune-every', '3', '--learning-rate', '0.01', '--l0-weight', '3',
)  # fmt: skip
LAYERS = {'Dense_0': 235_200, 'Dense_1': 30_000, 'Dense_2': 1_000}
METHODS = ('l0', 'magnitude_global', 'imp_layerwise')
# Percent: 217,460, 21,600 and 520 zeros, 26,620 weights left.
ASKED = {'Dense_0': 100 * 217_460 / 235_200, 'Dense_1': 72.0, 'Dense_2': 52.0}


def main(*arguments: Any) -> None:
    """From the command line on, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['compare', *map(str, arguments)])
        compare.command_line()


@pytest.fixture(scope='module')
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Sparse VD is said to have chosen."""
    path = tmp_path_factory.mktemp('like') / 'summary.json'
    path.write_text(json.dumps({
        'experiment': 'lenet300', 'nonzero': 26_620, 'total': 266_200,
        'sparsity_per_layer': ASKED,
    }))  # fmt: skip
    return path


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory, like: Path, quick_compilation: None) -> Any:
    out = tmp_path_factory.mktemp('compare') / 'run'
    main('--out', out, *SHORT, '--like', like, '--methods', *METHODS)
    return out, json.loads((out / 'summary.json').read_text())


def test_a_run_writes_what_it_says(finished: Any) -> None:
    out, summary = finished
    assert {path.name for path in out.iterdir()} == {
        'run.json', 'runs.jsonl', 'summary.json', 'pictures'
    }  # fmt: skip
    assert (out / 'pictures/compare.png').read_bytes().startswith(b'\x89PNG')
    assert tuple(summary['methods']) == METHODS
    rows = [row for own in summary['methods'].values() for row in own]
    assert rows == [json.loads(line) for line in (out / 'runs.jsonl').read_text().splitlines()]
    for row in rows:
        assert 0 < row['test_error'] < 60  # nine of ten by chance
        assert row['compression'] == pytest.approx(266_200 / row['nonzero'])
        left = {k: (1 - p / 100) * LAYERS[k] for k, p in row['sparsity_per_layer'].items()}
        assert sum(left.values()) == pytest.approx(row['nonzero'])
    l0, together, layerwise = rows
    assert l0['setting'] == 'weight 3'
    assert together['nonzero'] == layerwise['nonzero'] == 26_620
    assert together['setting'] == layerwise['setting'] == '10.0 times'
    assert layerwise['sparsity_per_layer'] == pytest.approx(ASKED)
    assert together['sparsity_per_layer'] != pytest.approx(layerwise['sparsity_per_layer'], abs=1)
    # 4 epochs of 10 steps; iterated: 2 epochs, then from the first of these on another second.
    assert [row['steps'] for row in rows] == [40, 40, 30]


def test_the_page_of_results_shows_it(finished: Any, tmp_path: Path) -> None:
    _, summary = finished
    path = tmp_path / 'compare-lenet300.json'
    path.write_text(json.dumps(summary))
    page = results.page([(path, summaries.read(path))])
    section = page.split('## Beside other methods\n')[1].split('\n## ')[0]
    for method in METHODS:
        (row,) = summary['methods'][method]
        (line,) = (
            li for li in section.splitlines() if li.startswith(f'| {compare.LABELS[method]} |')
        )
        error, ratio = f'{row["test_error"]:.2f}', f'{row["compression"]:.1f}'
        assert f'| {row["setting"]} | 1 (0) | {error} | {ratio} |' in line
    assert 'LeNet-300-100' not in section  # no longer open
    assert '**svd_jax, LeNet-5-Caffe** | 3 (0 to 2) | **open**' in section
    # The command gives the options of the run again.
    commands = [line for line in section.splitlines() if line.startswith('python -m')]
    ours, still = (shlex.split(line, comments=True)[3:] for line in commands)
    found = tyro.cli(compare.Options, args=ours)
    assert found.epochs == 4
    assert (found.methods, found.l0_weight) == (METHODS, (3.0,))
    assert compare.targets(found)[0].per_layer == pytest.approx(
        {name: percent / 100 for name, percent in ASKED.items()}
    )
    assert tyro.cli(compare.Options, args=still).network == 'lenet5'


def test_a_killed_run_goes_on_with_what_is_missing(finished: Any, like: Path) -> None:
    out, summary = finished
    first, second, third = (out / 'runs.jsonl').read_text().splitlines()
    (out / 'runs.jsonl').write_text(f'{first}\n{second}\n{third[:40]}')
    (out / 'summary.json').unlink()
    made = []
    with pytest.MonkeyPatch.context() as patch:
        trained = compare.trained
        patch.setattr(
            compare, 'trained', lambda options, job, *rest: (
                made.append(job.method), trained(options, job, *rest)
            )[1],
        )  # fmt: skip
        main('--out', out, *SHORT, '--like', like, '--methods', *METHODS, '--resume')
    assert made == ['imp_layerwise']
    last = (out / 'runs.jsonl').read_text().splitlines()[-1]
    assert json.loads(last)['method'] == 'imp_layerwise'  # for the next --resume
    again = json.loads((out / 'summary.json').read_text())
    timed = ('train_seconds',)
    for method in METHODS:
        (before,), (after,) = summary['methods'][method], again['methods'][method]
        assert {k: v for k, v in before.items() if k not in timed} == {
            k: v for k, v in after.items() if k not in timed
        }


def test_a_folder_in_use_is_left_alone(finished: Any, like: Path, tmp_path: Path, capsys) -> None:
    out, _ = finished
    before = (out / 'runs.jsonl').read_text()
    base = ('--out', out, *SHORT, '--like', like, '--methods', *METHODS)
    for more, what in (
        ((), 'already holds a run'),
        (('--resume', '--learning-rate', '0.02'), 'other learning rate'),
        (('--resume', '--sparsity', '0.5'), 'other targets'),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(*base, *more)
        assert stopped.value.code == 2
        assert what in capsys.readouterr().err
    (tmp_path / 'thesis.tex').write_text('')
    with pytest.raises(UsageError, match='something else'):
        compare.run(compare.Options(dataset='mnist5k', methods=('dense',), out=tmp_path))
    assert (out / 'runs.jsonl').read_text() == before


def test_jobs_are_seed_by_seed() -> None:
    options = compare.Options(
        methods=('dense', 'sparse_vd', 'random'), sparsity=(0.9, 0.99), kl_weight=(0.5, 1.0),
        seeds=2, seed=5,
    )  # fmt: skip
    found = [job.key for job in compare.jobs(options, compare.targets(options))]
    settings = [
        ('dense', ''), ('sparse_vd', 'weight 0.5'), ('sparse_vd', 'weight 1'),
        ('random', '10.0 times'), ('random', '100.0 times'),
    ]  # fmt: skip
    assert found == [(*setting, seed) for seed in (5, 6) for setting in settings]


@pytest.mark.parametrize('network', ['lenet300', 'lenet5'])
def test_trainings_have_the_options_of_the_experiments(network: str) -> None:
    options = compare.Options(network=network, methods=('ard',), seed=3)
    (job,) = compare.jobs(options, [])
    defaults = summaries.defaults_of(network)
    assert defaults is not None
    dense = options.config(3)
    assert dense.identity() == defaults.identity() | {'method': 'dense', 'seed': 3}
    ard = options.config(3, kl_weight=(job.value,), kl='ard')
    assert ard.identity() == defaults.identity() | {'kl': 'ard', 'seed': 3}
    warmed = dataclasses.replace(options, warmup=(2.0, 10.0))
    assert warmed.config(3) == dense
    assert warmed.config(3, kl_weight=(1.0,)).kl_warmup == (2.0, 10.0)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'what'),
    [
        ((), 'how sparse shall pruning be?'),
        (('--sparsity', '1'), '--sparsity must lie'),
        (('--sparsity', '0.9', '0.9'), '--like and --sparsity name 10.0 times more than once'),
        (('--sparsity', '0.9', '--epochs', '0'), '--epochs must'),
        (('--sparsity', '0.9', '--seeds', '0'), '--seeds must'),
        (('--sparsity', '0.9', '--epochs', '19'), '--rounds leaves 1 of 19 epochs'),
        (('--sparsity', '0.9', '--rounds', '1'), '--rounds must'),
        (('--sparsity', '0.9', '--prune-between', '0.5', '0.5'), '--prune-between needs'),
        (('--sparsity', '0.9', '--prune-every', '9999'), '--prune-every must be at most'),
        (('--sparsity', '0.9', '--l0-weight', '0'), '--l0-weight needs'),
        (('--methods', 'sparse_vd', '--kl-weight', '-1'), '--kl-weight must'),
        (('--sparsity', '0.9', '--batch-size', '5000'), 'batch size 5000'),
        (('--like', 'nowhere.json'), 'nowhere.json is damaged'),
        (('--like', 'experiments/results/lenet5-sparse_vd-200epochs-seed0.json'), '--like '),
        (('--like', 'experiments/results/lenet300-dense-200epochs-seed0.json'), '--like '),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(
    arguments: tuple, what: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = Path(__file__).parents[1]
    arguments = tuple(root / a if a.startswith('experiments/') else a for a in arguments)
    with pytest.raises(SystemExit) as stopped:
        main('--dataset', 'mnist5k', '--out', tmp_path / 'run', *arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {what}')
    assert not (tmp_path / 'run').exists()
