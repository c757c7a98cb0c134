"""The benchmark of files: its arithmetic, and one run of it on a small training run."""

import dataclasses
import gzip
import json
import sys
from pathlib import Path

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import svd_jax as svd
from benchmarks import files, files_report, formats, large_file, tuning
from experiments import data, lenet300, models
from experiments.checkpoint import Checkpoints
from experiments.errors import UsageError
from experiments.training import Training
from run_folders import params_of, summary_of
from test_pretrained import PLAIN

pytestmark = pytest.mark.usefixtures('quick_compilation')


def sparse_tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def layer(*shape: int) -> dict:
        kernel = rng.standard_normal(shape).astype(np.float32)
        kernel[rng.random(shape) < 0.95] = 0
        return {'kernel': kernel, 'bias': rng.standard_normal(shape[-1]).astype(np.float32)}

    return {'Conv_0': layer(3, 3, 2, 8), 'Dense_0': layer(60, 40)}


def test_sizes_are_those_of_files_that_hold_the_tree(tmp_path):
    tree = sparse_tree()
    found = formats.sizes(tree)
    leaves = jax.tree.leaves(tree)
    assert found[formats.DENSE] == 4 * sum(leaf.size for leaf in leaves)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    np.savez_compressed(tmp_path / 'x.npz', **dict(zip('abcd', leaves, strict=True)))
    names = 4 * 2 * (len('Dense_0.kernel') - 1)  # each stands twice in the file
    assert abs(found['numpy.savez_compressed'] - (tmp_path / 'x.npz').stat().st_size) <= names
    # In the order in which flatten_dict goes through the tree, bias after kernel.
    dense = b''.join(layer[leaf].tobytes() for layer in tree.values() for leaf in layer)
    assert found['float32, gzip'] == len(gzip.compress(dense, 9))
    assert found['bfloat16, gzip'] < found['float32, gzip']
    assert svd.save(tmp_path / 'x.svd', tree) < min(
        size for name, size in found.items() if 'bfloat16' not in name
    )


def test_the_large_tree_is_resnet_50():
    shapes = large_file.resnet50_shapes()
    sizes = [np.prod(shape) for layer in shapes.values() for shape in layer.values()]
    assert sum(sizes) == 25_557_032  # as torchvision counts them
    assert sum('kernel' in layer for layer in shapes.values()) == 54


def test_a_random_tree_has_the_zeros_that_it_should():
    shapes = {'a': {'kernel': (3, 3, 20, 10), 'bias': (10,)}, 'b': {'kernel': (300, 10)}}
    tree = large_file.random_tree(shapes, 0.9)
    assert jax.tree.map(np.shape, tree) == shapes
    for layer in tree.values():
        assert np.mean(layer['kernel'] == 0) == pytest.approx(0.9, abs=0.01)
        kept = np.abs(layer['kernel'][layer['kernel'] != 0])
        assert kept.min() > np.std(layer['kernel'])  # the largest are kept
    assert np.all(tree['a']['bias'] != 0)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_time_and_memory_of_a_file_are_measured(monkeypatch):
    shapes = {'a': {'kernel': (1000, 1000), 'bias': (1000,)}}
    monkeypatch.setattr(large_file, 'resnet50_shapes', lambda: shapes)
    monkeypatch.setattr(large_file, '_alone', lambda function, *args: function(*args))
    found = large_file.measure(0.9)
    assert found['weights'] == 1_001_000
    assert found['nonzero'] == 101_000
    assert found['dense_bytes'] == 4 * found['weights']
    assert found['bytes'] < 0.12 * found['dense_bytes']
    assert min(found[name] for name in ('save_seconds', 'load_seconds')) > 0
    assert found['load_peak_bytes'] >= 0  # not alone here: it may take what the process had freed


def rows(exact: tuple[float, float], **by_tolerance: tuple[float, float]) -> list[files.Row]:
    found = [{'file': 'float32, exact', 'tolerance': None, 'test_error': exact[0],
              'test_loss': exact[1]}]  # fmt: skip
    for name, (error, loss) in by_tolerance.items():
        tolerance = float(name.removeprefix('t')) / 10
        found.append({'file': name, 'tolerance': tolerance, 'test_error': error, 'test_loss': loss})
    return found


