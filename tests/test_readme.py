"""What the README shows works as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import svd_jax as svd

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def _blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', README, re.DOTALL | re.MULTILINE)


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = _blocks('python')
    names = {
        'key': jax.random.key(0),
        'x': jax.random.normal(jax.random.key(1), (32, 784)),
        'y': jnp.arange(32) % 10,
    }
    exec(code, names)
    assert np.isfinite(names['metrics']['loss'])
    logits, kl = names['Net']().apply({'params': names['sparse']}, names['x'])
    assert logits.shape == (32, 10)
    assert kl == 0  # the sparse tree has no posterior left
    shipped = svd.load('net.svd')
    assert jax.tree.map(jnp.shape, shipped) == jax.tree.map(jnp.shape, names['sparse'])


def test_run_and_test_are_one_command_each():
    for heading in ('Run', 'Test'):
        (section,) = re.findall(
            rf'^## {heading}\n(.*?)(?=^## |\Z)', README, re.DOTALL | re.MULTILINE
        )
        first = re.search(r'^```bash\n(.*?)^```', section, re.DOTALL | re.MULTILINE)
        assert first is not None
        assert first[1].count('\n') == 1


def test_links_and_pictures_exist():
    targets = re.findall(r'\]\((?!https?:)([^)#]+)\)', README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
