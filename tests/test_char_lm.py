"""experiments.char_lm: windows of a text, causal models, and runs that agree with NumPy."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import svd_jax as svd
from experiments import char_lm, text
from experiments.errors import UsageError
from experiments.language_models import LSTM, Transformer
from run_folders import (
    interrupted_in_the_second_epoch,
    main,
    metrics_of,
    params_of,
    summary_of,
    without_times,
)

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compiled_once', 'no_pictures')
LENGTH = 8
SHORT = ('--length', str(LENGTH), '--width', '8', '--batch-size', '50', '--checkpoint-seconds', '0')
MODELS = [LSTM(7, embedding=5, width=6), Transformer(7, width=8, depth=2, heads=2, length=LENGTH)]


# --- Texts and their windows ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6,000 characters."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(['to be', 'or not', 'that is', 'the question,\n'], 2000)
    path = tmp_path_factory.mktemp('text') / 'words.txt'
    path.write_text(' '.join(chosen)[:6000])
    return path


def test_a_file_is_split_in_order(words: Path) -> None:
    corpus, content = text.load(str(words)), words.read_bytes()
    assert corpus.name == 'words.txt'
    assert corpus.alphabet == bytes(sorted(set(content)))
    assert [len(split) for split in corpus[2:]] == [5400, 300, 300]
    assert bytes(corpus.alphabet[token] for token in np.concatenate(corpus[2:])) == content
    assert all(split.dtype == np.int32 for split in corpus[2:])


def write_prepared(data_dir: Path, splits: dict[str, bytes]) -> None:
    """What `tfds build tiny_shakespeare --file_format=array_record` would write."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example

    directory = data_dir / 'tiny_shakespeare' / '1.0.0'
    directory.mkdir(parents=True)
    infos = []
    for split, content in splits.items():
        path = directory / f'tiny_shakespeare-{split}.array_record-00000-of-00001'
        writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
        example = tf_example.Example()
        example.features.feature['text'].bytes_list.value.append(content)
        writer.write(example.SerializeToString())
        writer.close()
        template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
        infos.append({'name': split, 'filepathTemplate': template, 'shardLengths': ['1'],
                      'numBytes': str(path.stat().st_size)})  # fmt: skip
    features = 'tensorflow_datasets.core.features'
    tree = {
        'pythonClassName': f'{features}.features_dict.FeaturesDict',
        'featuresDict': {
            'features': {
                'text': {'pythonClassName': f'{features}.text_feature.Text', 'text': {}}
            }
        },
    }  # fmt: skip
    info = {'fileFormat': 'array_record', 'name': 'tiny_shakespeare', 'splits': infos,
            'version': '1.0.0'}  # fmt: skip
    (directory / 'dataset_info.json').write_text(json.dumps(info))
    (directory / 'features.json').write_text(json.dumps(tree))


def test_reads_what_tfds_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {'train': b'First Citizen:\n', 'validation': b'?\n', 'test': b"ta'en"}
    write_prepared(tmp_path, splits)
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    for corpus in (text.load('tiny_shakespeare', tmp_path), text.load()):
        assert corpus.name == 'tiny_shakespeare'
        for tokens, content in zip(corpus[2:], splits.values(), strict=True):
            assert bytes(corpus.alphabet[token] for token in tokens) == content


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('no/such/file.txt', r'cannot read the text no/such/file.txt \(No such file'),
        ('tiny_shakespeare', r'not found in .*tfds build tiny_shakespeare --data_dir='),
    ],
)
def test_no_such_text(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        text.load(name, tmp_path)


@given(
    seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000), characters=st.integers(2, 200),
    length=st.integers(1, 20), batch_size=st.integers(1, 5),
)  # fmt: skip
def test_windows_lie_side_by_side(
    seed: int, epoch: int, characters: int, length: int, batch_size: int
) -> None:
    if characters < length * (batch_size + 1):
        with pytest.raises(UsageError, match='batch size'):
            text.starts(seed, epoch, characters, length, batch_size)
        return
    starts = text.starts(seed, epoch, characters, length, batch_size)
    np.testing.assert_array_equal(starts, text.starts(seed, epoch, characters, length, batch_size))
    assert starts.shape[1] == batch_size
    assert starts.dtype == np.int32
    # Inside of the text, with a target after the last character; no character twice; few left out.
    assert starts.min() >= 0
    assert starts.max() + length <= characters - 1
    assert len(set(starts.ravel() % length)) == 1
    assert len(set(starts.ravel())) == starts.size
    assert characters - starts.size * length < length * (batch_size + 1)


