"""experiments.augment: every image that comes out is one that may, each as often as it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import augment

IMAGES = np.random.default_rng(0).integers(1, 256, (400, 6, 5, 2)).astype(np.uint8)


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Pixel by pixel."""
    result = np.zeros_like(image)
    height, width, _ = image.shape
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[i, j] = image[i - down, j - right]
    return result


@pytest.mark.parametrize('pixels', [1, 2])
def test_shifts_are_those_of_numpy_and_equally_likely(pixels: int) -> None:
    found = np.asarray(augment.random_shift(jax.random.key(0), jnp.asarray(IMAGES), pixels))
    assert found.dtype == np.uint8
    shifts = range(-pixels, pixels + 1)
    counts = np.zeros((len(shifts), len(shifts)))
    for image, result in zip(IMAGES, found, strict=True):
        matches = [
            (down, right)
            for down in shifts
            for right in shifts
            if np.array_equal(shifted(image, down, right), result)
        ]
        assert len(matches) == 1
        counts[matches[0][0] + pixels, matches[0][1] + pixels] += 1
    expected = len(IMAGES) / counts.size
    assert np.sum((counts - expected) ** 2 / expected) < counts.size + 4 * np.sqrt(2 * counts.size)


def test_half_of_the_images_are_mirrored() -> None:
    found = np.asarray(augment.random_flip(jax.random.key(1), jnp.asarray(IMAGES)))
    same = np.all(found == IMAGES, axis=(1, 2, 3))
    mirrored = np.all(found == IMAGES[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same != mirrored)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(IMAGES))


def test_a_key_determines_the_changes_under_jit_too() -> None:
    def change(key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        images = augment.random_shift(first, jnp.asarray(IMAGES), 2)
        return augment.random_flip(second, images)

    once = change(jax.random.key(2))
    np.testing.assert_array_equal(once, jax.jit(change)(jax.random.key(2)))
    assert np.any(once != change(jax.random.key(3)))
