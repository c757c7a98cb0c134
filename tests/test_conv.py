"""svd_jax.conv: convolution by patches is the convolution of lax, and its pooling Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import svd_jax as svd
from svd_jax import blocks, conv, narrow, noise, wide, windows, winograd

pytestmark = [
    pytest.mark.usefixtures('quick_compilation', 'compiled_once'),
    pytest.mark.skipif(jax.default_backend() != 'cpu', reason='only CPUs convolve by patches'),
]

# Batch, height, width, channels; kernel height and width; features.
SHAPES = [
    ((6, 9, 8, 2), (5, 5), 4),
    ((1, 7, 7, 1), (3, 3), 2),
    ((2, 6, 10, 3), (1, 4), 5),
    ((4, 8, 5, 2), (3, 1), 1),
    ((2, 4, 5, 3), (4, 5), 3),  # one output position
    ((2, 4, 3, 2), (1, 1), 3),
    ((6, 5, 4, 7), (3, 2), 64),  # wide
    ((2, 5, 6, 1), (3, 3), 16),  # by Winograd's algorithm, few
    ((6, 7, 4, 5), (3, 3), 64),  # by Winograd's algorithm, the last tiles cut
]
every_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)


def case(shape, seed: int = 0):
    x_shape, size, features = shape
    rng = np.random.default_rng(seed)
    kernel_shape = (*size, x_shape[-1], features)
    x, kernel = rng.normal(size=x_shape), rng.normal(size=kernel_shape)
    sigma2, bias = rng.uniform(0.1, 1, kernel_shape), rng.normal(size=features)
    layer = nn.Conv(features, size, padding='VALID')
    return layer, x, kernel, sigma2, bias


def convolve64(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """By XLA's own convolution, in float64."""
    with jax.enable_x64():
        return np.asarray(
            jax.lax.conv_general_dilated(
                jnp.asarray(x, jnp.float64),
                jnp.asarray(kernel, jnp.float64),
                (1, 1),
                'VALID',
                dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
                precision='highest',
            )
        )


def vjp64(function, arguments, cotangent):
    with jax.enable_x64():
        arrays = [jnp.asarray(a, jnp.float64) for a in arguments]
        return [np.asarray(g) for g in jax.vjp(function, *arrays)[1](jnp.asarray(cotangent))]


def lax_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest'
    )


def float32(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def assert_close(value, wanted) -> None:
    np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-5)


@every_shape
def test_apply_is_the_convolution_with_its_gradients(shape) -> None:
    layer, x, kernel, _, bias = case(shape)
    assert conv.by_patches(layer, jnp.asarray(x, jnp.float32))

    def apply(x, kernel, bias):
        return conv.apply(layer, {'kernel': kernel, 'bias': bias}, x)

    y, vjp = jax.vjp(apply, *float32(x, kernel, bias))
    assert_close(y, convolve64(x, kernel) + bias)
    cotangent = np.random.default_rng(1).normal(size=y.shape)
    of_x, of_kernel = vjp64(lax_convolve, (x, kernel), cotangent)
    wanted = of_x, of_kernel, cotangent.sum((0, 1, 2))
    for gradient, w in zip(vjp(jnp.asarray(cotangent, jnp.float32)), wanted, strict=True):
        assert_close(gradient, w)


