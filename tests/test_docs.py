"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import svd_jax

MODULES = ['svd_jax', *(m.name for m in pkgutil.walk_packages(svd_jax.__path__, 'svd_jax.'))]


@pytest.mark.parametrize('name', MODULES)
def test_examples_in_docstrings(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize('name', ['math', 'tree', 'train', 'linen', 'noise'])
def test_there_are_examples_to_run(name: str) -> None:
    module = importlib.import_module(f'svd_jax.{name}')
    assert sum(len(test.examples) for test in doctest.DocTestFinder().find(module)) > 0