def test_the_tolerance_is_the_largest_within_both_margins():
    assert files.choose_tolerance(rows((2, 1), t1=(2, 1), t2=(2.1, 1.04), t3=(3, 1))) == 0.2
    assert files.choose_tolerance(rows((2, 1), t1=(1.9, 1), t2=(2, 1.06))) == 0.1
    # One that is too coarse ends the search, even if a coarser one is fine by chance.
    assert files.choose_tolerance(rows((2, 1), t3=(2, 1), t2=(2.2, 1), t1=(2, 1))) == 0.1
    with pytest.raises(UsageError, match='smaller'):
        files.choose_tolerance(rows((2, 1), t1=(2.2, 1)))


@hypothesis.given(st.lists(st.tuples(st.floats(0, 4), st.floats(0.5, 2)), max_size=6))
def test_what_is_chosen_is_within_the_margins(measured):
    given = rows((2.0, 1.0), t1=(2.0, 1.0), **{f't{i + 2}': m for i, m in enumerate(measured)})
    chosen = files.choose_tolerance(given)
    for row in given:
        if row['tolerance'] and row['tolerance'] <= chosen:
            assert row['test_error'] <= 2.0 + files.ERROR_MARGIN + 1e-6
            assert row['test_loss'] <= 1.0 + files.LOSS_MARGIN + 1e-6


def test_evaluation_is_that_of_plain_flax():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1500, 28, 28, 1)).astype(np.float32)
    labels = rng.integers(0, 10, 1500)
    params = PLAIN['lenet300'].init(jax.random.key(0), images[:1])['params']
    error, loss = files.evaluate('lenet300', params, images, labels)
    logits = np.asarray(PLAIN['lenet300'].apply({'params': params}, images), np.float64)
    assert error == pytest.approx(100 * np.mean(logits.argmax(1) != labels), abs=0.1)
    chosen = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    assert loss == pytest.approx(np.mean(np.log(np.exp(logits).sum(1)) - chosen), rel=1e-4)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dense(10)(x.reshape(x.shape[0], -1)), 0.0


@pytest.mark.parametrize('shift', [0, 1])
def test_tuned_biases_make_the_mean_prediction_right(shift):
    """Where the loss is least, each class is predicted as often, in the mean, as it occurs."""
    dataset = data.load('mnist5k')
    rng = np.random.default_rng(0)
    layer = {
        'kernel': rng.normal(scale=0.03, size=(784, 10)).astype(np.float32),
        'bias': np.append(rng.normal(scale=0.2, size=9), 0).astype(np.float32),
    }
    model = Linear()

    def missing(params):
        images = data.preprocess(dataset.train_images, data.mean_image(dataset.train_images))
        predicted = jax.nn.softmax(model.apply({'params': params}, images, True)[0]).mean(0)
        occurs = np.bincount(dataset.train_labels) / len(images)
        return np.max(np.abs(predicted - occurs)[:9])  # the bias that is zero stays

    tuned = tuning.tune_biases(model, {'Dense_0': layer}, dataset, 40, shift)
    assert missing(tuned) < missing({'Dense_0': layer}) / 4
    np.testing.assert_array_equal(tuned['Dense_0']['kernel'], layer['kernel'])
    assert tuned['Dense_0']['bias'][9] == 0
    assert np.all(tuned['Dense_0']['bias'][:9] != layer['bias'][:9])


def split() -> data.Dataset:
    return data.validation_split(data.load('mnist5k'), 200)