@every_shape
def test_moments_are_two_convolutions_with_their_gradients(shape, monkeypatch) -> None:
    layer, x, kernel, sigma2, bias = case(shape)
    draws = []

    def fake_noise(key, noise_shape):  # remembered, so that the sample can be computed apart
        draws.append(np.random.default_rng(2).normal(size=noise_shape).astype(np.float32))
        return jnp.asarray(draws[-1])

    monkeypatch.setattr(noise, 'standard_normal', fake_noise)

    def sample(x, kernel, sigma2):
        params = {'kernel': kernel, 'bias': jnp.asarray(bias, jnp.float32)}
        return conv.sample(layer, params, sigma2, x, jax.random.key(0))

    y, vjp = jax.vjp(sample, *float32(x, kernel, sigma2))
    eps = draws[0]
    if conv.way(*float32(x, kernel)) is narrow:
        eps = eps.transpose(3, 1, 2, 0)  # drawn with the batch innermost

    def wanted(x, kernel, sigma2):
        deviation = jnp.sqrt(lax_convolve(x * x, sigma2))
        return lax_convolve(x, kernel) + deviation * jnp.asarray(eps, x.dtype)

    with_deviation = convolve64(x, kernel) + np.sqrt(convolve64(x**2, sigma2)) * eps + bias
    assert_close(y, with_deviation)
    cotangent = np.random.default_rng(3).normal(size=y.shape)
    gradients = vjp(jnp.asarray(cotangent, jnp.float32))
    for gradient, w in zip(gradients, vjp64(wanted, (x, kernel, sigma2), cotangent), strict=True):
        assert_close(gradient, w)


def test_few_features_of_large_images_go_by_winograds_algorithm(monkeypatch) -> None:
    layer, x, kernel, sigma2, bias = case(SHAPES[1])
    arrays = float32(x, kernel)
    assert conv.way(*arrays) is narrow
    monkeypatch.setattr(conv, '_MOST_BYTES', 4 * 3 * 3 * x.size)
    assert conv.way(*arrays) is narrow
    monkeypatch.setattr(conv, '_MOST_BYTES', 4 * 3 * 3 * x.size - 1)
    assert conv.way(*arrays) is wide
    params = {'kernel': arrays[1], 'bias': jnp.asarray(bias, jnp.float32)}
    wanted = convolve64(x, kernel) + bias
    assert_close(conv.apply(layer, params, arrays[0]), wanted)
    (sigma32,) = float32(sigma2 * 1e-20)
    assert_close(conv.sample(layer, params, sigma32, arrays[0], jax.random.key(0)), wanted)


def test_sample_has_the_moments_it_should() -> None:
    # 40,000 examples of the same image: the library's own noise, scaled and placed right.
    layer, x, kernel, sigma2, bias = case(((1, 4, 5, 2), (2, 3), 3))
    n = 40_000
    images, kernel32, sigma32, bias32 = float32(np.repeat(x, n, 0), kernel, sigma2, bias)
    y = conv.sample(layer, {'kernel': kernel32, 'bias': bias32}, sigma32, images, jax.random.key(0))
    mean, variance = convolve64(x, kernel)[0] + bias, convolve64(x**2, sigma2)[0]
    y = np.float64(y)
    assert np.all(np.abs(y.mean(0) - mean) < 4.5 * np.sqrt(variance / n))
    assert np.all(np.abs(y.var(0) - variance) < 4.5 * variance * np.sqrt(2 / n))
    # Independent per output position and per feature.
    correlations = np.corrcoef(y.reshape(n, -1).T)[np.triu_indices(y[0].size, 1)]
    assert np.all(np.abs(correlations) < 5 / np.sqrt(n))


@pytest.mark.parametrize('features', [4, 64])
@pytest.mark.parametrize('size', [(3, 3), (1, 2)])
def test_of_no_channels_the_bias_is_left(size: tuple[int, int], features: int) -> None:
    layer, *arrays = case(((2, 5, 4, 0), size, features))
    x, kernel, sigma2, bias = float32(*arrays)
    params = {'kernel': kernel, 'bias': bias}
    y = conv.apply(layer, params, x)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (2, 6 - size[0], 5 - size[1], features)))
    np.testing.assert_array_equal(conv.sample(layer, params, sigma2, x, jax.random.key(0)), y)


