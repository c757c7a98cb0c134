"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import experiments
import svd_jax

MODULES = [
    module
    for package in (svd_jax, experiments)
    for module in (
        package.__name__,
        *(m.name for m in pkgutil.walk_packages(package.__path__, f'{package.__name__}.')),
    )
]


@pytest.mark.usefixtures('quick_compilation')
@pytest.mark.parametrize('name', MODULES)
def test_examples_in_docstrings(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize(
    'name',
    [
        *(
            f'svd_jax.{name}'
            for name in (
                'backend',
                'compaction',
                'cost',
                'diagnosis',
                'export',
                'file',
                'inspection',
                'linen',
                'log_normal',
                'math',
                'noise',
                'pretrained',
                'runtime',
                'table',
                'nnx',
                'train',
                'transform',
                'tree',
            )
        ),
        'experiments.augment',
        'experiments.averaging',
        'experiments.budget',
        'experiments.distillation',
        'experiments.stream',
    ],
)
def test_there_are_examples_to_run(name: str) -> None:
    module = importlib.import_module(name)
    assert sum(len(test.examples) for test in doctest.DocTestFinder().find(module)) > 0
