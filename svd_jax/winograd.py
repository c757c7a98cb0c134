"""Convolutions with 3x3 kernels on CPUs by Winograd's algorithm: 16 products where 36 would do.

Four outputs, 2x2, are computed at once from 4x4 inputs: inputs and kernels are transformed by a few
additions, multiplied element by element (for all channels and tiles: sixteen matrix products), and
the results transformed back. The gradients are the same steps the other way round, so they cost 16
products instead of 36 as well (Lavin & Gray 2016, arXiv:1509.09308, F(2x2, 3x3)).

Sums and differences of large inputs stand for small ones, so the rounding error of an output is
relative to the largest outputs around it, and a variance that small counts as zero.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from svd_jax import blocks, math, noise, windows
from svd_jax.windows import Padding

Arrays = tuple[jax.Array, ...]
Grid = list[Arrays]  # of arrays: what stands at each place of a tile, for all tiles
Transform = Callable[..., Arrays]

# Of the largest variance around it; float32 rounds at 6e-8.
_SIGNIFICANT = 1e-6


# The transforms along one axis, and their transposes.


def _of_inputs(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> Arrays:
    return a - c, b + c, c - b, b - d


def _of_inputs_transposed(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> Arrays:
    return a, b - c + d, b + c - a, -d


def _of_kernels(a: jax.Array, b: jax.Array, c: jax.Array) -> Arrays:
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _of_kernels_transposed(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> Arrays:
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d


def _to_outputs(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> Arrays:
    return a + b + c, b - c - d


def _to_outputs_transposed(a: jax.Array, b: jax.Array) -> Arrays:
    return a, a + b, a - b, -b


def _both_axes(transform: Transform, grid: Sequence[Arrays]) -> Grid:
    columns = [transform(*column) for column in zip(*grid, strict=True)]
    return [transform(*row) for row in zip(*columns, strict=True)]


def _transformed_kernel(kernel: jax.Array) -> Grid:
    return _both_axes(_of_kernels, [tuple(row) for row in kernel])


def _products(a: Grid, b: Grid) -> Grid:
    return [
        tuple(x @ y for x, y in zip(of_a, of_b, strict=True))
        for of_a, of_b in zip(a, b, strict=True)
    ]


def _transposed(grid: Grid) -> Grid:
    return [tuple(matrix.T for matrix in row) for row in grid]


# Between images and tiles.


class _Tiling:
    """How images (B, H, W, channels) are cut: tiles of 2x2 outputs, of 4x4 overlapping inputs."""

    def __init__(self, shape: tuple[int, ...], padding: Padding) -> None:
        self.image, self._padding = shape[1:3], padding
        self.outputs = windows.outputs(self.image, (3, 3), padding)
        self.rows, self.columns = (-(-n // 2) for n in self.outputs)

    def inputs(self, x: jax.Array) -> Grid:
        """(B, H, W, C) to a grid of 4x4 (tiles, C)."""
        around = [
            (low, 2 * tiles + 2 - n - low)
            for n, tiles, (low, _) in zip(
                self.image, (self.rows, self.columns), self._padding, strict=True
            )
        ]
        x = jnp.pad(x, ((0, 0), *around, (0, 0)))
        x = x.reshape(x.shape[0], self.rows + 1, 2, self.columns + 1, 2, x.shape[-1])

        def place(i: int, j: int) -> jax.Array:
            rows, columns = slice(i // 2, i // 2 + self.rows), slice(j // 2, j // 2 + self.columns)
            return x[:, rows, i % 2, columns, j % 2].reshape(-1, x.shape[-1])

        return [tuple(place(i, j) for j in range(4)) for i in range(4)]

    def inputs_transposed(self, grid: Grid) -> jax.Array:
        """The sum over the tiles that an input is in: a grid of (tiles, C) to (B, H, W, C)."""
        images = [tuple(map(self._image, row)) for row in grid]

        def overlapped(first: jax.Array, second: jax.Array, axis: int) -> jax.Array:
            after, before = (
                [ends if a == axis else (0, 0) for a in range(4)] for ends in ((0, 1), (1, 0))
            )
            return jnp.pad(first, after) + jnp.pad(second, before)

        halves = [
            tuple(overlapped(*pair, 1) for pair in zip(images[i], images[i + 2], strict=True))
            for i in range(2)
        ]
        x = _interleaved([tuple(overlapped(r[j], r[j + 2], 2) for j in range(2)) for r in halves])
        (top, _), (left, _) = self._padding
        return x[:, top : top + self.image[0], left : left + self.image[1]]

    def outputs_of(self, grid: Grid) -> jax.Array:
        """A grid of 2x2 (tiles, F) to (B, h, w, F)."""
        y = _interleaved([tuple(map(self._image, row)) for row in grid])
        return y[:, : self.outputs[0], : self.outputs[1]]

    def outputs_transposed(self, y: jax.Array) -> Grid:
        """(B, h, w, F) to a grid of 2x2 (tiles, F)."""
        more = [
            (0, 2 * tiles - n)
            for n, tiles in zip(self.outputs, (self.rows, self.columns), strict=True)
        ]
        y = jnp.pad(y, ((0, 0), *more, (0, 0)))
        y = y.reshape(y.shape[0], self.rows, 2, self.columns, 2, y.shape[-1])
        return [
            tuple(y[:, :, i, :, j].reshape(-1, y.shape[-1]) for j in range(2)) for i in range(2)
        ]

    def _image(self, tiles: jax.Array) -> jax.Array:
        return tiles.reshape(-1, self.rows, self.columns, tiles.shape[-1])


def _interleaved(grid: Grid) -> jax.Array:
    """A grid of 2x2 images (B, rows, columns, C) to one (B, 2 rows, 2 columns, C)."""
    x = jnp.stack([jnp.stack(row, 3) for row in grid], 2)
    batch, rows, _, columns, _, channels = x.shape
    return x.reshape(batch, 2 * rows, 2 * columns, channels)


# The convolution.


def suits(kernel: jax.Array) -> bool:
    """Whether a kernel is of the size for this, not empty, and its type precise enough."""
    return kernel.shape[:2] == (3, 3) and kernel.size > 0 and kernel.dtype.itemsize >= 4


def powers(x: jax.Array, count: int) -> Arrays:
    """What the kernels multiply: the inputs for the mean, their squares for the variance."""
    return (x, x * x)[:count]


def _outputs(x: jax.Array, kernels: list[Grid], tiling: _Tiling) -> Arrays:
    """Of a block of images, with transformed kernels."""

    def output(power: jax.Array, kernel: Grid) -> jax.Array:
        products = _products(_both_axes(_of_inputs, tiling.inputs(power)), kernel)
        return tiling.outputs_of(_both_axes(_to_outputs, products))

    return tuple(map(output, powers(x, len(kernels)), kernels))


def _in_blocks(tiling: _Tiling, kernel: jax.Array, x: jax.Array) -> int:
    """How many images to take at a time."""
    per_image = 16 * tiling.rows * tiling.columns * max(kernel.shape[2:]) * x.dtype.itemsize
    return blocks.size(x.shape[0], per_image, blocks.BYTES)


def _pull_back(
    x: jax.Array,
    kernels: Arrays,
    padding: Padding,
    given: Arrays,
    gradients_of: Callable[..., Arrays],
) -> tuple[jax.Array, Arrays]:
    """The gradients of the inputs and the kernels.

    Args:
      x: the images.
      kernels: one or two.
      padding: as for the outputs.
      given: arrays (B, h, w, F).
      gradients_of: from a block of those to the gradients of the outputs of every kernel.
    """
    tiling = _Tiling(x.shape, padding)
    transformed = [_transposed(_transformed_kernel(kernel)) for kernel in kernels]
    size = _in_blocks(tiling, kernels[0], x)

    def of_block(x: jax.Array, *given: jax.Array) -> tuple[Arrays, list[Grid]]:
        of_powers, of_kernels = [], []
        for power, kernel, gradient in zip(
            powers(x, len(kernels)), transformed, gradients_of(*given), strict=True
        ):
            of_products = _both_axes(_to_outputs_transposed, tiling.outputs_transposed(gradient))
            inputs = _both_axes(_of_inputs, tiling.inputs(power))
            of_kernels.append(_products(_transposed(inputs), of_products))
            of_inputs = _both_axes(_of_inputs_transposed, _products(of_products, kernel))
            of_powers.append(tiling.inputs_transposed(of_inputs))
        of_x, *of_squares = of_powers
        for of_square in of_squares:
            of_x = of_x + 2 * x * of_square
        return (of_x,), of_kernels

    (of_x,), of_kernels = blocks.map_and_sum(of_block, size, (x, *given))
    return of_x, tuple(
        jnp.stack([jnp.stack(row) for row in _both_axes(_of_kernels_transposed, grid)])
        for grid in of_kernels
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """The convolution of (B, H, W, C) with a kernel (3, 3, C, F), to (B, h, w, F)."""
    return _convolve_fwd(x, kernel, padding)[0]


def _convolve_fwd(x: jax.Array, kernel: jax.Array, padding: Padding) -> tuple[jax.Array, Arrays]:
    tiling, transformed = _Tiling(x.shape, padding), [_transformed_kernel(kernel)]
    size = _in_blocks(tiling, kernel, x)
    pieces = blocks.map(lambda x: _outputs(x, transformed, tiling), size, (x,))
    return pieces[0], (x, kernel)


def _convolve_bwd(padding: Padding, residuals: Arrays, gradient: jax.Array) -> Arrays:
    x, kernel = residuals
    of_x, of_kernels = _pull_back(x, (kernel,), padding, (gradient,), lambda gradient: (gradient,))
    return of_x, *of_kernels


convolve.defvjp(_convolve_fwd, _convolve_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def sample(
    x: jax.Array, kernel: jax.Array, sigma2: jax.Array, key: jax.Array, padding: Padding
) -> jax.Array:
    """The convolution with a random kernel, by local reparameterisation.

    All of it block by block: of the mean, the variance and the noise, nothing but the derivative
    with respect to the variance is kept for the gradients.

    Args:
      x: the images, (B, H, W, C).
      kernel: the mean, (3, 3, C, F).
      sigma2: the variance, of the same shape.
      key: for the noise.
      padding: zeros around the image.

    Returns:
      A sample, (B, h, w, F).
    """
    return _sample_fwd(x, kernel, sigma2, key, padding)[0]


def _significant(variance: jax.Array) -> jax.Array:
    """Variances (B, h, w, F) without what may only be rounding, which becomes zero.

    The gradient of a standard deviation grows without bound towards zero: rounding errors must
    not be taken for tiny variances.
    """
    largest = jnp.max(variance, (1, 2), keepdims=True)
    return jnp.where(variance > _SIGNIFICANT * largest, variance, 0)


def _sample_fwd(
    x: jax.Array, kernel: jax.Array, sigma2: jax.Array, key: jax.Array, padding: Padding
) -> tuple[jax.Array, Arrays]:
    tiling = _Tiling(x.shape, padding)
    transformed = [_transformed_kernel(k) for k in (kernel, sigma2)]
    size = _in_blocks(tiling, kernel, x)

    def sampled(x: jax.Array, key: jax.Array) -> Arrays:
        mean, variance = _outputs(x, transformed, tiling)
        eps = noise.standard_normal(key, mean.shape)
        y, of_variance = jax.vjp(
            lambda variance: math.reparameterise(mean, variance, eps), _significant(variance)
        )
        return y, *of_variance(jnp.ones_like(y))

    y, slope = blocks.map(sampled, size, (x,), key)
    return y, (x, kernel, sigma2, slope)


def _sample_bwd(
    padding: Padding, residuals: Arrays, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x, kernel, sigma2, slope = residuals
    of_x, (of_kernel, of_sigma2) = _pull_back(
        x, (kernel, sigma2), padding, (gradient, slope),
        lambda gradient, slope: (gradient, gradient * slope),
    )  # fmt: skip
    return of_x, of_kernel, of_sigma2, None


sample.defvjp(_sample_fwd, _sample_bwd)