def test_without_bias() -> None:
    layer, x, kernel, sigma2, _ = case(SHAPES[0])
    layer, arrays = layer.clone(use_bias=False), float32(x, kernel, sigma2)
    assert_close(conv.apply(layer, {'kernel': arrays[1]}, arrays[0]), convolve64(x, kernel))
    y = conv.sample(layer, {'kernel': arrays[1]}, arrays[2] * 1e-20, arrays[0], jax.random.key(0))
    assert_close(y, convolve64(x, kernel))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_result_has_the_layers_dtype(dtype) -> None:
    layer, x, kernel, sigma2, bias = case(SHAPES[0])
    layer, (x32, kernel32, sigma32, bias32) = (
        layer.clone(dtype=dtype),
        float32(x, kernel, sigma2, bias),
    )
    params = {'kernel': kernel32, 'bias': bias32}
    plain = layer.apply({'params': params}, x32)
    for y in (
        conv.apply(layer, params, x32),
        conv.sample(layer, params, sigma32 * 1e-20, x32, jax.random.key(0)),
    ):
        assert y.dtype == plain.dtype == dtype
        np.testing.assert_allclose(
            *map(np.float32, (y, plain)), rtol=0.02, atol=0.15 if dtype == jnp.bfloat16 else 1e-4
        )


