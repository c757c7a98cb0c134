"""Flax NNX: variational layers, and existing models made variational.

Two ways to train an NNX model with Sparse Variational Dropout. Its layers may be those of this
module, which are ``flax.nnx``'s own, returning the KL beside the activations::

    layer = svd.nnx.Linear(784, 300, rngs=nnx.Rngs(0, noise=1))
    y, kl = layer(x)                        # training
    y, kl = layer(x, deterministic=True)    # what will be shipped; model.eval() says so to all

Or the model stays as it is, of any classes, and gets a posterior from outside::

    model = svd.nnx.variational(model)      # an nnx.Param log_sigma2 beside each kernel
    y, kl = svd.nnx.apply(model, x, rngs=rngs)
    model = svd.nnx.sparsify(model)         # zeros, and log_sigma2 gone

Both keep the convention of :mod:`svd_jax.tree`, so ``svd.kl``, ``svd.sparsity``, ``svd.save`` and
all else serve ``svd.nnx.params(model)``.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from svd_jax import convention, linen, transform, tree

NOISE = linen.NOISE
Randomness = nnx.Rngs | nnx.RngStream | jax.Array
Model = TypeVar('Model')


def _key(rngs: Randomness) -> jax.Array:
    """A key for noise: from the stream ``'noise'``, which may be the default one, or as given."""
    if isinstance(rngs, nnx.Rngs):
        if not _streams(rngs):
            raise ValueError(
                f'rngs has the streams {list(rngs)} but neither {NOISE!r} nor a default one: pass '
                f'nnx.Rngs({NOISE}=seed)'
            )
        return rngs[NOISE]()
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if isinstance(rngs, jax.Array):
        return rngs
    raise TypeError(f'rngs must be nnx.Rngs, nnx.RngStream or a JAX key, not {type(rngs).__name__}')


def _streams(rngs: nnx.Rngs) -> bool:
    """Whether it has a stream of noise, by Flax's rule: that name, or the default."""
    return NOISE in rngs or 'default' in rngs