def test_windows_move_and_mix_from_epoch_to_epoch() -> None:
    epochs = [text.starts(0, epoch, 1000, 10, 9) for epoch in range(50)]
    assert {int(starts[0, 0]) % 10 for starts in epochs} == set(range(10))
    assert not any((np.diff(starts.ravel()) > 0).all() for starts in epochs)


@given(
    characters=st.integers(2, 60), length=st.integers(1, 12), context=st.integers(1, 12)
)  # fmt: skip
def test_evaluation_predicts_each_character_once(
    characters: int, length: int, context: int
) -> None:
    tokens = np.arange(100, 100 + characters)
    if context > length:
        with pytest.raises(UsageError, match='does not fit'):
            text.evaluation_windows(tokens, length, context)
        return
    inputs, targets = text.evaluation_windows(tokens, length, context)
    predicted = []
    for window, (given_, wanted) in enumerate(zip(inputs, targets, strict=True)):
        for position in np.flatnonzero(wanted >= 0):
            at = int(wanted[position]) - 100
            before = given_[: position + 1]
            np.testing.assert_array_equal(before, tokens[at - len(before) : at])
            assert len(before) >= context or window == 0
            predicted.append(at)
    assert predicted == list(range(1, characters))


# --- Models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('model', MODELS)
def test_a_character_reaches_no_prediction_before_it(model: LSTM | Transformer) -> None:
    """Row i has another character at position i; the last row is as it was."""
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.integers(0, 7, LENGTH), (LENGTH + 1, 1))
    np.fill_diagonal(tokens[:-1], (tokens[0] + 1) % 7)

    @jax.jit
    def initial_logits(tokens: jax.Array) -> jax.Array:
        return model.init_with_output(jax.random.key(1), tokens)[0]

    logits = np.asarray(initial_logits(tokens))
    assert logits.shape == (LENGTH + 1, LENGTH, 7)
    moved = np.abs(logits - logits[-1]).max(-1) > 1e-6
    np.testing.assert_array_equal(moved[:-1], np.triu(np.ones((LENGTH, LENGTH), bool)))


def test_transformer_has_positions_for_so_many() -> None:
    with pytest.raises(ValueError, match='9 characters are more than the 8'):
        MODELS[1].init(jax.random.key(0), jnp.zeros((1, LENGTH + 1), jnp.int32))


# --- Runs -----------------------------------------------------------------------------------------


def run(out: Path, words: Path, *options: str) -> dict:
    main(char_lm, *SHORT, '--dataset', str(words), '--out', str(out), *options)
    return summary_of(out)


def rows(out: Path) -> list[dict]:
    ours = ('characters_per_second',)
    return [{k: v for k, v in without_times(row).items() if k not in ours}
            for row in metrics_of(out)]  # fmt: skip


# So that two epochs drop some weights and keep others.
SPARSE = (
    '--epochs', '2', '--learning-rate', '0.02', '--log-sigma2-init', '-3', '--kl-weight', '0.5',
    '--warmup', '0', '1', '--log-sigma2-rate', '1',
)  # fmt: skip