def test_jit_vmap_and_scan_agree_with_plain_calls() -> None:
    layer, x, kernel, sigma2, bias = case(SHAPES[0])
    images, kernel32, sigma32, bias32 = float32(np.stack([x, -x]), kernel, sigma2, bias)
    params, keys = {'kernel': kernel32, 'bias': bias32}, jax.random.split(jax.random.key(0), 2)

    def gradient(image, key):
        def loss(params):
            return jnp.sum(conv.sample(layer, params, sigma32, image, key) ** 2)

        return jax.grad(loss)(params)['kernel']

    plain = [gradient(image, key) for image, key in zip(images, keys, strict=True)]
    vmapped = jax.jit(jax.vmap(gradient))(images, keys)
    scanned = jax.lax.scan(lambda c, args: (c, gradient(*args)), 0, (images, keys))[1]
    for values in (vmapped, scanned):
        for value, wanted in zip(values, plain, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('features', [4, 64])
@pytest.mark.parametrize(
    ('size', 'padding'),
    [
        ((3, 3), 'SAME'),
        ((2, 4), 'SAME'),  # even sizes pad one more at the end
        ((5, 1), 'SAME'),
        ((7, 7), 'SAME'),
        ((3, 3), 1),
        ((3, 4), (2, 1)),
        ((2, 3), ((1, 0), (0, 2))),
    ],
    ids=str,
)
def test_padding_is_flax_s_own(size: tuple[int, int], padding, features: int) -> None:
    """Flax's by XLA's convolution."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 6, 5, 3)), jnp.float32)
    layer = nn.Conv(features, size, padding=padding, bias_init=nn.initializers.normal())
    params = layer.init(jax.random.key(0), x)['params']
    assert conv.by_patches(layer, x)

    def by_patches(params, x):
        return conv.apply(layer, params, x)

    def by_flax(params, x):
        return layer.apply({'params': params}, x)

    found, wanted = (jax.vjp(jax.jit(f), params, x) for f in (by_patches, by_flax))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    cotangent = jnp.asarray(np.random.default_rng(6).normal(size=wanted[0].shape), jnp.float32)
    for a, b in zip(
        jax.tree.leaves(found[1](cotangent)), jax.tree.leaves(wanted[1](cotangent)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('shape', 'convolve', 'dtype'),
    [
        (SHAPES[-3], lambda x, k, s, p: wide._convolve(x, (k, s), p), jnp.float32),
        (SHAPES[-3], lambda x, k, s, p: wide._convolve(x, (k, s), p), jnp.bfloat16),
        (SHAPES[-1], lambda x, k, s, p: (winograd.convolve(x, k, p),), jnp.float32),
        (
            SHAPES[-1],
            lambda x, k, s, p: (winograd.sample(x, k, s, jax.random.key(0), p),),
            jnp.float32,
        ),
        (SHAPES[0], lambda x, k, s, p: (narrow.apply(x, k, None, p),), jnp.float32),
        (
            SHAPES[0],
            lambda x, k, s, p: (narrow.sample(x, k, s, None, p, jax.random.key(0)),),
            jnp.float32,
        ),
    ],
    ids=[
        'patches',
        'patches, bfloat16',
        'winograd',
        'winograd, sampled',
        'narrow',
        'narrow, sampled',
    ],
)
@pytest.mark.parametrize('images', [1, 3, 4])  # in a block; of a batch of six
def test_blocks_of_the_batch_give_what_all_of_it_gives(
    monkeypatch, images, shape, convolve, dtype
) -> None:
    # Blocks draw from keys of their own; here all draws are alike.
    monkeypatch.setattr(noise, 'standard_normal', lambda key, shape: jnp.full(shape, 0.7))
    _, x, *kernels, _ = case(shape)
    x, *kernels = (jnp.asarray(a, dtype) for a in (x, *kernels))
    padding = (1, 1), (0, 1)
    cotangents = tuple(
        jnp.asarray(np.random.default_rng(7).normal(size=y.shape), dtype)
        for y in jax.eval_shape(lambda *a: convolve(*a, padding), x, *kernels)
    )

    def outputs_and_gradients():
        y, vjp = jax.vjp(lambda *a: convolve(*a, padding), x, *kernels)
        return y, vjp(cotangents)

    at_once = outputs_and_gradients()
    loops = str(jax.make_jaxpr(lambda: outputs_and_gradients())()).count('scan[')
    assert loops == 0
    monkeypatch.setattr(blocks, 'size', lambda *_: images)
    monkeypatch.setattr(narrow, '_FEWEST', 1)
    assert str(jax.make_jaxpr(lambda: outputs_and_gradients())()).count('scan[') > 0
    tolerance = 2e-5 if dtype == jnp.float32 else 0.02
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            *map(np.float64, (a, b)), rtol=tolerance, atol=tolerance * np.abs(np.float64(b)).max()
        ),
        outputs_and_gradients(),
        at_once,
    )


@given(
    batch=st.integers(1, 2000), bytes_per_image=st.integers(1, 10**6), most=st.integers(1, 10**7)
)
def test_blocks_are_as_large_as_they_may_be_and_nearly_all_of_images(
    batch: int, bytes_per_image: int, most: int
) -> None:
    size = blocks.size(batch, bytes_per_image, most)
    assert size == 1 or size * bytes_per_image <= most
    assert size == batch or 2 * (size + 1) * bytes_per_image > most
    count = -(-batch // size)
    assert 0 <= count * size - batch < count


@every_shape
def test_what_patches_take_is_known_beforehand(shape) -> None:
    _, x, kernel, *_ = case(shape)
    (x, kernel), padding = float32(x, kernel), ((1, 0), (0, 1))
    wanted = windows.nbytes(x, kernel, padding)
    assert wide._patches(x[:1], kernel, padding).nbytes == wanted
    patches = narrow._patches(narrow._channels_first(x[:1], padding), *kernel.shape[:2])
    assert patches.nbytes == wanted


@pytest.mark.parametrize('way', [wide, narrow])
def test_blocks_draw_different_noise(monkeypatch, way) -> None:
    monkeypatch.setattr(blocks, 'BYTES', 1)
    monkeypatch.setattr(narrow, '_MOST_BYTES', 1)
    monkeypatch.setattr(narrow, '_FEWEST', 1)
    x, sigma2 = jnp.ones((4, 2, 2, 3)), jnp.ones((3, 3, 3, 64))
    y = way.sample(x, 0 * sigma2, sigma2, None, ((1, 1), (1, 1)), jax.random.key(0))
    correlations = np.corrcoef(np.reshape(y, (4, -1)))
    assert np.abs(correlations - np.eye(4)).max() < 5 / np.sqrt(y[0].size)


@pytest.mark.parametrize(
    ('batch', 'block'), [(3, 3), (100, 100), (500, 125), (512, 128), (499, 125), (2 * 499, 125)]
)
def test_narrow_blocks_are_neither_large_nor_of_a_few_images(batch: int, block: int) -> None:
    x, kernel = jnp.zeros((batch, 12, 12, 20)), jnp.zeros((5, 5, 20, 50))  # 128 kB of patches each
    assert narrow._block(x, kernel, ((0, 0), (0, 0))) == block


def test_several_draws_at_once_are_what_each_is_alone(monkeypatch) -> None:
    monkeypatch.setattr(blocks, 'BYTES', 1)
    x, kernel = jnp.ones((4, 3, 2, 3)), jnp.ones((3, 3, 3, 64))
    keys = jax.random.split(jax.random.key(0), 2)

    def gradients(key):
        loss = lambda *a: jnp.sum(jnp.sin(winograd.sample(*a, key, ((1, 1), (1, 1)))))  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(x, 0.1 * kernel, 0.01 * kernel)

    together, alone = jax.vmap(gradients)(keys), [gradients(key) for key in keys]
    for i, wanted in enumerate(alone):
        for a, b in zip(together, wanted, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


def test_rounding_is_not_taken_for_a_tiny_variance() -> None:
    """What sees only zeros has no noise, and the gradients there are the exact ones."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (2, 8, 8, 16))
    x[:, 2:7, 2:8] = 0  # larger than the kernel; its edges lie within tiles
    kernel, sigma2 = rng.normal(size=(3, 3, 16, 64)), rng.uniform(1e-5, 1, (3, 3, 16, 64))
    eps = rng.normal(size=(2, 8, 8, 64)).astype(np.float32)
    layer = nn.Conv(64, (3, 3), use_bias=False)

    def sample(x, kernel, sigma2):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(noise, 'standard_normal', lambda key, shape: jnp.asarray(eps))
            return conv.sample(layer, {'kernel': kernel}, sigma2, x, jax.random.key(0))

    def exact(x, kernel, sigma2):
        same = lambda x, k: lax_convolve(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), k)  # noqa: E731
        variance = same(x * x, sigma2)
        deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
        return same(x, kernel) + deviation * jnp.asarray(eps, x.dtype)

    y, vjp = jax.vjp(sample, *float32(x, kernel, sigma2))
    with jax.enable_x64():
        wanted = np.asarray(exact(*map(jnp.asarray, (x, kernel, sigma2))))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    cotangent = rng.normal(size=y.shape)
    for a, b in zip(
        vjp(jnp.asarray(cotangent, jnp.float32)),
        vjp64(exact, (x, kernel, sigma2), cotangent),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def test_patches_formed_again_give_the_gradients_of_patches_kept() -> None:
    _, x, kernel, sigma2, _ = case(SHAPES[0])
    arguments = float32(x.transpose(3, 1, 2, 0), kernel, sigma2)

    def gradients(keep: bool):
        def loss(x, *kernels):
            return sum(jnp.sum(jnp.sin(m)) for m in narrow._convolve(x, kernels, keep))

        return jax.grad(loss, argnums=(0, 1, 2))(*arguments)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gradients(True), gradients(False)
    )


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv(2, (3, 3), padding=3),
        nn.Conv(2, (3, 3), padding='CIRCULAR'),
        nn.Conv(2, (3, 3), strides=2),
        nn.Conv(2, (3, 3), padding='VALID', strides=2),
        nn.Conv(2, (3, 3), padding='VALID', strides=(1, 2)),
        nn.Conv(2, (3, 3), padding='VALID', kernel_dilation=2),
        nn.Conv(2, (3, 3), padding='VALID', input_dilation=(2, 1)),
        nn.Conv(2, (3, 3), padding='VALID', feature_group_count=2),
        nn.Conv(2, (3, 3), padding='VALID', mask=jnp.ones((3, 3, 2, 2))),
        nn.ConvLocal(2, (3, 3), padding='VALID'),
        nn.ConvTranspose(2, (3, 3), padding='VALID'),
    ],
)
def test_other_convolutions_are_left_to_xla(layer: nn.Module) -> None:
    assert not conv.by_patches(layer, jnp.ones((2, 6, 6, 2)))


