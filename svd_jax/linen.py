"""Variational layers for Flax Linen: flax.linen's own, returning the KL beside the activations.

Each layer has the fields, the parameter names and the shapes of its twin in ``flax.linen``, plus a
parameter ``log_sigma2`` of its weight's shape and the fields of :class:`Variational`. It returns
``(y, kl)``. Applied to a tree without ``log_sigma2``, dense or sparsified, it is its twin, and its
KL is zero. Noise comes from the rng stream ``'noise'``::

    y, kl = layer.apply({'params': params}, x, rngs={'noise': key})     # training
    y, kl = layer.apply({'params': params}, x, deterministic=True)      # what will be shipped
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from svd_jax import linear, math, tree
from svd_jax.conv import max_pool_2x2 as max_pool_2x2

NOISE = 'noise'


def refuse_array(layer: str, deterministic: Any) -> None:
    """Refuses another layer's KL as ``deterministic``, which would turn the noise off in silence.

    Raises:
      TypeError: ``deterministic`` is an array.
    """
    if isinstance(deterministic, jax.Array):
        raise TypeError(
            f'{layer} got an array for deterministic: perhaps the KL of the layer before it, from '
            'Sequential, which passes all results on; call the layers one by one and add their KLs'
        )


class Variational(nn.Module):
    """What makes a layer of flax.linen variational.

    Attributes:
      log_sigma2_init: the logarithm of the variance that every weight starts from.
      threshold: weights with ``log_alpha`` at or above it are dropped where ``deterministic``.
      mask_in_training: whether the mean is masked so in training too, as the paper's authors did
        for the LeNets: the network then trains with the weights that it will have.
      kl_method: see :func:`svd_jax.math.kl`.
    """

    log_sigma2_init: float = -10.0
    threshold: float = 3.0
    mask_in_training: bool = False
    kl_method: str = 'molchanov'

    _dense_type: ClassVar[Any]
    _weight: ClassVar[str] = 'kernel'

    def _dense(self) -> nn.Module:
        """The twin in flax.linen, with the same fields, unbound."""
        own = ('parent', 'name')
        fields = {
            f: getattr(self, f) for f in self._dense_type.__dataclass_fields__ if f not in own
        }
        return self._dense_type(**fields, parent=None)

    def _forward(self, x: jax.Array, deterministic: bool, method: str = '__call__') -> jax.Array:
        """The activations: of the masked mean, or sampled by local reparameterisation."""
        refuse_array(type(self).__name__, deterministic)
        params = self._params()
        log_sigma2 = params.pop(tree.LOG_SIGMA2, None)
        if log_sigma2 is not None and (deterministic or self.mask_in_training):
            params[self._weight] = tree.masked(params[self._weight], log_sigma2, self.threshold)
        if log_sigma2 is None or deterministic:
            return linear.apply(self._dense(), params, x, method)
        if not self.has_rng(NOISE):
            raise ValueError(
                f'{"/".join(self.path) or type(self).__name__} needs noise to train: pass '
                "rngs={'noise': key} to apply, or deterministic=True to evaluate"
            )
        key = self.make_rng(NOISE)
        return linear.sample(self._dense(), self._weight, params, log_sigma2, x, key, method)

    def _kl(self) -> jax.Array:
        params = self._params()
        if tree.LOG_SIGMA2 not in params:
            return jnp.zeros((), jnp.float32)
        alpha = math.log_alpha(params[self._weight], params[tree.LOG_SIGMA2])
        return jnp.sum(math.kl(alpha, self.kl_method))

    def _declare_log_sigma2(self) -> None:
        """Beside the weight, which is declared already, and partitioned as the weight is."""
        weight = self.variables['params'][self._weight]

        def init(key: jax.Array) -> Any:
            return jax.tree.map(lambda w: jnp.full_like(w, self.log_sigma2_init), weight)

        self.param(tree.LOG_SIGMA2, init)

    def _params(self) -> dict[str, jax.Array]:
        return dict(nn.meta.unbox(self.variables['params']))

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
          x: what the twin in flax.linen takes.
          deterministic: whether to use the mean weights, with those of ``log_alpha >= threshold``
            at zero, instead of sampling the activations.

        Returns:
          What the twin returns, and the KL divergence of this layer's weights: a float32 scalar,
          summed over the weights.

        Raises:
          ValueError: there is no rng stream ``'noise'`` to sample from.
          TypeError: ``deterministic`` is an array, such as the KL of another layer.
        """
        if self.is_initializing():
            super().__call__(x)  # type: ignore[misc]  # declares the parameters as Flax does
            self._declare_log_sigma2()
        return self._forward(x, self.is_initializing() or deterministic), self._kl()


class Dense(Variational, nn.Dense):  # type: ignore[misc]
    """:class:`flax.linen.Dense` with variational weights.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer, x = svd.linen.Dense(4), jnp.ones((2, 3))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables['params'])
      {'bias': (4,), 'kernel': (3, 4), 'log_sigma2': (3, 4)}
      >>> y, kl = layer.apply(variables, x, rngs={'noise': jax.random.key(1)})
      >>> y.shape, kl.shape
      ((2, 4), ())
    """

    _dense_type = nn.Dense


class DenseGeneral(Variational, nn.DenseGeneral):  # type: ignore[misc]
    """:class:`flax.linen.DenseGeneral` with variational weights."""

    _dense_type = nn.DenseGeneral


class Conv(Variational, nn.Conv):  # type: ignore[misc]
    """:class:`flax.linen.Conv` with variational weights.

    Any rank, strides, padding, dilation and groups. The noise is independent per output position.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer, x = svd.linen.Conv(20, (5, 5), padding='VALID'), jnp.ones((2, 28, 28, 1))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, kl = layer.apply(variables, x, rngs={'noise': jax.random.key(1)})
      >>> y.shape
      (2, 24, 24, 20)
    """

    _dense_type = nn.Conv


class ConvTranspose(Variational, nn.ConvTranspose):  # type: ignore[misc]
    """:class:`flax.linen.ConvTranspose` with variational weights."""

    _dense_type = nn.ConvTranspose


class Embed(Variational, nn.Embed):  # type: ignore[misc]
    """:class:`flax.linen.Embed` with a variational table.

    The noise is independent for each looked up token, also for the same token twice.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import svd_jax as svd
      >>> layer, ids = svd.linen.Embed(10, 3), jnp.asarray([[1, 2]])
      >>> variables = layer.init(jax.random.key(0), ids)
      >>> jax.tree.map(jnp.shape, variables['params'])
      {'embedding': (10, 3), 'log_sigma2': (10, 3)}
      >>> y, kl = layer.apply(variables, ids, rngs={'noise': jax.random.key(1)})
      >>> y.shape
      (1, 2, 3)
    """

    _dense_type = nn.Embed
    _weight = 'embedding'

    def setup(self) -> None:
        super().setup()
        if self.is_initializing():
            self._declare_log_sigma2()

    def __call__(
        self, inputs: jax.Array, deterministic: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Looks tokens up: integers of any shape to vectors, and the KL of the table."""
        return self._forward(inputs, self.is_initializing() or deterministic), self._kl()

    def attend(self, query: jax.Array, deterministic: bool = False) -> jax.Array:
        """Scores of all tokens for a query (..., features), as :meth:`flax.linen.Embed.attend`.

        Returns the scores alone: the table's KL is counted once, by ``__call__``.
        """
        return self._forward(query, self.is_initializing() or deterministic, 'attend')
