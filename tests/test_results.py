"""docs/results.md: it is up to date, its numbers are NumPy's, and its commands give its runs."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import tyro
from matplotlib.figure import Figure

from experiments import kl_approximation, published, results, summaries
from experiments.errors import UsageError
from pages import code_blocks, dead_links
from run_folders import ROOT

RESULTS = ROOT / 'experiments/results'
PAGE = ROOT / 'docs/results.md'
LENET5 = RESULTS / 'lenet5-sparse_vd-200epochs-seed0.json'


def main(*arguments: str | Path) -> int:
    """The command line; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['results', *map(str, arguments)])
        try:
            results.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


def parse(command: str) -> Any:
    """The options that a command line gives."""
    python, module, name, *arguments = shlex.split(command, comments=True)
    assert (python, module) == ('python', '-m')
    defaults = summaries.defaults_of(name.removeprefix('experiments.'))
    return tyro.cli(
        Annotated[type(defaults), tyro.conf.arg(name='')], default=defaults, args=arguments
    )


def edited(path: Path, **values: Any) -> None:
    """Changes a summary, or makes one of another."""
    source = path if path.exists() else LENET5
    path.write_text(json.dumps(json.loads(source.read_text()) | values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what is committed."""
    shutil.copytree(RESULTS, tmp_path / 'results')
    shutil.copy(PAGE, tmp_path)
    return tmp_path


def where(folder: Path) -> list[str | Path]:
    return ['--results', folder / 'results', '--page', folder / 'results.md']


def written(folder: Path) -> str:
    """The page, without drawing its pictures."""
    return results.page(results.read_all(folder / 'results'))


def section(page: str, title: str) -> str:
    return page.split(f'## {title}\n')[1].split('\n## ')[0]


def groups(experiment: str) -> list[summaries.Group]:
    read = results.read_all(RESULTS)
    return summaries.grouped(
        summaries.make_run(*pair) for pair in read if pair[1]['experiment'] == experiment
    )


# As a user runs it, which also says that the module is found beside the folder of its name.
def test_the_page_is_up_to_date():
    command = [sys.executable, *shlex.split(results.COMMAND)[1:], '--check']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    assert dead_links(PAGE) == []


def test_check_finds_a_changed_summary(folder, capsys):
    assert main('--check', *where(folder)) == 0
    edited(folder / 'results' / LENET5.name, test_error=0.79)
    assert main('--check', *where(folder)) == 1
    assert capsys.readouterr().err == (
        f'{folder}/results.md is not up to date: run `python -m experiments.results`\n'
    )


@pytest.mark.parametrize('change', ['append', 'remove'])
def test_check_finds_a_changed_page(folder, capsys, change):
    page = folder / 'results.md'
    page.unlink() if change == 'remove' else page.write_text(page.read_text() + '\n')
    assert main('--check', *where(folder)) == 1
    assert results.COMMAND in capsys.readouterr().err


def test_what_is_written_passes_the_check(folder):
    page = folder / 'results.md'
    page.unlink()
    assert main(*where(folder)) == 0
    assert page.read_text() == PAGE.read_text()
    assert main('--check', *where(folder)) == 0
    pictures = {path.name for path in (folder / 'pictures').iterdir()}
    expected = {'results_lenet300.png', 'results_lenet5.png', 'results_vgg.png'}
    if any(RESULTS.glob('compare-*.json')):
        expected.add('results_compare.png')
    assert pictures == expected


def test_numbers_are_means_and_standard_deviations_over_seeds():
    paths = [RESULTS / f'lenet300-sparse_vd-200epochs-seed{seed}.json' for seed in range(3)]
    runs = [json.loads(path.read_text()) for path in paths]
    row = next(
        line for line in section(PAGE.read_text(), 'LeNet-300-100 on MNIST').splitlines()
        if line.startswith('| **svd_jax, Sparse VD** | 200 |')
    )  # fmt: skip
    cells = [cell.strip() for cell in row.split('|')[1:-1]]
    errors, ratios = (np.array([run[k] for run in runs]) for k in ('test_error', 'compression'))
    layers = np.mean([[*run['sparsity_per_layer'].values()] for run in runs], axis=0)
    assert cells[2:6] == [
        '3 (0 to 2)',
        f'{errors.mean():.2f} ± {errors.std(ddof=1):.2f}',
        f'{ratios.mean():.1f} ± {ratios.std(ddof=1):.1f}',
        '-'.join(f'{percent:.1f}' for percent in layers),
    ]
    # The three trained at once, so each summary names the seconds of all.
    assert cells[6] == f'{runs[0]["train_seconds"] / 60:.0f} min'


def test_groups_differ_in_nothing_but_the_seed():
    found = groups('lenet300') + groups('lenet5') + groups('lenet500300')
    paths = sorted(run.path for group in found for run in group.runs)
    assert paths == sorted(RESULTS.glob('lenet*.json'))
    for group in found:
        assert group.seeds == sorted(set(group.seeds))
        configs = [run.summary['config'] | {'seed': 0} for run in group.runs]
        assert all(config == configs[0] for config in configs)
    earlier = [group for group in found if group.first.earlier]
    assert [(group.seeds, group.commands()) for group in earlier] == [([0, 1], [])]


@pytest.mark.parametrize('experiment', ['lenet300', 'lenet5'])
def test_a_command_gives_the_options_of_its_runs(experiment):
    for group in groups(experiment):
        if group.first.earlier:
            continue
        alone = [own for line in group.commands() for own in parse(line).alone().values()]
        for own, run in zip(alone, group.runs, strict=True):
            identity = own.identity()
            # What a summary is older than has its default.
            defaults = summaries.defaults_of(experiment).identity()
            assert identity == defaults | run.summary['config']
            assert own.dataset == run.summary['dataset']
            assert str(own.data_dir) == 'DIR'


def test_any_option_comes_back_from_its_command():
    values = {
        'dataset': 'mnist5k', 'epochs': 7, 'seed': 3, 'seeds': 2, 'pretrained': Path('a b/c'),
        'learning_rate': 1 / 3, 'warmup': (0.5, 2.0), 'kl': 'exact', 'kl_weight': (0.1, 2.0),
        'log_sigma2_init': -8.0, 'mask_in_training': False, 'flip': True,
    }  # fmt: skip
    defaults = summaries.defaults_of('lenet5')
    config = summaries.with_options(defaults, values, 'here')
    assert summaries.changed(config, 'lenet5') == values
    assert parse(summaries.command('lenet5', values)) == config


def test_commands_on_the_page_are_commands():
    lines = [
        line for _, block in code_blocks(PAGE, 'bash') for line in block.splitlines()
        if summaries.defaults_of(line.split()[2].removeprefix('experiments.'))
    ]  # fmt: skip
    assert len(lines) > 10
    for line in lines:
        parse(line)


def test_stretches_of_seeds():
    assert summaries.stretches([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]
    assert results.seeds([8, 0, 1, 2, 7, 5]) == '6 (0 to 2, 5, 7 to 8)'


def test_an_open_row_goes_when_its_runs_are_there(folder):
    title = 'LeNet-5-Caffe on MNIST'
    assert '**open**' in section(written(folder), title)
    for seed in range(1, 5):
        config = json.loads(LENET5.read_text())['config'] | {'seed': seed}
        path = folder / 'results' / f'lenet5-sparse_vd-200epochs-seed{seed}.json'
        edited(path, seed=seed, config=config, train_seconds=60.0 + seed)
        assert ('**open**' in section(written(folder), title)) == (seed < 4)
    assert '| 5 (0 to 4) |' in section(written(folder), title)


def test_runs_elsewhere_have_a_command_each(folder):
    config = json.loads(LENET5.read_text())['config'] | {'seed': 4}
    edited(folder / 'results/lenet5-later-seed4.json', seed=4, config=config)
    found = section(written(folder), 'LeNet-5-Caffe on MNIST')
    assert '| 2 (0, 4) |' in found
    assert re.search(r'\| \d+, \d+ \|$', found, re.MULTILINE)
    assert 'python -m experiments.lenet5 --dataset mnist --data-dir DIR --seed 4 ' in found


def test_errors_on_held_out_images_are_not_taken_for_test_errors(folder):
    config = json.loads(LENET5.read_text())['config'] | {'validation': 5000}
    edited(folder / 'results/held-out.json', config=config, evaluated_on='5000 held out')
    found = section(written(folder), 'LeNet-5-Caffe on MNIST')
    results, _, compared = found.partition('### What was compared to choose')
    assert 'held out' not in results
    assert 'errors on 5000 held out' in compared
    assert '--validation 5000' in compared.partition('```bash')[2]


def test_what_one_more_option_is_worth(folder):
    """Of two networks that differ in one option, and of no others."""
    config = json.loads(LENET5.read_text())['config'] | {'validation': 5000}
    for name, error, ratio, options in (
        ('paper', 1.25, 100.0, {}),
        ('shifted', 1.0, 80.0, {'shift': 1}),
        ('more', 1.5, 200.0, {'shift': 1, 'kl_weight': [3.0]}),
        ('longer', 0.5, 90.0, {'shift': 1, 'epochs': 300}),
        ('other', 1.1, 85.0, {'shift': 1, 'kl_weight': [3.0], 'flip': True, 'fine_tune': 2}),
    ):
        edited(
            folder / f'results/{name}.json', config=config | options, test_error=error,
            compression=ratio, evaluated_on='5000 held out',
        )  # fmt: skip
    _, _, found = section(written(folder), 'LeNet-5-Caffe on MNIST').partition('### What one more')
    rows = [line.split(' | ') for line in found.partition('###')[0].splitlines() if '→' in line]
    assert [(row[0], row[1], *row[-2:]) for row in rows] == [
        ('| `--epochs 300`', '`--shift 1`', '1.00 → 0.50', '80.0 → 90.0 |'),
        ('| `--kl-weight 3`', '`--shift 1`', '1.00 → 1.50', '80.0 → 200.0 |'),
        ('| `--shift 1`', "the paper's recipe", '1.25 → 1.00', '100.0 → 80.0 |'),
    ]


def test_layers_are_in_order_of_their_numbers():
    layers = ['Dense_0', 'Conv_10 inputs', 'Conv_9 inputs', 'Block_1/Conv_2', 'Block_1/Conv_11']
    assert summaries.in_order(layers) == [
        'Block_1/Conv_2', 'Block_1/Conv_11', 'Conv_9 inputs', 'Conv_10 inputs', 'Dense_0',
    ]  # fmt: skip


def test_a_network_without_weights(folder):
    edited(folder / 'results' / LENET5.name, compression=None, nonzero=0)
    assert 'no weight left (1 of 1)' in section(written(folder), 'LeNet-5-Caffe on MNIST')


def test_bytes_of_files_have_a_table_of_their_own(folder):
    edited(folder / 'results' / LENET5.name, file_bytes=8194)
    found = section(written(folder), 'LeNet-5-Caffe on MNIST')
    weights, _, files = found.partition('### By bytes of the file')
    assert '8,194' in files
    assert '8,194' not in weights
    for one in published.FILES['lenet5']:
        assert f'| {one.nbytes:,} |' in files


def test_points_have_the_numbers_of_their_commands():
    one = next(one for one in results.SECTIONS if one.experiment == 'lenet5')
    read = [pair for pair in results.read_all(RESULTS) if pair[1]['experiment'] == 'lenet5']
    runs, figure = [summaries.make_run(*pair) for pair in read], Figure()
    results.by_weights(one, results.drawn(runs), results.first_commands(runs), figure)
    page = section(PAGE.read_text(), one.title)
    # A row ends with the numbers of its commands, which the picture has the first of.
    rows = {
        numbers.split(',')[0]: row
        for row, numbers in re.findall(r'^(\|.*) \| ([\d, ]+) \|$', page, re.MULTILINE)[::-1]
    }
    texts = figure.axes[0].texts
    assert len(texts) > 3
    for text in texts:
        (ratio, error), row = text.xy, rows[text.get_text()]
        assert f'| {error:.2f}' in row
        assert f'| {ratio:.1f}' in row


def test_vgg_like_networks_by_width(folder):
    title = 'VGG-like networks on CIFAR, by width'
    errors = {('dense', 0.25): 15.0, ('dense', 1.5): 6.0, ('svd', 0.25): 16.0, ('svd', 1.5): 6.5}
    ratios = {0.25: 9.0, 1.5: 65.0}
    for own in (folder / 'results').glob('vgg-*.json'):
        own.unlink()
    assert 'pictures/results_vgg.png' not in section(written(folder), title)
    for (method, k), error in errors.items():
        start = None if method == 'dense' else f'runs/vgg-cifar10-dense-k{k:g}'
        config = {'method': method, 'k': k, 'pretrained': start}
        edited(
            folder / f'results/vgg-{method}-k{k:g}.json', experiment='vgg', dataset='cifar10',
            method='dense' if method == 'dense' else 'sparse_vd', config=config,
            test_error=error, compression=1.0 if method == 'dense' else ratios[k],
        )  # fmt: skip
    found = section(written(folder), title)
    assert 'pictures/results_vgg.png' in found
    made = 'python -m experiments.vgg --dataset cifar10 --data-dir DIR --pretrained'
    assert f'{made} runs/vgg-cifar10-dense-k0.25 --k 0.25 ' in found
    # What has been run is open no more.
    assert '**svd_jax, Sparse VD, k = 0.25, cifar10**' not in found
    assert '**svd_jax, Sparse VD, k = 0.5, cifar10**' in found

    # Of its options, this one is the only width: no line.
    edited(
        folder / 'results/vgg-svd-alone.json', experiment='vgg', dataset='cifar10',
        config={'k': 0.5, 'epochs': 6, 'pretrained': None}, test_error=17.0, compression=30.0,
    )  # fmt: skip
    figure, one = Figure(), next(one for one in results.SECTIONS if one.experiment == 'vgg')
    read = [pair for pair in results.read_all(folder / 'results') if pair[1]['experiment'] == 'vgg']
    results.by_width(one, results.drawn([summaries.make_run(*pair) for pair in read]), figure)
    assert not any(0.5 in line.get_xdata() for axes in figure.axes for line in axes.lines)
    drawn = [
        sorted(tuple(line.get_xydata().ravel()) for line in axes.lines if len(line.get_xdata()) > 1)
        for axes in figure.axes
    ]
    dense, sparse = (
        (0.25, errors[method, 0.25], 1.5, errors[method, 1.5]) for method in ('dense', 'svd')
    )
    assert dense in drawn[0]
    assert sparse in drawn[0]
    assert (0.25, 9.0, 1.5, 65.0) in drawn[1]
    assert not any(1.0 in line[1::2] for line in drawn[1])  # dense networks have all weights


def test_language_models_and_constants(folder):
    edited(
        folder / 'results/char_lm-lstm.json', experiment='char_lm', dataset='tiny_shakespeare',
        model='lstm', epochs=15, config={'model': 'lstm', 'epochs': 15, 'log_sigma2_rate': 4.0},
        bits_per_character=2.1234, validation_bits_per_character=2.0567,
        sparsity_per_layer={'Dense_0': 90.0}, evaluated_on='test split',
    )  # fmt: skip
    worst = {'exact': {'error': 1e-6, 'log_alpha': -1.5}}
    (folder / 'results/kl_approximation.json').write_text(
        json.dumps({
            'experiment': 'kl_approximation', 'constants': [0.1, 0.2, 0.3],
            'constants_of_the_notebook': [0.4, 0.5, 0.6],
            'errors': worst, 'errors_to_alpha_1': worst,
        })
    )  # fmt: skip
    (folder / 'results/gradient_variance.json').write_text(
        json.dumps(
            {
                'experiment': 'gradient_variance',
                'epochs': 20,
                'by_epoch': {
                    name: {
                        f'seed{seed}': [
                            {'bound': 7},
                            {'bound': bound, 'sparsity': 90, 'test_error': 2},
                        ]
                        for seed, bound in enumerate(bounds)
                    }
                    for name, bounds in (
                        ('additive', (-0.1, -0.2)),
                        ('multiplicative', (-0.4, -0.5)),
                    )
                },
                'findings': {
                    'gradient_variance': {'weights': {'bins_above_0': 9, 'additive_lower': 8}}
                },
            }
        )
    )
    page = written(folder)
    row = '| **svd_jax, Sparse VD** | 15 | 1 (0) | 0.78 | 2.057 | 2.123 | 279.2 | 90.0 |'
    assert row in section(page, 'Character language models')
    constants = section(page, 'The approximation of the KL divergence')
    assert '| **svd_jax** | 0.10000 | 0.20000 | 0.30000 |' in constants
    assert '| the paper | 0.63576 | 1.87320 | 1.48695 |' in constants
    assert f'| {kl_approximation.LABELS["exact"]} | 1e-06 | -1.50 | 1e-06 |' in constants
    noise = section(page, 'Additive against multiplicative noise')
    assert '| **additive** | 20 | 2 | -0.150 ± 0.071 | 90.0 ± 0.0 |' in noise
    assert '| **multiplicative** | 20 | 2 | -0.450 ± 0.071 |' in noise
    assert '| 8 of 9 (weights drawn) |' in noise
    assert '**open**' not in constants + noise


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"experiment": "lenet5", ', 'bad.json is damaged'),
        ('[1, 2]', 'bad.json is damaged'),
        ('{"method": "dense"}', 'bad.json is damaged'),
        ('{"experiment": "lenet5"}', 'bad.json lacks method, dataset, config'),
        ('{"experiment": "lenet6"}', "bad.json: no section of the page shows 'lenet6'"),
        ('{"experiment": "lenet5", "networks": {}}', 'bad.json is of several networks'),
    ],
)
def test_a_damaged_summary_is_named(folder, capsys, content, message):
    (folder / 'results/bad.json').write_text(content)
    before = (folder / 'results.md').read_text()
    for check in ([], ['--check']):
        assert main(*check, *where(folder)) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ')
        assert message in error
        assert error.count('\n') == 1
    assert (folder / 'results.md').read_text() == before


@pytest.mark.parametrize('option', [{'gone': 1}, {'epochs': 0}, {'kl_weight': [1.0, 1.0]}])
def test_options_that_cannot_be_are_named(tmp_path, option):
    path = tmp_path / 'bad.json'
    edited(path, config=option)
    with pytest.raises(UsageError, match=rf'bad\.json.*{next(iter(option)).replace("_", ".")}'):
        summaries.make_run(path, summaries.read(path))


def test_the_same_run_twice_is_refused(folder, capsys):
    edited(folder / 'results/again.json')
    assert main(*where(folder)) == 2
    error = capsys.readouterr().err
    assert 'again.json' in error
    assert LENET5.name in error


def test_published_numbers_have_their_sources():
    tables = (published.WEIGHTS, published.RATES, published.UNITS, published.FILES)
    page = PAGE.read_text()
    for one in itertools.chain.from_iterable(row for each in tables for row in each.values()):
        assert one.source.markdown() in page
        assert f'| {one.method} |' in page