class Variational(nnx.Module):
    """What makes a layer of flax.nnx variational.

    A layer is computed as its twin in :mod:`svd_jax.linen` is: given the same parameters and the
    same key, they return the same numbers.

    Attributes:
      log_sigma2: the logarithm of the variance of each weight, an ``nnx.Param`` of the weight's
        shape, type and metadata. A layer without this attribute is its twin in flax.nnx, and its
        KL is zero.
      groups: of scales, each with its own ``log_sigma2``; see :func:`svd_jax.variational`, whose
        arguments ``groups`` and ``log_normal`` the constructor takes too, and ``weights=False`` for
        scales alone.
      log_sigma2_init: what ``log_sigma2`` starts from.
      threshold: weights with ``log_alpha`` at or above it are dropped where ``deterministic``.
      mask_in_training: see :class:`svd_jax.linen.Variational`.
      kl_method: see :func:`svd_jax.math.kl`.
      deterministic: what ``__call__`` does unless told; ``model.eval()`` sets it, ``model.train()``
        unsets it.
      rngs: the stream of noise, forked from the constructor's ``rngs`` if those have a stream
        ``'noise'`` or a default one, as :class:`flax.nnx.Dropout` does.
    """

    _weight: ClassVar[str] = 'kernel'
    _same_fields: ClassVar[tuple[str, ...]] = ('dtype', 'param_dtype')

    def __init__(
        self,
        *args: Any,
        log_sigma2_init: float = -10.0,
        threshold: float = 3.0,
        mask_in_training: bool = False,
        kl_method: str = 'molchanov',
        weights: bool = True,
        groups: tree.Axes = None,
        log_normal: bool = False,
        deterministic: bool = False,
        rngs: nnx.Rngs,
        **fields: Any,
    ) -> None:
        super().__init__(*args, rngs=rngs, **fields)  # type: ignore[call-arg]  # the twin's
        self.log_sigma2_init = log_sigma2_init
        self.threshold = threshold
        self.mask_in_training = mask_in_training
        self.kl_method = kl_method
        self.deterministic = deterministic
        self.rngs = rngs[NOISE].fork() if _streams(rngs) else nnx.data(None)
        weight = getattr(self, self._weight)
        if weights:
            self.log_sigma2 = weight.replace(jnp.full_like(weight[...], log_sigma2_init))
        if groups is not None:
            grouped = tree.variational(
                {self._weight: weight[...]}, (), log_sigma2_init,
                groups=groups, log_normal=log_normal,
            )[convention.GROUPS]  # fmt: skip
            self.groups = nnx.Dict(
                {
                    group: nnx.Dict({name: nnx.Param(leaf) for name, leaf in own.items()})
                    for group, own in grouped.items()
                }
            )

    def _linen(self) -> linen.Variational:
        """The twin in :mod:`svd_jax.linen`, unbound."""
        raise NotImplementedError

    def _fields(self) -> dict[str, Any]:
        """The fields that the twin has too, under the same names."""
        own = ('log_sigma2_init', 'threshold', 'mask_in_training', 'kl_method')
        fields = {name: getattr(self, name) for name in (*own, *self._same_fields)}
        # Linen's takes the arrays one by one.
        promote: Any = self.promote_dtype  # type: ignore[attr-defined]
        return {**fields, 'promote_dtype': lambda *arrays, **kw: promote(arrays, **kw)}

    def _apply(
        self, x: jax.Array, deterministic: bool | None, rngs: Any, method: str = '__call__'
    ) -> Any:
        names = (self._weight, 'bias', convention.LOG_SIGMA2)
        variables = {name: getattr(self, name, None) for name in names}
        own: dict[str, Any] = {n: v.get_value() for n, v in variables.items() if v is not None}
        if hasattr(self, convention.GROUPS):
            own[convention.GROUPS] = params(self.groups)
        deterministic = self.deterministic if deterministic is None else deterministic
        linen.refuse_array(type(self).__name__, deterministic)
        streams = {}
        if not deterministic and {convention.LOG_SIGMA2, convention.GROUPS} & set(own):
            rngs = self.rngs if rngs is None else rngs
            if rngs is None:
                raise ValueError(
                    f'{type(self).__name__} needs noise to train: pass rngs=nnx.Rngs({NOISE}=seed) '
                    'to the call or to the constructor, or deterministic=True to evaluate'
                )
            streams = {NOISE: _key(rngs)}
        return self._linen().apply(
            {'params': own}, x, bool(deterministic), rngs=streams, method=method
        )

    def __call__(
        self, x: jax.Array, deterministic: bool | None = None, *, rngs: Randomness | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
          x: what the twin in flax.nnx takes.
          deterministic: whether to use the mean weights, with those of ``log_alpha >= threshold``
            at zero, instead of sampling the activations. By default the attribute of that name,
            which is False.
          rngs: ``nnx.Rngs`` whose stream ``'noise'`` to sample from, a stream or a key. By default
            the constructor's.

        Returns:
          What the twin returns, and the KL divergence of this layer's weights: a float32 scalar,
          summed over the weights.

        Raises:
          ValueError: there is no stream ``'noise'`` to sample from.
          TypeError: ``deterministic`` is an array, such as the KL of another layer.
        """
        return self._apply(x, deterministic, rngs)

    def set_view(self, deterministic: bool | None = None) -> None:
        """For ``nnx.view(model, deterministic=...)``.

        Args:
          deterministic: whether this layer's calls are so by default.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def _or_none(function: Any, default: Any, preferred_element_type: Any) -> Any:
    """The twin's field for an operation: None for the default one."""
    if preferred_element_type is not None:
        return functools.partial(function or default, preferred_element_type=preferred_element_type)
    return None if function is default else function


class Linear(Variational, nnx.Linear):  # type: ignore[misc]
    """:class:`flax.nnx.Linear` with variational weights.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> layer = svd.nnx.Linear(3, 4, rngs=nnx.Rngs(0, noise=1))
      >>> jax.tree.map(jnp.shape, svd.nnx.params(layer))
      {'bias': (4,), 'kernel': (3, 4), 'log_sigma2': (3, 4)}
      >>> y, kl = layer(jnp.ones((2, 3)))
      >>> y.shape, kl.shape
      ((2, 4), ())
    """

    _same_fields = ('use_bias', 'dtype', 'param_dtype', 'precision')

    def _linen(self) -> linen.Variational:
        dot = _or_none(self.dot_general, lax.dot_general, self.preferred_element_type)
        return linen.Dense(self.out_features, dot_general=dot, **self._fields())


class LinearGeneral(Variational, nnx.LinearGeneral):  # type: ignore[misc]
    """:class:`flax.nnx.LinearGeneral` with variational weights."""

    _same_fields = ('axis', 'use_bias', 'dtype', 'param_dtype', 'precision')

    def _linen(self) -> linen.Variational:
        function = self.dot_general if self.dot_general_cls is None else self.dot_general_cls()
        dot = _or_none(function, lax.dot_general, self.preferred_element_type)
        batch_dims = tuple(self.batch_axis)
        return linen.DenseGeneral(
            self.out_features, batch_dims=batch_dims, dot_general=dot, **self._fields()
        )


class Conv(Variational, nnx.Conv):  # type: ignore[misc]
    """:class:`flax.nnx.Conv` with variational weights.

    Any rank, strides, padding, dilation and groups. The noise is independent per output position.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> layer = svd.nnx.Conv(1, 20, (5, 5), padding='VALID', rngs=nnx.Rngs(0))
      >>> y, kl = layer(jnp.ones((2, 28, 28, 1)))
      >>> y.shape
      (2, 24, 24, 20)
    """

    _same_fields = (
        'kernel_size',
        'strides',
        'padding',
        'input_dilation',
        'kernel_dilation',
        'feature_group_count',
        'use_bias',
        'mask',
        'dtype',
        'param_dtype',
        'precision',
    )

    def _linen(self) -> linen.Variational:
        default, preferred = lax.conv_general_dilated, self.preferred_element_type
        convolution = _or_none(self.conv_general_dilated, default, preferred)
        return linen.Conv(self.out_features, conv_general_dilated=convolution, **self._fields())


class ConvTranspose(Variational, nnx.ConvTranspose):  # type: ignore[misc]
    """:class:`flax.nnx.ConvTranspose` with variational weights."""

    _same_fields = (
        'kernel_size',
        'strides',
        'padding',
        'kernel_dilation',
        'use_bias',
        'mask',
        'dtype',
        'param_dtype',
        'precision',
        'transpose_kernel',
        'preferred_element_type',
    )

    def _linen(self) -> linen.Variational:
        return linen.ConvTranspose(self.out_features, **self._fields())


class Embed(Variational, nnx.Embed):  # type: ignore[misc]
    """:class:`flax.nnx.Embed` with a variational table.

    The noise is independent for each looked up token, also for the same token twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> layer = svd.nnx.Embed(10, 3, rngs=nnx.Rngs(0))
      >>> y, kl = layer(jnp.asarray([[1, 2]]))
      >>> y.shape, layer.attend(y, deterministic=True).shape
      ((1, 2, 3), (1, 2, 10))
    """

    _weight = 'embedding'

    def _linen(self) -> linen.Variational:
        return linen.Embed(self.num_embeddings, self.features, **self._fields())

    def attend(
        self, query: jax.Array, deterministic: bool | None = None, *, rngs: Randomness | None = None
    ) -> jax.Array:
        """Scores of all tokens for a query (..., features), as :meth:`flax.nnx.Embed.attend`.

        Returns the scores alone: the table's KL is counted once, by ``__call__``.
        """
        return self._apply(query, deterministic, rngs, 'attend')


def _variables(model: Any) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    """The model's ``nnx.Param``s, by path; one that is shared, once: as a weight, if it is one."""
    weights: dict[int, tuple[Any, ...]] = {}
    for path, node in nnx.iter_graph(model):
        for name in convention.WEIGHTS if isinstance(node, nnx.Module) else ():
            if _has(node, name):
                weights.setdefault(id(_child(node, name)), (*path, name))

    def place(path: tuple[Any, ...]) -> tuple[Any, ...]:
        return weights.get(id(functools.reduce(_child, path, model)), path)

    found = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return [(path if path[-1] in convention.WEIGHTS else place(path), own) for path, own in found]


def _joined(path: Iterable[Any]) -> str:
    return '/'.join(map(str, path))


def params(model: Any) -> dict[str, Any]:
    """The model's parameters as a tree for this library's functions.

    Args:
      model: any NNX model.

    Returns:
      Nested dicts of arrays: each ``nnx.Param`` by its path, in which all names are strings.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> jax.tree.map(jax.numpy.shape, svd.nnx.params(model))
      {'layers': {'0': {'bias': (4,), 'kernel': (3, 4)}}}
    """
    nested: dict[str, Any] = {}
    for path, variable in _variables(model):
        node = nested
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = variable.get_value()
    return nested


def with_params(model: Model, params: tree.PyTree, copy: bool = True) -> Model:
    """The model with other parameters, such as :func:`params` gives and ``svd.load`` reads.

    Args:
      model: any NNX model.
      params: all of the model's parameters, by path. A ``log_sigma2`` may be there that the model
        lacks, or lack that the model has: the model then gains or loses it.
      copy: whether to leave ``model`` alone and return a copy, or to change it in place.

    Returns:
      The copy, or ``model`` itself.

    Raises:
      ValueError: the tree doesn't fit the model; the message names the path.

    Example:
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> model = svd.nnx.variational(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      >>> sparse = svd.nnx.with_params(model, svd.sparsify(svd.nnx.params(model)))
      >>> sorted(svd.nnx.params(sparse)), sorted(svd.nnx.params(model))
      (['bias', 'kernel'], ['bias', 'kernel', 'log_sigma2'])
    """
    given = dict(convention.leaves(params))
    model = nnx.clone(model) if copy else model
    places = {_joined(path): (path, variable) for path, variable in _variables(model)}
    had = set(places)
    for weight in convention.weights(params):  # checks the convention too
        if weight.path in places:
            path, variable = places[weight.path]
            for beside, like in _posterior_of(weight, path, variable):
                places.setdefault(_joined(beside), (beside, like))
    gone = [path for name, (path, _) in places.items() if name not in given]
    for missing in gone:
        if missing[-1] == convention.LOG_SIGMA2 or convention.GROUPS in missing:
            continue
        raise ValueError(f'{_joined(missing)} is a parameter of the model but not in the tree')
    changed: list[tuple[Any, nnx.Variable]] = []
    added: list[tuple[Any, nnx.Variable]] = []
    for name, value in given.items():
        if name not in places:
            raise ValueError(f'{name} is in the tree but no parameter of the model')
        path, variable = places[name]
        shape, wanted = jnp.shape(value), jnp.shape(variable.get_value())
        if shape != wanted:
            raise ValueError(f'{name} has shape {shape} in the tree but {wanted} in the model')
        to = changed if name in had else added
        to.append((path, variable.replace(jnp.asarray(value))))
    for path, _ in added:  # before anything changes
        _check_place(model, path)
    nnx.update(model, nnx.from_flat_state(changed))
    for path, variable in added:
        _put(model, path, variable)
    for path in _whole_groups(gone):
        _put(model, path, None)
    return model


def _posterior_of(
    weight: convention.Weight, path: tuple[Any, ...], variable: nnx.Variable
) -> Iterable[tuple[tuple[Any, ...], nnx.Variable]]:
    """Where a weight's posterior goes, and those of its scales, with variables like them."""
    if weight.log_sigma2 is not None:
        yield (*path[:-1], convention.LOG_SIGMA2), variable
    for scale in weight.scales:
        *holder, groups, group, _ = scale.path.split('/')  # beside the weight, or further out
        place = (*path[: len(holder)], groups, group)
        # How the weight is laid out over devices is nothing to a scale.
        like = nnx.Param(jnp.asarray(scale.location))
        yield (*place, scale.path.rpartition('/')[2]), like
        yield (*place, convention.LOG_SIGMA2), like


def _whole_groups(paths: Iterable[tuple[Any, ...]]) -> Iterable[tuple[Any, ...]]:
    """Once the path of what holds them, in the place of those of scales."""
    return dict.fromkeys(
        path[: path.index(convention.GROUPS) + 1] if convention.GROUPS in path else path
        for path in paths
    )


def _check_place(model: Any, path: tuple[Any, ...]) -> None:
    """Refuses to put scales where the model has no room for them."""
    if convention.GROUPS not in path:
        return
    at = path.index(convention.GROUPS)
    holder = functools.reduce(_child, path[:at], model)
    fits = isinstance(holder, (dict, nnx.Dict, nnx.Module)) and not isinstance(holder, nnx.List)
    before = _child(holder, convention.GROUPS) if fits and _has(holder, convention.GROUPS) else None
    if not fits or not (before is None or isinstance(before, nnx.Dict)):
        raise ValueError(
            f'{_joined(path[:-1])} has no place: {_joined(path[:at]) or "the model"} must be a '
            f'module or a dict, without {convention.GROUPS} of its own'
        )


def _is_indexed(node: Any) -> bool:
    return isinstance(node, (dict, list, tuple, nnx.Dict))


def _has(node: Any, name: Any) -> bool:
    return name in (node if _is_indexed(node) else vars(node))


def _child(node: Any, name: Any) -> Any:
    return node[name] if _is_indexed(node) else getattr(node, str(name))


def _put(model: Any, path: tuple[Any, ...], variable: nnx.Variable | None) -> None:
    """Puts a variable in its place in the model, or removes the one that is there."""
    node = model
    for at, name in enumerate(path[:-1]):
        if convention.GROUPS in path[: at + 1] and not _has(node, name):
            _set(node, name, nnx.Dict())
        node = _child(node, name)
    _set(node, path[-1], variable)


def _set(node: Any, name: Any, value: Any) -> None:
    """Puts something in its place in a node, or removes what is there."""
    match isinstance(node, (dict, nnx.Dict)), value is None:
        case True, True:
            del node[name]
        case True, False:
            node[name] = value
        case False, True:
            delattr(node, name)
        case False, False:
            setattr(node, name, value)


def variational(
    model: Model,
    where: tree.Where = None,
    log_sigma2_init: tree.PerPath = -10.0,
    copy: bool = True,
    *,
    groups: tree.Groups = None,
    log_normal: bool = False,
) -> Model:
    """Gives an existing, unchanged NNX model a posterior: ``log_sigma2`` beside its weights.

    The model's own call remains the mean network, but for scales, which it does not know
    (:func:`sparsify` takes them in); :func:`apply` runs it with random weights.

    Args:
      model: any NNX model, of any classes.
      where: which weights, by their paths (``'layers/0/kernel'``): as for
        :func:`svd_jax.variational`.
      log_sigma2_init: the logarithm of the variance to start from: as there.
      copy: whether to leave ``model`` alone and return a copy, or to change it in place.
      groups: which weights share a scale: as there.
      log_normal: of what family the scales' posteriors are: as there.

    Returns:
      The copy, or ``model`` itself, with an ``nnx.Param`` ``log_sigma2`` beside every chosen
      ``kernel`` or ``embedding``, of its shape, type and metadata, and ``groups`` beside those that
      have any.

    Raises:
      ValueError: a chosen weight is variational already, or none was chosen.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> model = svd.nnx.variational(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      >>> model.log_sigma2.shape, model(jnp.ones((1, 3))).shape
      ((3, 4), (1, 4))
    """
    new = tree.variational(
        params(model), where, log_sigma2_init, groups=groups, log_normal=log_normal
    )
    return with_params(model, new, copy)


def sparsify(model: Model, threshold: tree.PerPath = 3.0, copy: bool = True) -> Model:
    """Drops the weights that are only noise, and the posterior: the model is then as it was.

    Args:
      model: a variational model: of this module's layers, or by :func:`variational`.
      threshold: weights with ``log_alpha >= threshold`` become zero: as for
        :func:`svd_jax.sparsify`.
      copy: whether to leave ``model`` alone and return a copy, or to change it in place.

    Returns:
      The copy, or ``model`` itself, without any ``log_sigma2``.

    Raises:
      ValueError: nothing is variational.

    Example:
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> model = svd.nnx.variational(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), log_sigma2_init=9.0)
      >>> int(svd.nnx.sparsify(model).kernel[...].sum())
      0
    """
    return with_params(model, tree.sparsify(params(model), threshold), copy)


def apply(
    model: Any,
    *args: Any,
    rngs: Randomness,
    sampled: tree.Where = None,
    threshold: tree.PerPath | None = None,
    method: str | Callable[..., Any] = '__call__',
    kl_method: str = 'molchanov',
    **kwargs: Any,
) -> tuple[Any, jax.Array]:
    """Runs a model made variational by :func:`variational` with its weights random.

    As :func:`svd_jax.apply` for Linen, which says how the noise enters. Statistics of batch norms,
    counters of dropouts and other variables of the model change as they would in its own call, and
    so do those of modules and ``nnx.Rngs`` among its arguments.

    Args:
      model: a variational model of any classes.
      *args: for the model.
      rngs: ``nnx.Rngs`` whose stream ``'noise'`` to sample from, a stream or a key. It is not for
        the model: one that takes ``rngs=`` itself gets it by ``method``, as in
        ``apply(model, x, own, rngs=..., method=lambda model, x, own: model(x, rngs=own))``.
      sampled: as for :func:`svd_jax.apply`.
      threshold: as for :func:`svd_jax.apply`.
      method: which of the model's methods, by name, or a function of the model and ``args``.
      kl_method: see :func:`svd_jax.math.kl`.
      **kwargs: for the model.

    Returns:
      What the model returns, and the KL divergence of all weights: a float32 scalar.

    Raises:
      ValueError: nothing is variational, or ``rngs`` has no stream of noise.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import svd_jax as svd
      >>> model = svd.nnx.variational(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      >>> y, kl = svd.nnx.apply(model, jnp.ones((2, 3)), rngs=nnx.Rngs(noise=1))
      >>> y.shape, kl.shape
      ((2, 4), ())
    """
    variational_params = params(model)

    def call(dense_params: tree.PyTree) -> tuple[Any, Any]:
        # Copies of this trace's own, as they were before.
        inner, (own_args, own_kwargs) = with_params(model, dense_params), nnx.clone((args, kwargs))
        run = functools.partial(method, inner) if callable(method) else getattr(inner, method)
        outputs = run(*own_args, **own_kwargs)
        others = nnx.state(inner, nnx.Not(nnx.Param))
        return outputs, (others, nnx.state((own_args, own_kwargs), nnx.Variable))

    outputs, (others, of_arguments) = transform.run(
        call, variational_params, _key(rngs), sampled=sampled, threshold=threshold
    )
    nnx.update(model, others)
    nnx.update((args, kwargs), of_arguments)
    return outputs, tree.kl(variational_params, kl_method)