@pytest.fixture(scope='module', params=['lstm', 'transformer'])
def finished(
    request: pytest.FixtureRequest, words: Path, tmp_path_factory: pytest.TempPathFactory,
    no_pictures: Callable[..., None],
) -> Path:  # fmt: skip
    out = tmp_path_factory.mktemp('finished') / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('experiments.pictures.write_all', no_pictures)
        run(out, words, '--model', request.param, *SPARSE)
    return out


def sparse_of(node: dict, threshold: float = 3.0) -> dict:
    """By NumPy: zeros where log(sigma^2 / weight^2) reaches the threshold."""
    if 'log_sigma2' not in node:
        return {k: sparse_of(v, threshold) if isinstance(v, dict) else v for k, v in node.items()}
    (name,) = node.keys() & {'kernel', 'embedding'}
    with np.errstate(divide='ignore'):
        log_alpha = node['log_sigma2'] - np.log(node[name].astype(np.float64) ** 2)
    rest = {k: v for k, v in node.items() if k != 'log_sigma2'}
    return rest | {name: np.where(log_alpha < threshold, node[name], 0)}


def weights_of(node: dict) -> list[np.ndarray]:
    found = []
    for name, value in node.items():
        if isinstance(value, dict):
            found += weights_of(value)
        elif name in ('kernel', 'embedding'):
            found.append(value)
    return found


