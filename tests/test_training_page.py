"""What docs/training.md shows works as it stands."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from pages import ROOT, code_blocks

pytestmark = pytest.mark.usefixtures('quick_compilation')
(_, SETUP), *REST = code_blocks(ROOT / 'docs' / 'training.md')
DEVICES = [code for heading, code in REST if heading == 'Several devices']
ALONE = [(heading, code) for heading, code in REST if heading != 'Several devices']


@pytest.fixture(scope='module')
def names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(SETUP, found)
    return found


@pytest.mark.parametrize('code', [code for _, code in ALONE], ids=[name for name, _ in ALONE])
def test_the_code_runs(code: str, names: dict[str, Any], tmp_path, monkeypatch) -> None:
    assert 'assert ' in code  # it says what should hold, too
    monkeypatch.chdir(tmp_path)
    # The page draws with one key what it compares, and arrays of different rank are its own affair.
    with jax.debug_key_reuse(False), jax.numpy_rank_promotion('allow'):
        exec(code, dict(names))


def test_the_code_for_several_devices_runs_on_two(tmp_path: Path) -> None:
    assert len(DEVICES) == 2
    blocks = [SETUP, 'assert len(jax.devices()) == 2', *DEVICES]
    environment = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    }
    ran = subprocess.run(
        [sys.executable, '-c', '\n'.join(blocks)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
