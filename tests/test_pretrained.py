"""svd_jax.pretrained: what ships is read by plain Flax, and tells digits apart."""

import re
from importlib import resources

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import svd_jax as svd
from experiments import data
from svd_jax import pretrained


class LeNet300(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(300)(x))
        x = nn.relu(nn.Dense(100)(x))
        return nn.Dense(10)(x)


class LeNet5(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (20, 50):
            x = nn.Conv(features, (5, 5), padding='VALID')(x)
            x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


PLAIN = {'lenet300': LeNet300(), 'lenet5': LeNet5()}
LARGEST_ERROR = {'lenet300': 2.5, 'lenet5': 1.5}
NAMES = pretrained.names()


def readme() -> str:
    return (resources.files('svd_jax') / 'pretrained_files' / 'README.md').read_text()


def test_networks_that_ship_are_those_known_here():
    assert NAMES
    assert set(NAMES) <= set(PLAIN)


@pytest.mark.parametrize('name', NAMES)
def test_plain_flax_takes_the_tree(name):
    wanted = PLAIN[name].init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']
    loaded = pretrained.load_pretrained(name)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


@pytest.mark.parametrize('name', NAMES)
def test_it_reads_digits_as_mnist_has_them(name):
    digits = data.load('mnist5k')
    params = {'params': pretrained.load_pretrained(name)}
    logits = PLAIN[name].apply(params, pretrained.preprocess(digits.test_images))
    error = 100 * np.mean(np.argmax(logits, -1) != digits.test_labels)
    assert error < LARGEST_ERROR[name]


@pytest.mark.parametrize('name', NAMES)
def test_the_readme_says_how_large_it_is(name):
    file = resources.files('svd_jax') / 'pretrained_files' / f'{name}.svd'
    (row,) = re.findall(rf'^\| `{name}` \|.*$', readme(), re.MULTILINE)
    nonzero = svd.sparsity(pretrained.load_pretrained(name)).nonzero
    assert f'| {len(file.read_bytes()):,} | {nonzero:,} |' in row
    assert f'python -m experiments.{name} --dataset mnist' in row


def test_an_unknown_name_is_answered_by_those_there_are():
    for name in ('lenet', 'mean_image', '../pretrained', ''):
        with pytest.raises(ValueError, match='lenet300') as caught:
            pretrained.load_pretrained(name)
        assert '\n' not in str(caught.value)


def test_every_load_is_a_tree_of_its_own():
    first = pretrained.load_pretrained('lenet300')
    first['Dense_0']['kernel'][:] = 0
    assert np.any(pretrained.load_pretrained('lenet300')['Dense_0']['kernel'])


def test_inputs_are_pixels_minus_the_mean_of_mnist():
    digits = data.load('mnist5k').train_images
    inputs = pretrained.preprocess(digits)
    assert inputs.dtype == np.float32
    # The 5,000 digits are part of MNIST: their mean is near that of all.
    np.testing.assert_allclose(inputs.mean(0), 0, atol=0.06)
    differences = inputs[1:] - inputs[:-1]
    wanted = (digits[1:].astype(float) - digits[:-1]) / 255
    np.testing.assert_allclose(differences, wanted, atol=1e-6)


@pytest.mark.parametrize(
    'images',
    [
        np.zeros((1, 28, 28, 1), np.float32),
        np.zeros((1, 28, 28), np.uint8),
        np.zeros((28, 28, 1), np.uint8),
        np.zeros((1, 32, 32, 3), np.uint8),
    ],
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match='uint8 images'):
        pretrained.preprocess(images)
