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

from svd_jax import convention, linear, randomness, transform, tree
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
      weights: whether every weight has a posterior of its own.
      groups: which weights share a scale that has one, such as ``'outputs'``; as for
        :func:`svd_jax.variational`.
      log_normal: whether the scales' posterior is log-normal.
    """

    log_sigma2_init: float = -10.0
    threshold: float = 3.0
    mask_in_training: bool = False
    kl_method: str = 'molchanov'
    weights: bool = True
    groups: tree.Axes = None
    log_normal: bool = False

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
        if convention.GROUPS in params:
            return self._forward_by_groups(x, params, deterministic, method)
        log_sigma2 = params.pop(convention.LOG_SIGMA2, None)
        if log_sigma2 is not None and (deterministic or self.mask_in_training):
            params[self._weight] = convention.masked(
                params[self._weight], log_sigma2, self.threshold
            )
        if log_sigma2 is None or deterministic:
            return linear.apply(self._dense(), params, x, method)
        key = self._noise_key()
        return linear.sample(self._dense(), self._weight, params, log_sigma2, x, key, method)

    def _forward_by_groups(
        self, x: jax.Array, params: dict[str, Any], deterministic: bool, method: str
    ) -> jax.Array:
        """As the model's program would be run around it, of which this is the one operation."""
        if deterministic:
            return linear.apply(self._dense(), tree.sparsify(params, self.threshold), x, method)
        return transform.run(
            lambda params: self._dense().apply({'params': params}, x, method=method),
            params,
            randomness.LayerKeys(self._noise_key()),
            threshold=self.threshold if self.mask_in_training else None,
        )

    def _noise_key(self) -> jax.Array:
        if not self.has_rng(NOISE):
            raise ValueError(
                f'{"/".join(self.path) or type(self).__name__} needs noise to train: pass '
                "rngs={'noise': key} to apply, or deterministic=True to evaluate"
            )
        return self.make_rng(NOISE)

    def _kl(self) -> jax.Array:
        (weight,) = convention.weights(self._params())
        terms = (jnp.sum(random.kl(self.kl_method)) for random in weight.randoms)
        return sum(terms, jnp.zeros((), jnp.float32))

    def _declare_posterior(self) -> None:
        """Beside the weight, which is declared already, and partitioned as the weight is."""
        weight = self.variables['params'][self._weight]

        def init(key: jax.Array) -> Any:
            return jax.tree.map(lambda w: jnp.full_like(w, self.log_sigma2_init), weight)

        def init_groups(key: jax.Array) -> Any:
            grouped = tree.variational(
                {self._weight: nn.meta.unbox(weight)}, (), self.log_sigma2_init,
                groups=self.groups, log_normal=self.log_normal,
            )  # fmt: skip
            return grouped[convention.GROUPS]

        if self.weights:
            self.param(convention.LOG_SIGMA2, init)
        if self.groups is not None:
            self.param(convention.GROUPS, init_groups)

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
            self._declare_posterior()
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
            self._declare_posterior()

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
