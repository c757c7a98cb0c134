"""Random changes to training images, inside the compiled step."""

import jax
import jax.numpy as jnp
from jax import lax


def random_shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Pad and crop: each image moves by up to so many pixels each way, black where it came from.

    Args:
      key: a PRNG key.
      images: (batch, height, width, channels).
      pixels: the largest shift; all shifts up to it are equally likely.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> random_shift(jax.random.key(0), jnp.ones((2, 28, 28, 1)), 2).shape
      (2, 28, 28, 1)
    """
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right, or not, with equal chances.

    Args:
      key: a PRNG key.
      images: (batch, height, width, channels).
    """
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
