"""The experiments from their command line: results that agree with NumPy, and bad input."""

import dataclasses
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import svd_jax as svd
from experiments import data, lenet5, lenet300, models, summaries, training
from experiments.config import Config, command_line
from experiments.errors import UsageError
from run_folders import ROOT, main, metrics_of, params_of, refused, summary_of

pytestmark = pytest.mark.usefixtures('quick_compilation', 'no_pictures')


def run_lenet300(out: Path, *options: str) -> dict:
    """Trains in this process, from the command line on; returns the summary."""
    main(lenet300, '--dataset', 'mnist5k', '--out', str(out), *options)
    return summary_of(out)


def kept(layer: dict, threshold: float = 3.0) -> np.ndarray:
    """Where log(sigma^2 / weight^2) is below the threshold."""
    kernel = layer['kernel'].astype(np.float64)
    with np.errstate(divide='ignore'):
        return layer['log_sigma2'] - np.log(kernel**2) < threshold


def errors_in_percent(params: dict, masks: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """Of the network without its dropped weights: a forward pass in NumPy, in float64."""
    x = images.reshape(len(images), -1)
    for i in range(3):
        layer = params[f'Dense_{i}']
        x = x @ np.where(masks[f'Dense_{i}'], layer['kernel'], 0).astype(np.float64) + layer['bias']
        x = np.maximum(x, 0) if i < 2 else x
    return 100 * int(np.sum(x.argmax(1) != labels)) / len(labels)


def centred(images: np.ndarray, train_images: np.ndarray) -> np.ndarray:
    return images / 255 - train_images.mean(0) / 255


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two epochs, as a user starts them; the folder and what was printed."""
    out = tmp_path_factory.mktemp('cli') / 'run'
    command = [sys.executable, '-m', 'experiments.lenet300', '--dataset', 'mnist5k']
    done = subprocess.run(
        [*command, '--epochs', '2', '--out', str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    return out, done.stdout


# --- Results --------------------------------------------------------------------------------------


def test_summary_agrees_with_numpy(finished: tuple[Path, str]) -> None:
    out, _ = finished
    summary = summary_of(out)
    expected = {'experiment': 'lenet300', 'method': 'sparse_vd', 'recipe': 'paper', 'seed': 0,
                'dataset': 'mnist5k', 'epochs': 2, 'total': 266_200}  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    assert summary['device'].startswith('cpu') or 'gpu' in summary['device']
    assert {'jax', 'flax', 'svd_jax', 'python'} <= summary['versions'].keys()

    params, digits = params_of(out, 2), data.load('mnist5k')
    images = centred(digits.test_images, digits.train_images)
    masks = {name: kept(layer) for name, layer in params.items()}
    everything = {name: np.ones_like(mask) for name, mask in masks.items()}
    for name, chosen in (('test_error', masks), ('test_error_mean_weights', everything)):
        assert summary[name] == errors_in_percent(params, chosen, images, digits.test_labels)
    nonzero = sum(int(mask.sum()) for mask in masks.values())
    assert 0 < nonzero < 266_200
    assert summary['nonzero'] == nonzero
    assert summary['compression'] == pytest.approx(266_200 / nonzero, rel=1e-12)
    for name, mask in masks.items():
        zeros = 100 * (1 - mask.mean())
        assert summary['sparsity_per_layer'][name] == pytest.approx(zeros, rel=1e-9)
    assert summary['steps_per_second'] == pytest.approx(80 / summary['train_seconds'])


def test_files_of_a_run(finished: tuple[Path, str]) -> None:
    out, printed = finished
    rows = metrics_of(out)
    summary = summary_of(out)
    assert [row['epoch'] for row in rows] == [1, 2]
    for name in ('test_error', 'nonzero', 'compression', 'sparsity_per_layer'):
        assert rows[-1][name] == summary[name]
    assert sum(row['seconds'] for row in rows) <= summary['train_seconds']
    assert (out / 'model.svd').stat().st_size == summary['file_bytes']
    assert svd.sparsity(svd.load(out / 'model.svd')).nonzero == summary['nonzero']
    assert {'curves.png', 'log_alpha.png', 'weights.png', 'weights.gif'} <= {
        path.name for path in (out / 'pictures').iterdir()
    }
    assert list((out / 'tensorboard').glob('events.out.tfevents.*'))
    assert [path.name for path in sorted((out / 'frames').iterdir())] == [
        f'{epoch:05d}.npz' for epoch in range(3)
    ]
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [['epoch', '1'], ['epoch', '2']]
    assert f'{summary["test_error"]:.2f} % (test set, mnist5k)' in printed
    assert '266,200' in printed


def test_same_seed_same_bits(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Also in another process, with other checkpoints."""
    run_lenet300(tmp_path / 'again', '--epochs', '2', '--checkpoint-seconds', '0')
    np.testing.assert_equal(params_of(tmp_path / 'again', 2), params_of(finished[0], 2))


def test_another_seed_starts_elsewhere_with_other_batches(finished: tuple[Path, str]) -> None:
    digits = data.load('mnist5k')
    first, second = (
        training.Training(models.LeNet300, options(seed=seed), digits).init() for seed in (0, 1)
    )
    kernels = [np.asarray(state.params['Dense_0']['kernel']) for state in (first, second)]
    assert np.mean(kernels[0] != kernels[1]) > 0.9
    frame = np.load(finished[0] / 'frames' / '00000.npz')['first']
    np.testing.assert_array_equal(frame[frame != 0], kernels[0].astype(np.float16)[frame != 0])
    assert np.any(
        data.epoch_permutation(0, 1, 4000, 100) != data.epoch_permutation(1, 1, 4000, 100)
    )


def test_dense_then_pretrained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dense, sparse = tmp_path / 'dense', tmp_path / 'sparse'
    few = ('--epochs', '1', '--batch-size', '500')
    summary = run_lenet300(dense, '--method', 'dense', *few)
    assert summary['method'] == 'dense'
    assert summary['nonzero'] == summary['total'] == 266_200
    assert summary['compression'] == 1.0
    assert summary['test_error'] == summary['test_error_mean_weights']
    params, digits = params_of(dense, 1), data.load('mnist5k')
    assert not any('log_sigma2' in layer for layer in params.values())
    everything = {name: np.ones_like(layer['kernel']) for name, layer in params.items()}
    images = centred(digits.test_images, digits.train_images)
    assert summary['test_error'] == errors_in_percent(
        params, everything, images, digits.test_labels
    )

    capfd.readouterr()
    run_lenet300(sparse, '--pretrained', str(dense), *few)
    assert 'dense weights: those after epoch 1' in capfd.readouterr().out
    frame = np.load(sparse / 'frames' / '00000.npz')
    kernel = params['Dense_0']['kernel']
    log_alpha = -10.0 - np.log(np.float64(kernel) ** 2)
    np.testing.assert_array_equal(
        frame['first'], np.where(log_alpha < 3.0, kernel, 0).astype(np.float16)
    )

    for folder, why in ((sparse, 'other names or shapes'), (tmp_path, 'no checkpoint in')):
        with pytest.raises(UsageError, match=f'{why}.*--method dense'):
            lenet300.run(options(out=tmp_path / 'new', pretrained=folder))
    with pytest.raises(UsageError, match=r'is of lenet300, not of lenet5.*lenet5 --method dense'):
        lenet5.run(options(out=tmp_path / 'new', pretrained=dense))
    with pytest.raises(UsageError, match=r'on other examples: train one with.*--validation'):
        lenet300.run(options(out=tmp_path / 'new', pretrained=dense, validation=500))
    # Those leave the folder free for another try.
    assert not list((tmp_path / 'new').iterdir())


def options(**changes: object) -> Config:
    return dataclasses.replace(lenet300.DEFAULTS, **({'dataset': 'mnist5k'} | changes))


def test_lenet5(tmp_path: Path) -> None:
    # A thousand images to train on are enough to see that it learns.
    arguments = ['--dataset', 'mnist5k', '--validation', '3000', '--batch-size', '50']
    main(lenet5, *arguments, '--epochs', '1', '--out', str(tmp_path / 'run'))
    summary = summary_of(tmp_path / 'run')
    assert summary['experiment'] == 'lenet5'
    assert summary['total'] == 430_500
    params = params_of(tmp_path / 'run', 1)
    assert summary['nonzero'] == sum(int(kept(layer).sum()) for layer in params.values())
    assert list(summary['sparsity_per_layer']) == ['Conv_0', 'Conv_1', 'Dense_0', 'Dense_1']
    assert summary['test_error'] < 50.0


def test_validation_never_touches_the_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = data.load('mnist5k')
    spoilt = digits._replace(
        test_images=np.full_like(digits.test_images, 255), test_labels=digits.test_labels * 0 + 7
    )
    few = ('--validation', '500', '--epochs', '1', '--batch-size', '500')
    monkeypatch.setattr(data, 'load', lambda *_: spoilt)
    summary = run_lenet300(tmp_path / 'run', *few)
    assert summary['evaluated_on'] == '500 held out'
    split = data.validation_split(digits, 500)
    assert len(split.train_labels) == 3500
    params = params_of(tmp_path / 'run', 1)
    masks = {name: kept(layer) for name, layer in params.items()}
    images = centred(split.test_images, split.train_images)
    assert summary['test_error'] == errors_in_percent(params, masks, images, split.test_labels)
    # Seven steps of 500: the held-out images were not trained on.
    assert summary['steps_per_second'] * summary['train_seconds'] == pytest.approx(7)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ('--dataset mnist5', "unknown dataset 'mnist5'.*choose from.*mnist5k"),
        ('--dataset mnist --data-dir {tmp}', 'mnist not found in .*--data-dir'),
        ('--dataset mnist --data-dir {tmp}/no', 'missing or unreadable.*--data-dir'),
        ('--epochs 0', '--epochs must be at least 1'),
        ('--batch-size 0', '--batch-size must be at least 1'),
        ('--batch-size 4001', 'batch size 4001 does not fit: choose one from 1 to 4000'),
        ('--validation 4000', 'cannot hold out 4000'),
        ('--validation 3950', 'batch size 100 does not fit: choose one from 1 to 50'),
        ('--validation -1', '--validation must be at least 0'),
        ('--num-samples 0', '--num-samples must be at least 1'),
        ('--seed -1', '--seed must lie between 0'),
        ('--seed 4294967296', '--seed must lie between 0'),
        ('--learning-rate nan', '--learning-rate must be a finite number'),
        ('--learning-rate inf', '--learning-rate must be a finite number'),
        ('--learning-rate 0', '--learning-rate must be above 0'),
        ('--decay-from 1.5', '--decay-from must lie between 0 and 1'),
        ('--cycles 0', '--cycles must lie between 1 and the number of epochs'),
        ('--epochs 2 --cycles 3', '--cycles must lie between 1 and the number of epochs'),
        ('--threshold nan', '--threshold must be a finite number'),
        ('--log-sigma2-init=-inf', '--log-sigma2-init must be a finite number'),
        ('--warmup 5 2', '--warmup needs two epochs, 0 <= BEGIN <= END'),
        ('--warmup 0 inf', '--warmup needs two finite numbers'),
        ('--checkpoint-seconds -1', '--checkpoint-seconds must be at least 0'),
        ('--checkpoint-seconds nan', '--checkpoint-seconds must be a finite number'),
        ('--method dense --pretrained {tmp}', '--pretrained starts --method svd'),
        ('--method dense --threshold 2', '--threshold is for --method svd'),
        ('--method dense --no-mask-in-training', '--mask-in-training is for --method svd'),
        ('--method dense --warmup 0 1', '--warmup is for --method svd'),
        ('--out {file}', 'cannot make the folder .*choose another --out'),
        ('--out {file}/sub', 'cannot make the folder .*choose another --out'),
        ('--out /proc/new', 'cannot make the folder .*choose another --out'),
        ('--out {full}', 'is not empty and holds no run: choose another --out'),
    ],
)
def test_bad_input(
    arguments: str, match: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'file').touch()
    (tmp_path / 'full' / 'of things').mkdir(parents=True)
    names = {'tmp': tmp_path, 'file': tmp_path / 'file', 'full': tmp_path / 'full'}
    given = arguments.format(**names).split()
    if '--dataset' not in given:
        given += ['--dataset', 'mnist5k']
    if '--out' not in given:
        given += ['--out', str(tmp_path / 'out')]
    assert re.search(match, refused(capfd, lenet300, *given))
    # Nothing is left that would be in the way of the corrected command.
    assert not list((tmp_path / 'out').glob('*'))


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may write anywhere')
def test_folder_that_may_not_be_written_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o555)
    line = refused(capfd, lenet300, '--dataset', 'mnist5k', '--out', str(tmp_path))
    assert 'cannot write to' in line


