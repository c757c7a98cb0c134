"""What docs/training.md shows works as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'training.md').read_text()
# The heading over a block, and the block.
BLOCKS = [
    (re.findall(r'^#+ (.*)$', PAGE[: match.start()], re.MULTILINE)[-1], match[1])
    for match in re.finditer(r'^```python\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
]
(_, SETUP), *REST = BLOCKS
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


def test_links_exist() -> None:
    targets = re.findall(r'\]\((?!https?:)([^)#]+)\)', PAGE)
    assert [target for target in targets if not (ROOT / 'docs' / target).exists()] == []
