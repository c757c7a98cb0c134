"""What the README shows works as it stands."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import svd_jax as svd
from pages import ROOT, code_blocks, dead_links, links

PAGE = ROOT / 'README.md'
README = PAGE.read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (_, code), _ = code_blocks(PAGE)
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


def test_from_a_trained_model_of_flax_to_a_file_in_ten_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, (_, code) = code_blocks(PAGE)
    assert code.count('\n') <= 10
    x, y = jax.random.normal(jax.random.key(1), (32, 784)), jnp.arange(32) % 10
    model = nn.Sequential([nn.Dense(30), nn.relu, nn.Dense(10)])
    trained = model.init(jax.random.key(0), x)
    names = {
        'functools': functools,
        'jax': jax,
        'optax': optax,
        'svd': svd,
        'key': jax.random.key(0),
        'model': model,
        'trained': trained,
        'batches': 3 * [(x, y)],
    }
    exec(code, names)
    assert np.isfinite(names['metrics']['loss'])
    shipped = svd.load('net.svd')
    assert jax.tree.map(jnp.shape, shipped) == jax.tree.map(jnp.shape, trained['params'])


def test_run_and_test_are_one_command_each():
    for heading in ('Run', 'Test'):
        (section,) = re.findall(
            rf'^## {heading}\n(.*?)(?=^## |\Z)', README, re.DOTALL | re.MULTILINE
        )
        first = re.search(r'^```bash\n(.*?)^```', section, re.DOTALL | re.MULTILINE)
        assert first is not None
        assert first[1].count('\n') == 1


def test_links_and_pictures_exist():
    assert links(PAGE)
    assert dead_links(PAGE) == []
