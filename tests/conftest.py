"""Strict settings for every test: what JAX would let pass in silence is an error here."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Programs compile in half the time without XLA's newer way of writing kernels for a CPU, here and
# in the processes that tests start. A flag that XLA does not know ends the process: only for
# releases that were seen to have it. Tests marked `default_kernels` run without it, in a process of
# their own, which this variable is set for: XLA reads its flags once.
DEFAULT_KERNELS = 'SVD_JAX_TESTS_DEFAULT_KERNELS'
OLDER_KERNELS = metadata.version('jaxlib').startswith('0.10.') and DEFAULT_KERNELS not in os.environ
FLAG = '--xla_cpu_use_fusion_emitters=false'
# Without it: workers of pytest-xdist inherit what the process that starts them has set.
FLAGS = os.environ.get('XLA_FLAGS', '').replace(FLAG, '').strip()
if OLDER_KERNELS:
    os.environ['XLA_FLAGS'] = f'{FLAGS} {FLAG}'.strip()

# Arrays of different ranks broadcast only where the code says so, and a typed key is used once.
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)

hypothesis.settings.register_profile(
    'default',
    max_examples=25,
    deadline=None,  # the first example compiles
    derandomize='CI' in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('default')


# Files of few tests that take long. `--dist loadfile` begins with the files of most tests: it would
# come to these last, and end with one worker in one of them and the others idle.
LONG = (
    'test_notebooks.py', 'test_vgg.py', 'test_training.py', 'test_char_lm.py', 'test_resume.py',
    'test_units.py', 'test_random_labels.py', 'test_flax_models.py', 'test_shrinking.py',
    'test_models.py', 'test_gradient_variance.py', 'test_files_benchmark.py',
    'test_benchmarks.py', 'test_training_page.py', 'test_pages.py', 'test_cost.py',
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        'markers', "default_kernels: holds bits or rounding that XLA's older kernels do not keep"
    )
    # Prepended, so that what pyproject.toml lists may still make exceptions.
    config.getini('filterwarnings').insert(0, 'error')
    config.option.loadscopereorder = False  # but as below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path], item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not OLDER_KERNELS or pyfuncitem.get_closest_marker('default_kernels') is None:
        return None
    test = f'{pyfuncitem.path}::{pyfuncitem.name}'
    result = subprocess.run(
        (sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', test),
        env={**os.environ, 'XLA_FLAGS': FLAGS, DEFAULT_KERNELS: '1'},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    # Not skipped, nor missing: one test, and it passed.
    assert '1 passed' in result.stdout, result.stdout + result.stderr
    return True


@pytest.fixture(scope='module')
def quick_compilation() -> Iterator[None]:
    """For tests that compile much and compute little: half the time of the whole suite.

    The processes that such a test starts compile so, too: it may compare their bits with its own.
    """
    before = jax.config.read('jax_disable_most_optimizations')
    # What was compiled otherwise would go on being used, here or later, also where bits are
    # compared.
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
        jax.config.update('jax_disable_most_optimizations', True)
        yield
        jax.config.update('jax_disable_most_optimizations', before)
    jax.clear_caches()


def _configure_cache(options: dict[str, Any]) -> None:
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)


@pytest.fixture(scope='session')
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def compiled_once(compiled: Path) -> Iterator[None]:
    """For tests that compile much in this process: what they have in common is compiled once.

    Not for tests that look at stderr, where XLA speaks of it on some processors
    (jax-ml/jax#38445), nor for several processes: JAX warns of what another has half written.
    """
    options = {
        'jax_compilation_cache_dir': str(compiled),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    _configure_cache(options)
    yield
    _configure_cache(before)


@pytest.fixture(scope='module')
def no_pictures() -> Iterator[Callable[..., None]]:
    """For runs of which other tests see the pictures: they take two seconds for every network.

    Its value writes them, to be put back for a run of which they are looked at.
    """
    from experiments import pictures

    with pytest.MonkeyPatch.context() as patch:
        write_all = pictures.write_all
        patch.setattr(pictures, 'write_all', lambda *_: None)
        yield write_all