@pytest.mark.parametrize('features', [3, 64])
@pytest.mark.parametrize('shape', [(2, 2, 6, 3), (0, 6, 6, 3)])
def test_no_output_is_no_error(features: int, shape: tuple[int, ...]) -> None:
    """Images smaller than the kernel, or none at all."""
    plain, x = nn.Conv(features, (3, 3), padding='VALID'), jnp.zeros(shape)
    params = svd.variational(plain.init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))['params'])
    layer, rngs = svd.linen.Conv(features, (3, 3), padding='VALID'), {'noise': jax.random.key(1)}
    wanted = plain.apply({'params': params}, x)
    assert wanted.size == 0
    for y, _ in (
        layer.apply({'params': params}, x, rngs=rngs),
        layer.apply({'params': params}, x, True),
        svd.apply(plain, {'params': params}, x, rngs=rngs),
    ):
        assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize('kernel_size', [(3,), (3, 3, 3)])
def test_other_ranks_are_left_to_xla(kernel_size) -> None:
    x = jnp.ones((2, *(5 for _ in kernel_size), 2))
    assert not conv.by_patches(nn.Conv(2, kernel_size, padding='VALID'), x)
    # A batch with more, or no, leading axes.
    plane = nn.Conv(2, (3, 3), padding='VALID')
    assert not conv.by_patches(plane, jnp.ones((2, 2, 5, 5, 2)))
    assert not conv.by_patches(plane, jnp.ones((5, 5, 2)))