def bits_per_character(name: str, params: dict, words: Path, split: str = 'test') -> float:
    """Character by character, each from a window of its own, of which it sees the past alone."""
    corpus = text.load(str(words))
    tokens = getattr(corpus, split)
    options = char_lm.Config(model=name, width=8, length=LENGTH)
    model = char_lm.make_model(options, len(corpus.alphabet))
    stride = LENGTH // 2 + 1  # with a context of at least half a window
    ends = np.arange(1, len(tokens))
    sizes = ends - np.maximum(0, -(-(ends - LENGTH) // stride)) * stride
    assert sizes.max() == LENGTH
    assert sizes[LENGTH:].min() == LENGTH // 2
    windows = np.zeros((len(ends), LENGTH), np.int32)
    for window, end, size in zip(windows, ends, sizes, strict=True):
        window[:size] = tokens[end - size : end]
    logits = np.asarray(jax.jit(model.apply)({'params': params}, windows), np.float64)
    logits = logits[np.arange(len(ends)), sizes - 1]
    right = logits[np.arange(len(ends)), tokens[ends]]
    return float(np.mean(np.log2(np.exp(logits).sum(-1)) - right / np.log(2)))


def test_summary_agrees_with_numpy(finished: Path, words: Path) -> None:
    summary, params = summary_of(finished), params_of(finished, 2)
    expected = {'experiment': 'char_lm', 'model': finished.name, 'method': 'sparse_vd', 'seed': 0,
                'dataset': 'words.txt', 'epochs': 2, 'evaluated_on': 'test split'}  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    assert {'train_seconds', 'steps_per_second', 'device', 'versions'} <= summary.keys()
    sparse, everything = sparse_of(params), sparse_of(params, np.inf)
    for name, tree in (('', sparse), ('_mean_weights', everything)):
        found = summary[f'bits_per_character{name}']
        np.testing.assert_allclose(found, bits_per_character(finished.name, tree, words), rtol=1e-5)
    followed = bits_per_character(finished.name, sparse, words, 'validation')
    np.testing.assert_allclose(summary['validation_bits_per_character'], followed, rtol=1e-5)
    last = metrics_of(finished)[-1]['bits_per_character']
    np.testing.assert_allclose(last, followed, rtol=1e-5)
    kept = sum(int(np.count_nonzero(weight)) for weight in weights_of(sparse))
    total = sum(weight.size for weight in weights_of(params))
    assert 0 < kept < 0.9 * total
    assert (summary['nonzero'], summary['total']) == (kept, total)
    assert summary['compression'] == pytest.approx(total / kept)
    assert len(summary['sparsity_per_layer']) == len(weights_of(params))


def test_files_of_a_run(finished: Path) -> None:
    summary, sparse = summary_of(finished), sparse_of(params_of(finished, 2))
    path = finished / 'model.svd'
    assert summary['file_bytes'] == path.stat().st_size
    np.testing.assert_equal(jax.tree.map(np.asarray, svd.load(path)), sparse)
    assert {'curves.png', 'log_alpha.png'} == {p.name for p in (finished / 'pictures').iterdir()}
    last = metrics_of(finished)[-1]
    assert last['epoch'] == 2
    assert last['characters_per_second'] > 0


def test_the_kl_is_divided_by_the_number_of_characters(finished: Path) -> None:
    last = metrics_of(finished)[-1]
    assert last['kl_weight'] == 0.5
    added = last['loss'] - last['data_term']
    np.testing.assert_allclose(added, 0.5 * last['kl'] / 5400, rtol=1e-3)


def test_log_variances_have_a_learning_rate_of_their_own(words: Path) -> None:
    """Adam's first step is as long as its learning rate, whatever the gradient."""
    options = char_lm.Config(width=8, length=LENGTH, learning_rate=0.01, log_sigma2_rate=3.0)
    tx = char_lm.TextTraining(options, text.load(str(words))).tx
    params = {'Dense_0': {name: jnp.ones(2) for name in ('kernel', 'log_sigma2', 'bias')}}
    gradients = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    steps, _ = tx.update(gradients, tx.init(params), params)
    for name, wanted in (('kernel', -0.01), ('log_sigma2', -0.03), ('bias', -0.01)):
        np.testing.assert_allclose(steps['Dense_0'][name], wanted, rtol=1e-5)


@pytest.mark.parametrize('finished', ['lstm'], indirect=True)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    finished: Path, words: Path, tmp_path: Path
) -> None:
    """In the second epoch, after its steps and before its row."""
    options = ('--model', finished.name, *SPARSE)
    with interrupted_in_the_second_epoch(), pytest.raises(SystemExit) as exit_:
        run(tmp_path / 'run', words, *options)
    assert exit_.value.code == 130
    assert len(metrics_of(tmp_path / 'run')) == 1
    with pytest.raises(SystemExit):
        run(tmp_path / 'run', words, *options)
    summary = run(tmp_path / 'run', words, *options, '--resume')
    np.testing.assert_equal(params_of(tmp_path / 'run', 2), params_of(finished, 2))
    assert rows(tmp_path / 'run') == rows(finished)
    assert without_times(summary) == without_times(summary_of(finished))


def test_a_dense_network_learns_and_is_a_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a period of five makes certain."""
    periodic = tmp_path / 'periodic.txt'
    periodic.write_text('abcad' * 1000)
    dense, sparse = tmp_path / 'dense', tmp_path / 'sparse'
    options = ('--model', 'transformer', '--epochs', '8', '--learning-rate', '0.02')
    summary = run(dense, periodic, *options, '--method', 'dense')
    assert summary['bits_per_character'] < 0.1
    assert summary['test_error'] < 1
    assert (summary['method'], summary['compression']) == ('dense', 1.0)
    assert f'bits per character {summary["bits_per_character"]:.3f}' in capfd.readouterr().out
    start = ('--pretrained', str(dense), '--epochs', '1', '--learning-rate', '1e-30')
    run(sparse, periodic, '--model', 'transformer', *start)
    found, wanted = sparse_of(params_of(sparse, 1), np.inf), params_of(dense, 8)
    np.testing.assert_equal(found, wanted)


def test_units_of_a_cell_are_dropped_with_its_weights(words: Path, tmp_path: Path) -> None:
    """Scales shared by the gates; the neurons that are left by NumPy, from the file that ships."""
    options = ('--groups', 'weights+units', '--gates', '--group-kl-weight', '3', '--epochs', '2')
    quick = ('--log-sigma2-init', '-1', '--log-sigma2-rate', '100', '--warmup', '0', '0')
    summary = run(tmp_path / 'run', words, *options, *quick)
    assert summary['groups'] == 'weights+units'
    assert summary['config']['gates']
    assert {name: total for name, (_, total) in summary['units'].items()} == {
        'Dense_0 inputs': 8,
        'OptimizedLSTMCell_0 hf+hg+hi+ho:inputs': 8, 'OptimizedLSTMCell_0 if+ig+ii+io:inputs': 64,
        **{f'OptimizedLSTMCell_0 h{gate}+i{gate}:outputs': 8 for gate in 'fgio'},
    }  # fmt: skip
    shipped = svd.load(tmp_path / 'run' / 'model.svd')
    cell, dense = shipped['OptimizedLSTMCell_0'], shipped['Dense_0']
    rows = [np.asarray(layer['kernel']).any(1) for layer in
            (cell['hi'], cell['hf'], cell['hg'], cell['ho'], dense)]  # fmt: skip
    neurons, state, read = (int(np.any(own, axis=0).sum()) for own in (rows, rows[:4], rows[4:]))
    assert summary['neurons'] == [neurons, 8]
    # Of a sequence: what the cell reads, times its gates; then the state, times the characters.
    characters, width = shipped['Embed_0']['embedding'].shape
    inputs = np.any([np.asarray(cell[f'i{gate}']['kernel']).any(1) for gate in 'ifgo'], 0).sum()
    left = (inputs + state) * 4 * neurons + read * characters
    assert summary['multiply_adds'] == LENGTH * left
    assert summary['multiply_adds_dense'] == LENGTH * ((width + 8) * 4 * 8 + 8 * characters)
    assert sum(left for left, _ in summary['units'].values()) < 8 + 8 + 64 + 4 * 8


def test_training_goes_on_on_a_smaller_network(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, shrink = [], svd.shrink

    def measured(*arguments: Any, **options: Any) -> svd.Shrunk:
        found = shrink(*arguments, **options)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(found.state.params)))
        return found

    monkeypatch.setattr(svd, 'shrink', measured)
    options = ('--groups', 'weights+units', '--group-kl-weight', '3', '--shrink', '1.01')
    quick = ('--log-sigma2-init', '-1', '--log-sigma2-rate', '100', '--warmup', '0', '0')
    out = tmp_path / 'run'
    summary = run(out, words, '--epochs', '2', *options, *quick)
    assert sizes[-1] < sizes[0]
    shipped = svd.load(out / 'model.svd')
    wanted = bits_per_character('lstm', shipped, words)
    np.testing.assert_allclose(summary['bits_per_character'], wanted, rtol=1e-5)


def test_a_budget_of_multiply_adds_is_kept(words: Path, tmp_path: Path) -> None:
    budget = ('--groups', 'units', '--unit-cost', 'flops', '--budget', '0.6', '--fine-tune', '1')
    summary = run(tmp_path / 'run', words, '--epochs', '1', *budget)
    share = summary['multiply_adds'] / summary['multiply_adds_dense']
    assert 0.4 < share <= 0.6


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'model': 'gru'}, '--model must be one of'),
        ({'length': 1}, '--length must be at least 2'),
        ({'width': 6.5}, '--width must be a whole number'),
        ({'width': 6, 'model': 'transformer'}, '--width must be a multiple of 4 for'),
        ({'depth': 0}, '--depth must be at least 1'),
        ({'gates': True}, '--gates is for --model lstm with --groups'),
        ({'model': 'transformer', 'groups': 'units', 'gates': True}, '--gates is for --model lstm'),
        ({'log_sigma2_rate': 0.0}, '--log-sigma2-rate must be above 0'),
        ({'epochs': 0}, '--epochs must be at least 1'),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(char_lm.DEFAULTS, **options)


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    short = tmp_path / 'short.txt'
    short.write_text('to be or not to be')
    with pytest.raises(UsageError, match='batch size 32 does not fit'):
        char_lm.run(char_lm.Config(dataset=str(short), out=tmp_path / 'out'))