@pytest.mark.parametrize(
    'arguments',
    [['--epochs', 'many'], ['--epochs', '1.5'], ['--method', 'magic'], ['--kl', 'x'],
     ['--warmup', '3'], ['--no-such-option'], ['--resume', 'yes']],
)  # fmt: skip
def test_what_tyro_refuses(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(lenet300, *arguments)
    assert exit_.value.code == 2
    said = capfd.readouterr().err
    assert 'Traceback' not in said
    assert arguments[0] in said or arguments[-1] in said


@pytest.mark.parametrize(
    'changes',
    [{'epochs': True}, {'epochs': 2.0}, {'epochs': '3'}, {'seed': None}, {'batch_size': 1.5},
     {'learning_rate': '0.1'}, {'learning_rate': True}, {'resume': 'no'}, {'method': 'Dense'},
     {'kl': 'none'}, {'warmup': 3.0}, {'warmup': (1.0,)}, {'warmup': (0.0, True)}],
)  # fmt: skip
def test_python_callers_cannot_pass_oddities(changes: dict) -> None:
    (name,) = changes
    with pytest.raises(UsageError, match=f'--{name.replace("_", "-")} '):
        Config(**changes)


def test_no_network_and_nothing_prepared(tmp_path: Path) -> None:
    """Whole, as a user meets it: one line, within seconds, with a proxy that leads nowhere."""
    nowhere = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy')}
    environment = os.environ | nowhere | {'HOME': str(tmp_path), 'TFDS_DATA_DIR': str(tmp_path)}
    command = [sys.executable, '-m', 'experiments.lenet300', '--dataset', 'mnist']
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {'PYTHONPATH': str(ROOT)}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ''
    assert len(done.stderr.splitlines()) == 1
    assert '--dataset mnist5k' in done.stderr


def test_help(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('COLUMNS', '100')
    with pytest.raises(SystemExit) as exit_:
        main(lenet300, '--help')
    assert exit_.value.code == 0
    said = capfd.readouterr().out
    assert 'LeNet-300-100' in said
    for field in dataclasses.fields(Config):
        assert f'--{field.name.replace("_", "-")}' in said
    assert '{None}' not in said


def test_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Config) -> None:
        raise KeyboardInterrupt

    experiment = types.SimpleNamespace(run=interrupted, DEFAULTS=Config(), __doc__='')
    with pytest.raises(SystemExit) as exit_:
        main(experiment)
    assert exit_.value.code == 130
    assert capfd.readouterr().err == 'interrupted: --resume goes on from the last checkpoint\n'


# --- Recipes --------------------------------------------------------------------------------------


def options_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    """What lenet300 would run with."""
    given: list[Config] = []
    monkeypatch.setattr(sys, 'argv', ['lenet300', *arguments])
    command_line(given.append, lenet300.DEFAULTS, 'description', lenet300.RECIPES)
    (options,) = given
    return options


def test_a_recipe_is_a_set_of_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options_of(monkeypatch) == lenet300.DEFAULTS
    assert options_of(monkeypatch, '--recipe', 'paper', '--epochs', '3').epochs == 3
    best = lenet300.RECIPES['best']
    assert best.identity() != lenet300.DEFAULTS.identity()
    assert options_of(monkeypatch, '--recipe', 'best') == best
    own = options_of(monkeypatch, '--seed', '4', '--recipe=best', '--shift', '2')
    assert own == dataclasses.replace(best, seed=4, shift=2)
    assert own.recipe == 'best'
    # The options alone say what is run.
    assert dataclasses.replace(own, recipe='paper').identity() == own.identity()
    assert summaries.changed(best, 'lenet300').keys() == {'shift', 'kl_weight', 'fine_tune'}


def test_a_recipe_that_there_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        options_of(monkeypatch, '--recipe', 'bes')
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert 'paper' in message
    assert 'best' in message