@pytest.mark.parametrize('dtype', [jnp.int8, jnp.int32])
def test_integers_stay_integers(dtype) -> None:
    class Neighbours(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            ones, dimensions = jnp.ones((3, 3, 1, 20), dtype), ('NHWC', 'HWIO', 'NHWC')
            counts = jax.lax.conv_general_dilated(
                (x > 0).astype(dtype), ones, (1, 1), 'SAME', dimension_numbers=dimensions
            )
            return nn.Dense(2)((counts & 1).astype(jnp.float32).reshape(len(x), -1))

    model, x = Neighbours(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 1)))
    params = svd.variational(model.init(jax.random.key(0), x)['params'], log_sigma2_init=-40.0)
    y, _ = svd.apply(model, {'params': params}, x, rngs={'noise': jax.random.key(1)})
    wanted = model.apply({'params': svd.sparsify(params)}, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(3, 4, 6, 2), (1, 2, 2, 1), (2, 10, 2, 5), (2, 4, 2, 64)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_max_pool_is_flaxs_with_its_gradient(shape, dtype) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.permutation(np.prod(shape)).reshape(shape) / 64, dtype)
    cotangent = jnp.asarray(rng.normal(size=(shape[0], shape[1] // 2, shape[2] // 2, shape[3])))
    cotangent = cotangent.astype(dtype)
    y, vjp = jax.vjp(svd.linen.max_pool_2x2, x)
    wanted, wanted_vjp = jax.vjp(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(vjp(cotangent)[0], wanted_vjp(cotangent)[0])


def test_max_pool_gives_the_gradient_of_a_tie_to_the_first_as_flax_does() -> None:
    # All patterns of ties among four numbers of two sizes.
    x = jnp.asarray(np.stack([np.arange(16) >> k & 1 for k in range(4)]), jnp.float32)
    x = x.reshape(2, 2, 16).transpose(2, 0, 1)[..., None]
    gradient = jax.grad(lambda x: jnp.sum(svd.linen.max_pool_2x2(x)))(x)
    wanted = jax.grad(lambda x: jnp.sum(nn.max_pool(x, (2, 2), (2, 2))))(x)
    np.testing.assert_array_equal(gradient, wanted)
    np.testing.assert_array_equal(gradient.sum((1, 2, 3)), np.ones(16))


@pytest.mark.parametrize('shape', [(2, 3, 4, 1), (2, 4, 3, 1), (4, 4, 1)])
def test_max_pool_refuses_what_it_cannot_do(shape) -> None:
    with pytest.raises(ValueError, match=r'even height, even width.*flax.linen.max_pool'):
        svd.linen.max_pool_2x2(jnp.ones(shape))
