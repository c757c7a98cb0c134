"""The compiled parts of a run, with the data on the device; one network or several at once."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import svd_jax as svd
from experiments import augment, averaging, budget, data, pictures
from experiments.config import Config
from experiments.distillation import distillation_loss
from experiments.errors import UsageError
from experiments.stream import prefetch
from experiments.summaries import in_order
from svd_jax.convention import name_of, weights
from svd_jax.tree import units

# Steps per dispatch: few enough for a lively progress bar, enough to hide the dispatch.
_CHUNK = 100
_EVALUATION_BATCH = 1000


def compute_dtype(config: Config) -> Any:
    """Flax's ``dtype`` for the layers: None, the type of the parameters, or another."""
    return None if config.dtype == 'float32' else jnp.dtype(config.dtype)


class Training:
    """Trains the networks that a configuration names: one, or one for every seed and KL weight.

    They train as one program, each as it would train alone: side by side under ``jax.vmap`` on an
    accelerator; on a CPU, which a single network keeps busy, in turns.

    Attributes:
      config: as given.
      dataset: as given, on the host.
      names: of the networks, as in :meth:`experiments.config.Config.alone`.
      steps: of an epoch.
      followed_on: what the errors after each epoch are measured on.
      evaluated_on: what those of the summary are.
      teacher: variables of the dense network to learn from in fine-tuning, with ``distil``.
    """

    followed_on: str
    evaluated_on: str
    teacher: Any = None
    # What there is depends on the kind of data.
    dataset: Any
    model: Any
    _resident: Any
    _test: Any

    def __init__(
        self, network: Callable[..., nn.Module], config: Config, dataset: data.Dataset
    ) -> None:
        self.dataset = dataset
        options = {
            'log_sigma2_init': config.log_sigma2_init,
            'threshold': config.threshold,
            'mask_in_training': config.mask_in_training,
            'kl_method': config.kl,
            'dtype': compute_dtype(config),
        }
        self.model = network(options=tuple(options.items()))
        self._check_classes()
        count = len(dataset.train_labels)
        self._set_up(config, count, num_data=count)
        self.evaluated_on = f'{config.validation} held out' if config.validation else 'test set'
        self.followed_on = self.evaluated_on
        self._mean = jnp.asarray(data.mean_image(dataset.train_images))[None]
        self._resident = None if self._streams() else (
            jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
        )  # fmt: skip
        self._test = (
            evaluation_batches(dataset.test_images),
            evaluation_batches(dataset.test_labels, fill=-1),
        )

    def _check_classes(self) -> None:
        """Refuses labels that the network has no output for: their loss would be no number."""
        image = jnp.zeros((1, *self.dataset.train_images.shape[1:]))
        (logits, _), _ = jax.eval_shape(self.model.init_with_output, jax.random.key(0), image)
        classes = 1 + int(self.dataset.train_labels.max())
        if classes > logits.shape[-1]:
            raise UsageError(
                f'{self.dataset.name} has {classes} classes, this network {logits.shape[-1]}: '
                'choose another --dataset'
            )

    def _set_up(self, config: Config, count: int, num_data: int) -> None:
        """What does not depend on the kind of data: names, steps, schedules, optimiser, keys.

        Args:
          config: as given.
          count: how many examples an epoch draws its batches from.
          num_data: how many terms the likelihood of the whole training set has, each of which the
            loss is a mean over: images, or characters.
        """
        self.config, self._count, self._num_data = config, count, num_data
        alone = config.alone()
        self.names, self._configs = list(alone), list(alone.values())
        self.variational = config.method == 'svd'
        self.steps = count // config.batch_size
        cycle = math.ceil(config.epochs * self.steps / config.cycles)
        falling = optax.linear_schedule(
            config.learning_rate,
            0.0,
            max(1, round(cycle * (1 - config.decay_from))),
            round(cycle * config.decay_from),
        )
        self._schedule = lambda step: falling(step % cycle)
        self._fine_schedule = optax.linear_schedule(
            config.learning_rate, 0.0, max(1, config.fine_tune * self.steps)
        )
        self._dense_tx = self._adam(self._schedule)
        self.tx, self._fine_tx = map(self._optimiser, (self._schedule, self._fine_schedule))
        self._warmup = svd.kl_warmup_for(
            self._count, config.batch_size, config.epochs, config.kl_warmup
        )
        seeds = jnp.asarray([own.seed for own in self._configs], jnp.uint32)
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
        self._init_keys, self._noise_keys = keys[:, 0], keys[:, 1]
        self._smaller: dict[Any, Any] = {}

    def _adam(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        # The paper's authors minimise N times this loss, with an eps of 1e-8: this is the same. A
        # weight that is about to be dropped has gradients of about 1e-8 here.
        return optax.adam(schedule, eps=1e-8 / self._num_data)

    def _optimiser(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        parts, config = [self._adam(schedule)], self.config
        if self.variational and config.log_sigma2_rate != 1:
            parts.append(optax.masked(optax.scale(config.log_sigma2_rate), _is_log_sigma2))
        if config.average:
            parts.append(averaging.average(config.average))
        return optax.chain(*parts) if len(parts) > 1 else parts[0]

    def learning_rate(self, epoch: int) -> float:
        """At the first step of an epoch."""
        done = epoch - 1 - self.config.epochs
        if done < 0:
            return float(self._schedule((epoch - 1) * self.steps))
        return float(self._fine_schedule(done * self.steps))

    def _streams(self) -> bool:
        """Whether the training images stay on the host."""
        if self.config.stream != 'auto':
            return self.config.stream == 'yes'
        memory = jax.devices()[0].memory_stats()  # None on a CPU
        return memory is not None and self.dataset.train_images.nbytes > memory['bytes_limit'] / 4

    def _order(self, config: Config, epoch: int) -> np.ndarray:
        """An epoch's batches of one network, (steps, batch_size): which examples they are of."""
        return data.epoch_permutation(config.seed, epoch, self._count, config.batch_size)

    def _feed(self, orders: np.ndarray) -> Iterator[Any]:
        """An epoch's batches, in parts of as many steps as a dispatch takes: indices or images."""
        parts = (orders[:, i : i + _CHUNK] for i in range(0, self.steps, _CHUNK))
        if self._resident is not None:
            return parts
        images, labels = self.dataset.train_images, self.dataset.train_labels
        return prefetch(lambda at: jax.device_put((images[at], labels[at])), parts)

    def _augment(self, key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Changes images at random; also returns a key for what else is random."""
        if self.config.shift:
            key, own = jax.random.split(key)
            images = augment.random_shift(own, images, self.config.shift)
        if self.config.flip:
            key, own = jax.random.split(key)
            images = augment.random_flip(own, images)
        return key, images

    def _prepare(self, images: jax.Array) -> jax.Array:
        return images.astype(jnp.float32) / 255 - self._mean

    def units(self, path: str) -> Any:
        """Which weights share a scale where units have one: as ``groups`` of svd.variational."""
        return 'outputs' if 'Conv' in path else 'inputs'

    def _apply(self, variables: Any, inputs: jax.Array, rngs: Any, **options: Any) -> Any:
        """The network in training, and its KL divergence; with ``mutable``, also its updates."""
        return self.model.apply(variables, inputs, rngs=rngs, **options)

    def _apply_smaller(
        self, smaller: Any, variables: Any, inputs: jax.Array, rngs: Any, **options: Any
    ) -> Any:
        """The same for a network that :func:`svd_jax.shrink` made; the whole one if None."""
        if smaller is None:
            return self._apply(variables, inputs, rngs, **options)
        if not is_random(variables['params']):
            result, no_kl = smaller(variables, inputs, **options), jnp.zeros(())
            return ((result[0], no_kl), result[1]) if options else (result, no_kl)
        return svd.apply(
            smaller, variables, inputs, rngs=rngs, kl_method=self.config.kl,
            threshold=self.config.threshold if self.config.mask_in_training else None, **options,
        )  # fmt: skip

    def _apply_weighted(
        self, smaller: Any, group_weights: Any, variables: Any, inputs: jax.Array, rngs: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        """With the KL of every group counted so many times."""
        result = self._apply_smaller(smaller, variables, inputs, rngs, **options)
        if not group_weights:
            return result

        def weight(path: str) -> Any:
            return group_weights.get(path.rpartition('/')[0], 1.0)

        kl = svd.kl(variables['params'], self.config.kl, weight)
        return ((result[0][0], kl), result[1]) if options else (result[0], kl)

    def _group_weights(self, state: svd.TrainState, epoch: int) -> dict[str, Any]:
        """What the KL of every group counts in an epoch, by the state before it."""
        config = self.config
        paths = {
            scale.group for weight in weights(state.params) for scale in weight.scales
        } if epoch <= config.epochs else set()  # fmt: skip
        if not paths or (config.unit_cost == 'none' and config.budget is None):
            return dict.fromkeys(sorted(paths), config.group_kl_weight)
        costs = svd.unit_costs(
            self._shipped, state.variables, self._example(), threshold=config.thresholds
        )
        mean = config.group_kl_weight
        if config.budget is not None:
            share = self._share(state.variables)
            mean *= budget.kl_factor(share, config.budget, (epoch - 1) / config.epochs)
        return dict(sorted(svd.kl_weights(costs, state.params, mean).items()))

    def _share(self, variables: Any) -> float:
        """What is left of the dense network's multiply-adds."""
        work = self._work(self._left(variables, self.config.thresholds))
        return work['multiply_adds'] / work['multiply_adds_dense']

    def _within_budget(self, state: svd.TrainState) -> svd.TrainState:
        """With as many units of each network as its budget has room for, the least noisy ones."""
        wanted = self.config.budget
        if wanted is None:
            return state

        def within(own: svd.TrainState) -> svd.TrainState:
            def share(params: Any) -> float:
                return self._share({**own.variables, 'params': params})

            params = budget.within(own.params, share, wanted, self.config.thresholds)
            return own.replace(params=params)

        return _together([within(own) for own in self.split(state)])

    def _batch(self, resident: Any, batch: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Inputs and targets of a step, and a key for what else is random."""
        images, labels = jax.tree.map(lambda a: a[batch], resident) if resident else batch
        key, images = self._augment(key, images)
        return self._prepare(images), labels, key

    def init(self, dense: Any = None) -> svd.TrainState:
        """The state before the first step, from given dense variables or random ones.

        Of several networks it has a leading axis on every array; :meth:`split` takes it apart.
        """
        states = [
            self._state(self._dense_variables(key) if dense is None else dense)
            for key in self._init_keys
        ]
        return _together(states)

    def _state(self, dense: Any) -> svd.TrainState:
        params = dense['params']
        if self.variational:
            params = svd.variational(
                params,
                where=() if self.config.groups == 'units' else None,
                log_sigma2_init=self.config.log_sigma2_init,
                groups=None if self.config.groups == 'none' else self.units,
                log_normal=self.config.group_posterior == 'log-normal',
            )
        if self.config.average and dense.keys() - {'params'}:
            raise UsageError(
                '--average is for networks without batch statistics: theirs are of the weights '
                'before the average is taken'
            )
        return svd.TrainState.create({**dense, 'params': params}, self.tx)

    def dense_state(self) -> svd.TrainState:
        """A state of the dense network, as a run with ``--method dense`` has it."""
        return svd.TrainState.create(self._dense_variables(self._init_keys[0]), self._dense_tx)

    def _dense_variables(self, key: jax.Array) -> Any:
        """Random parameters of the network without any posterior, and its other collections."""
        image = jax.eval_shape(self._prepare, self.dataset.train_images[:1])
        variables = self.model.lazy_init(key, image)  # does not run the network
        return {**variables, 'params': svd.sparsify(variables['params'], float('inf'))}

    def split(self, state: svd.TrainState) -> list[svd.TrainState]:
        """The state of each network."""
        if len(self.names) == 1:
            return [state]
        return [jax.tree.map(lambda leaf: leaf[i], state) for i in range(len(self.names))]  # noqa: B023

    def _apply_left(
        self, smaller: Any, variables: Any, inputs: jax.Array, rngs: Any, **options: Any
    ) -> Any:
        """The network that is left, in training; what was dropped gets no gradient."""
        left = self._left(variables, self.config.thresholds)
        return self._apply_smaller(smaller, left, inputs, rngs, **options)

    def _shrink(
        self, state: svd.TrainState, fine_tune: bool
    ) -> tuple[svd.Shrunk | None, svd.TrainState]:
        """The smaller network to train an epoch on, if it is to be one; and its state.

        A function of the state alone: what was removed before is zero in it.
        """
        if self.config.shrink is None:
            return None, state
        if not svd.sparsity(state.params, self.config.thresholds).nonzero:
            return None, state  # nothing to train on; the whole network may come back
        tx = self._fine_tx if fine_tune else self.tx

        def shrunk(state: svd.TrainState, threshold: Any) -> svd.Shrunk:
            return svd.shrink(
                self._shipped, state, tx, self._example(), threshold=threshold,
                training=self._trained,
            )  # fmt: skip

        now, could = shrunk(state, float('inf')), shrunk(state, self.config.thresholds)
        if could.report.multiply_adds[1] * self.config.shrink <= now.report.multiply_adds[1]:
            whole = could.expand(could.state)
            if self.config.average:  # constants of what was removed went into biases
                whole = averaging.restarted(whole)
            now = shrunk(whole, float('inf'))
        # The same network as in the epoch before need not be compiled again.
        key = tuple((path, *(u.tobytes() for u in units)) for path, units in now.kept.items())
        model = self._smaller.setdefault(key, now.model)
        return now._replace(model=model), now.state

    @partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
    def _chunk(
        self, fine_tune: bool, smaller: Any, state: svd.TrainState, shared: Any, *each: Any
    ) -> tuple[svd.TrainState, dict[str, jax.Array]]:
        """Some steps; ``each`` network has its own batches, keys and KL weights.

        What they share is the data on the device and, if they learn from one, the dense network.
        """
        resident, teacher = shared

        def chunk(
            state: svd.TrainState,
            batches: Any,
            keys: jax.Array,
            weight: jax.Array,
            group_weights: dict[str, jax.Array],
        ) -> Any:
            take_step = svd.make_train_step(
                partial(self._apply_left, smaller)
                if fine_tune
                else partial(self._apply_weighted, smaller, group_weights),
                svd.classification_loss
                if teacher is None
                else distillation_loss(self.config.distil),
                self._fine_tx if fine_tune else self.tx,
                num_data=self._num_data,
                num_samples=self.config.num_samples,
                kl_weight=lambda step: weight * self._warmup(step),
                threshold=self.config.thresholds,
            )

            def step(state: svd.TrainState, given: tuple[Any, jax.Array]) -> Any:
                batch, key = given
                inputs, targets, key = self._batch(resident, batch, key)
                if teacher is not None:
                    targets = targets, self._shipped(teacher, inputs)
                return take_step(state, (inputs, targets), key)

            return lax.scan(step, state, (batches, keys))

        if len(self.names) == 1:
            return chunk(state, *jax.tree.map(lambda leaf: leaf[0], each))
        if svd.backend.as_on_cpu():
            return lax.map(lambda own: chunk(*own), (state, *each))
        return jax.vmap(chunk)(state, *each)

    @partial(jax.jit, static_argnums=0)
    def _errors(self, variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        def errors(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            logits, _ = self.model.apply(variables, self._prepare(batch[0]), True)
            return jnp.sum((jnp.argmax(logits, -1) != batch[1]) & (batch[1] >= 0))

        return lax.map(errors, (images, labels)).sum()

    def _scores(self, variables: Any) -> dict[str, float]:
        """How good a dense or a sparse network is after an epoch, by the name of the measure."""
        wrong = int(self._errors(variables, *self._test))
        return {'test_error': 100 * wrong / len(self.dataset.test_labels)}

    def _final_scores(self, variables: Any) -> dict[str, float]:
        """How good it is in the end."""
        return self._scores(variables)

    def _left(self, variables: Any, threshold: Any) -> Any:
        """The variables of the network that would ship with this threshold."""
        if not self.variational:
            return variables
        return {**variables, 'params': svd.sparsify(variables['params'], threshold)}

    def epoch(
        self, state: svd.TrainState, epoch: int, advance: Any
    ) -> tuple[svd.TrainState, list[dict[str, Any]]]:
        """Trains for one epoch: a function of the state and the epoch's number alone.

        Returns:
          The state after it, and what is to be reported of each network.

        Raises:
          UsageError: no step of a network had a finite loss.
        """
        orders = np.stack([self._order(own, epoch) for own in self._configs])
        keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, epoch), self.steps))(
            self._noise_keys
        )
        kl_weights = jnp.asarray([own.kl_weight[0] for own in self._configs])
        group_weights = [self._group_weights(own, epoch) for own in self.split(state)]
        group_weights = jax.tree.map(lambda *own: jnp.asarray(own), *group_weights)
        fine_tune = epoch > self.config.epochs
        if epoch == self.config.epochs + 1:
            state = self._within_budget(state)
            state = state.replace(opt_state=self._fresh(state.params))
        started, chunks = time.perf_counter(), []
        shrunk, state = self._shrink(state, fine_tune)
        for first, batches in zip(range(0, self.steps, _CHUNK), self._feed(orders), strict=True):
            part = slice(first, first + _CHUNK)
            state, metrics = self._chunk(
                fine_tune,
                shrunk.model if shrunk else None,
                state,
                (self._resident, self.teacher if fine_tune else None),
                batches,
                keys[:, part],
                kl_weights,
                group_weights,
            )
            chunks.append(jax.device_get(metrics))
            advance(min(first + _CHUNK, self.steps))
        if shrunk:
            state = shrunk.expand(state)
        if self.config.average and epoch == self.config.total_epochs:
            state = averaging.averaged(state)
        seconds = time.perf_counter() - started
        metrics = {
            name: np.concatenate(
                [chunk[name].reshape(len(self.names), -1) for chunk in chunks], axis=1
            )
            for name in chunks[0]
        }
        rows = []
        for i, (name, own) in enumerate(zip(self.names, self.split(state), strict=True)):
            finite = metrics['finite'][i]
            if not finite.any():
                raise UsageError(
                    f'no step of epoch {epoch} had a finite loss ({name}): lower --learning-rate'
                )
            mean = {k: float(v[i, finite].mean()) for k, v in metrics.items()}
            row = {
                'epoch': epoch, 'loss': mean['loss'], 'data_term': mean['data_term'],
                'learning_rate': self.learning_rate(epoch), 'train_error': 100 * mean['error'],
                **self._scores(self._left(own.variables, self.config.thresholds)),
                **self._counts(own),
                'skipped_steps': int((~finite).sum()), 'seconds': seconds,
                **self._speed(orders[i].size / seconds),
            }  # fmt: skip
            if self.variational:
                weight = 0.0 if fine_tune else mean['kl_weight']
                row |= {'kl': mean['kl'], 'kl_weight': weight}
            rows.append(row)
        return state, rows

    def _fresh(self, params: Any) -> Any:
        """The optimiser's state before the first step of fine-tuning."""
        init = self._fine_tx.init
        return init(params) if len(self.names) == 1 else jax.vmap(init)(params)

    def _speed(self, examples_per_second: float) -> dict[str, float]:
        return {'images_per_second': examples_per_second}

    def _counts(self, state: svd.TrainState) -> dict[str, Any]:
        """Nonzero weights of one network, as the summary has them."""
        sparsity = svd.sparsity(state.params, self.config.thresholds)
        counts: dict[str, Any] = {
            'compression': sparsity.compression if sparsity.nonzero else None,
            'nonzero': sparsity.nonzero,
            'total': sparsity.total,
            'sparsity_per_layer': {k: v.percent for k, v in sparsity.layers.items()},
        }
        if sparsity.units:
            counts['units'] = {k: [v.nonzero, v.total] for k, v in sparsity.units.items()}
        return counts

    def _groups(self, state: svd.TrainState) -> dict[str, Any]:
        """What the summary has of units, where they are random."""
        if self.config.groups == 'none':
            return {}
        left = self._left(state.variables, self.config.thresholds)
        return {'groups': self.config.groups, **self._work(left)}

    def _work(self, variables: Any) -> dict[str, Any]:
        """The multiply-adds for an example, once made smaller, and of the dense network."""
        small = svd.compact(self._shipped, variables, self._example())
        dense, left = small.report.multiply_adds
        return {'multiply_adds': left, 'multiply_adds_dense': dense}

    def _example(self) -> jax.Array:
        return self._prepare(jnp.asarray(self.dataset.train_images[:1]))

    def _shipped(self, variables: Any, inputs: jax.Array) -> jax.Array:
        return self.model.apply(variables, inputs, True)[0]

    def _trained(self, variables: Any, inputs: jax.Array) -> Any:
        """Of one with batch statistics: its outputs in training, and the new statistics."""
        mutable = [name for name in variables if name != 'params']
        (logits, _), updates = self.model.apply(variables, inputs, mutable=mutable)
        return logits, updates

    def save_frame(self, folder: Path, epoch: int, state: svd.TrainState) -> None:
        """Adds a frame to the GIF of one network."""
        left = self._left(state.variables, self.config.thresholds)
        frame = pictures.snapshot(jax.device_get(left['params']), self.config.threshold)
        pictures.save_frame(folder / 'frames', epoch, frame)

    def finish(self, folder: Path, state: svd.TrainState, history: pictures.History) -> Any:
        """Writes the file and the pictures of one network; returns what its summary has of them."""
        frames = pictures.load_frames(folder / 'frames', self.config.total_epochs)
        params = jax.device_get(state.params)
        pictures.write_all(folder, params, history, self.config.threshold, frames)
        self._draw_units(folder, params)
        return self._ship(folder, state)

    def _draw_units(self, folder: Path, params: Any) -> None:
        """The architecture that is left, where units are random."""
        if self.config.groups == 'none':
            return
        directory = folder / 'pictures'
        directory.mkdir(exist_ok=True)
        left = jax.device_get(units(params, self.config.thresholds))
        named = {name_of(group): kept for group, kept in left.items()}
        ordered = {name: named[name] for name in in_order(named)}
        pictures.units(ordered, directory / 'units.png')

    def _ship(self, folder: Path, state: svd.TrainState) -> dict[str, Any]:
        """Writes what is left, exactly: the variables, or the parameters if those are all."""
        left = jax.device_get(self._left(state.variables, self.config.thresholds))
        network = left if state.collections else left['params']
        return {'file_bytes': svd.save(folder / 'model.svd', network)}

    def results(self, state: svd.TrainState) -> list[dict[str, Any]]:
        """Of each network, the results of the last epoch; no epoch is picked."""
        return [
            {
                'method': 'sparse_vd' if self.variational else 'dense',
                'dataset': self.dataset.name, 'seed': config.seed, 'epochs': config.epochs,
                **self._final_scores(self._left(own.variables, config.thresholds)),
                **_mean_weights(self._final_scores(self._left(own.variables, float('inf')))),
                'evaluated_on': self.evaluated_on,
                **self._counts(own),
                **self._groups(own),
                'config': config.identity(),
            }
            for config, own in zip(self._configs, self.split(state), strict=True)
        ]  # fmt: skip


def _together(states: list[svd.TrainState]) -> svd.TrainState:
    """The state of all networks: what :meth:`Training.split` takes apart."""
    if len(states) == 1:
        return states[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def is_random(params: Any) -> bool:
    """Whether any weight has a posterior, or scales that have one."""
    return any(weight.randoms for weight in weights(params))


def _is_log_sigma2(params: Any) -> Any:
    """True where a tree has a log variance."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'log_sigma2', params)


def _mean_weights(scores: dict[str, float]) -> dict[str, float]:
    return {f'{name}_mean_weights': score for name, score in scores.items()}


def evaluation_batches(array: np.ndarray, fill: int = 0) -> jax.Array:
    """(N, ...) to (batches, 1000, ...), the last one filled up; to (1, N, ...) of fewer."""
    size = min(_EVALUATION_BATCH, len(array))
    padding = np.full((-len(array) % size, *array.shape[1:]), fill, array.dtype)
    padded = np.concatenate([array, padding])
    return jnp.asarray(padded.reshape(-1, size, *array.shape[1:]))