def exact(folder: Path) -> dict:
    """The network that is left of a run, as it was trained."""
    return svd.sparsify(params_of(folder))


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that held images out, as far as a benchmark reads it."""
    out = tmp_path_factory.mktemp('trained')
    options = dataclasses.replace(lenet300.DEFAULTS, dataset='mnist5k', epochs=1, validation=200)
    training = Training(models.LeNet300, options, split())
    state = training.init()
    # Smaller weights are dropped; what is left is about as uncertain as trained weights are.
    log_sigma2 = jax.tree.map(lambda leaf: jnp.full_like(leaf, -9), state.params)
    params = {
        name: layer | {'log_sigma2': log_sigma2[name]['kernel']}
        for name, layer in state.params.items()
    }
    state = state.replace(params=params)
    (result,) = training.results(state)
    Checkpoints(out / 'checkpoints', 'lenet300', '', print).save(1, state, {})
    facts = {'experiment': 'lenet300', 'dataset': 'mnist5k', **options.identity()}
    (out / 'run.json').write_text(json.dumps(facts))
    (out / 'summary.json').write_text(json.dumps(result))
    return out


def test_a_run_measures_draws_and_ships(trained, tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text(f'before {files_report.MARK}old{files_report.MARK} after')
    options = files.Options(
        runs=(trained,), held_out=trained, tolerances=(0.1, 0.5), pictures=tmp_path,
        ship=tmp_path, page=page, out=tmp_path / 'files.json', tune=1,
    )  # fmt: skip
    files.main(options)
    report = json.loads(options.out.read_text())
    (run,) = report['runs']
    measured = {row['file']: row for row in run['files']}
    assert list(measured) == [
        'float32, exact', 'bfloat16, exact', 'tolerance 0.1', 'tolerance 0.5',
    ]  # fmt: skip
    sizes = [row['bytes'] for row in run['files']]
    assert sizes == sorted(sizes, reverse=True)
    summary, held_out = summary_of(trained), report['held_out']['files'][0]
    # The summary is of the held-out images; the curve of the run itself is of the test set.
    assert held_out['test_error'] == pytest.approx(summary['test_error'])
    everything = data.load('mnist5k')
    images = everything.test_images / np.float32(255) - split().train_images.mean(0) / 255
    wrong = np.argmax(PLAIN['lenet300'].apply({'params': exact(trained)}, images), -1)
    wrong = 100 * np.mean(wrong != everything.test_labels)
    assert measured['float32, exact']['test_error'] == pytest.approx(wrong)
    assert 0 < measured['float32, exact']['nonzero'] <= summary['nonzero']  # folded
    assert report['held_out']['chosen'] in (0.1, 0.5)

    (shipped,) = report['shipped']
    assert shipped['bytes'] == (tmp_path / 'lenet300.svd').stat().st_size
    assert shipped['command'] == (
        'python -m experiments.lenet300 --dataset mnist5k --seed 0 --epochs 1 '
        '--warmup 0.1 0.75 --validation 200'
    )
    assert shipped['command'] in (tmp_path / 'README.md').read_text()
    mean = svd.load(tmp_path / 'mean_image.svd')
    np.testing.assert_allclose(mean, split().train_images.mean(0), atol=0.5)
    assert (tmp_path / 'bytes_lenet300.png').read_bytes().startswith(b'\x89PNG')
    assert 'numpy.savez_compressed' in capsys.readouterr().out
    before, tables, after = page.read_text().split(files_report.MARK)
    assert (before, after) == ('before ', ' after')
    assert 'old' not in tables
    for row in run['files']:
        assert f'| {row["file"]} | {row["bytes"]:,} |' in tables


def test_a_page_without_a_place_for_tables_is_left_as_it_is(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(files_report.MARK)
    with pytest.raises(UsageError, match='two'):
        files_report.replace_tables(page, [])
    assert page.read_text() == files_report.MARK


def test_what_cannot_be_measured_is_said_in_a_line(trained, tmp_path):
    with pytest.raises(UsageError, match='holds no run'):
        files.main(files.Options(runs=(tmp_path,)))
    with pytest.raises(UsageError, match='--held-out'):
        files.main(files.Options(runs=(trained,), ship=tmp_path))


def test_an_unfinished_run_does_not_ship(trained, tmp_path):
    run = files.read_run(trained, None)._replace(epoch=0)
    with pytest.raises(UsageError, match='not finished'):
        files.ship(run, 0.1, 0, tmp_path)
    assert not list(tmp_path.iterdir())
