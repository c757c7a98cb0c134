"""The training loop that all experiments share."""

import contextlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console

import svd_jax as svd
from experiments import data, pictures
from experiments.checkpoint import Checkpoints
from experiments.config import Config, fingerprint
from experiments.environment import environment
from experiments.errors import UsageError
from experiments.report import Report, lock, read_history, write_json

# Steps per dispatch: few enough for a lively progress bar, enough to hide the dispatch.
_CHUNK = 100
_EVALUATION_BATCH = 1000


def run(experiment: str, network: type[nn.Module], config: Config) -> dict[str, Any]:
    """Trains, evaluates and writes everything into the output folder.

    Args:
      experiment: the name under which checkpoints and the summary go.
      network: the architecture.
      config: the options.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UsageError: an option, the data or a checkpoint can't be used; the message names the fix.
    """
    console = Console()
    dataset = data.load(config.dataset, config.data_dir)
    if config.validation:
        dataset = data.validation_split(dataset, config.validation)
    data.epoch_permutation(config.seed, 0, len(dataset.train_labels), config.batch_size)  # checks
    out = config.folder(experiment)
    identity = _identity(experiment, config, dataset)
    with _claimed(out, identity, config.resume):
        return _train(experiment, Training(network, config, dataset), out, identity, console)


def _train(
    experiment: str, training: 'Training', out: Path, identity: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Trains from the last checkpoint, or from the start, to the summary."""
    config = training.config
    checkpoints = Checkpoints(
        out / 'checkpoints', experiment, 'start again with another --out', partial(_warn, console)
    )
    state, done, seconds = _start(experiment, training, checkpoints, console)
    # Only now: a run that could not start leaves its folder free.
    write_json(out / 'run.json', identity)
    if done < config.epochs:
        (out / 'summary.json').unlink(missing_ok=True)  # its being there says: complete
    history = read_history(out / 'metrics.jsonl', done)
    if not done:
        pictures.save_frame(out / 'frames', 0, training.frame(state))
    title = f'{experiment}, {config.method}, {training.dataset.name}, seed {config.seed}'
    if config.validation:
        title += f', tested on {config.validation} held-out images'
    with Report(out, title, history, done, config.epochs, training.steps, console) as report:
        saved = time.perf_counter()
        for epoch in range(done + 1, config.epochs + 1):
            started = time.perf_counter()
            state, row = training.epoch(state, epoch, report.advance)
            seconds += time.perf_counter() - started
            report.add(row)
            pictures.save_frame(out / 'frames', epoch, training.frame(state))
            last = epoch == config.epochs
            if last or time.perf_counter() - saved > config.checkpoint_seconds:
                checkpoints.save(epoch, state, {'seconds': seconds})
                saved = time.perf_counter()
    summary = {
        'experiment': experiment, 'recipe': 'paper', **training.results(state),
        'train_seconds': seconds,
        'steps_per_second': config.epochs * training.steps / seconds,
        **environment(),
    }  # fmt: skip
    frames = pictures.load_frames(out / 'frames', config.epochs)
    pictures.write_all(out, jax.device_get(state.params), report.history, config.threshold, frames)
    write_json(out / 'summary.json', summary)
    _say(console, out, state.params, summary)
    return summary


class Training:
    """The compiled parts of a run, with the data on the device."""

    def __init__(self, network: type[nn.Module], config: Config, dataset: data.Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.variational = config.method == 'svd'
        count = len(dataset.train_labels)
        self.steps = count // config.batch_size
        options = {
            'log_sigma2_init': config.log_sigma2_init,
            'threshold': config.threshold,
            'mask_in_training': config.mask_in_training,
            'kl_method': config.kl,
        }
        self.model = network(options=tuple(options.items()))
        self.learning_rate = optax.linear_schedule(
            config.learning_rate,
            0.0,
            max(1, round(config.epochs * self.steps * (1 - config.decay_from))),
            round(config.epochs * self.steps * config.decay_from),
        )
        self.tx = optax.adam(self.learning_rate)
        begin, end = (round(epoch * self.steps) for epoch in config.kl_warmup)
        self._step = svd.make_train_step(
            self.model.apply,
            svd.classification_loss,
            self.tx,
            num_data=count,
            num_samples=config.num_samples,
            kl_weight=svd.kl_warmup(begin, end),
            threshold=config.threshold,
        )
        self._mean = jnp.asarray(data.mean_image(dataset.train_images))[None]
        self._images = jnp.asarray(dataset.train_images)
        self._labels = jnp.asarray(dataset.train_labels)
        self._test = _batches(dataset.test_images), _batches(dataset.test_labels, fill=-1)
        self._init_key, self._noise_key = jax.random.split(jax.random.key(config.seed))

    def _prepare(self, images: jax.Array) -> jax.Array:
        return images.astype(jnp.float32) / 255 - self._mean

    def init(self, params: Any = None) -> svd.TrainState:
        """The state before the first step, from given dense parameters or random ones."""
        if params is None:
            params = self.dense_params(self._init_key)
        if self.variational:
            params = svd.variational(params, log_sigma2_init=self.config.log_sigma2_init)
        return svd.TrainState.create({'params': params}, self.tx)

    def dense_state(self) -> svd.TrainState:
        """A state of the dense network, as a run with ``--method dense`` has it."""
        return svd.TrainState.create({'params': self.dense_params(self._init_key)}, self.tx)

    def dense_params(self, key: jax.Array) -> Any:
        """Random parameters of the network without any posterior."""
        params = self.model.init(key, self._prepare(self._images[:1]))['params']
        return svd.sparsify(params, float('inf'))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _chunk(
        self, state: svd.TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array,
        keys: jax.Array,
    ) -> tuple[svd.TrainState, dict[str, jax.Array]]:  # fmt: skip
        def step(state: svd.TrainState, batch: tuple[jax.Array, jax.Array]) -> Any:
            index, key = batch
            return self._step(state, (self._prepare(images[index]), labels[index]), key)

        return lax.scan(step, state, (indices, keys))

    @partial(jax.jit, static_argnums=0)
    def _errors(self, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        def errors(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            logits, _ = self.model.apply({'params': params}, self._prepare(batch[0]), True)
            return jnp.sum((jnp.argmax(logits, -1) != batch[1]) & (batch[1] >= 0))

        return lax.map(errors, (images, labels)).sum()

    def _test_error(self, params: Any, threshold: float) -> float:
        """Percent of the test images that the network that would ship gets wrong."""
        if self.variational:
            params = svd.sparsify(params, threshold)
        return 100 * int(self._errors(params, *self._test)) / len(self.dataset.test_labels)

    def epoch(self, state: svd.TrainState, epoch: int, advance: Any) -> tuple[svd.TrainState, Any]:
        """Trains for one epoch: a function of the state and the epoch's number alone."""
        order = data.epoch_permutation(
            self.config.seed, epoch, len(self.dataset.train_labels), self.config.batch_size
        )
        keys = jax.random.split(jax.random.fold_in(self._noise_key, epoch), self.steps)
        learning_rate = float(self.learning_rate(state.step))
        started, chunks = time.perf_counter(), []
        for first in range(0, self.steps, _CHUNK):
            indices, chunk_keys = order[first : first + _CHUNK], keys[first : first + _CHUNK]
            state, metrics = self._chunk(state, self._images, self._labels, indices, chunk_keys)
            chunks.append(jax.device_get(metrics))
            advance(first + len(indices))
        seconds = time.perf_counter() - started
        metrics = {k: np.concatenate([chunk[k] for chunk in chunks]) for k in chunks[0]}
        finite = metrics['finite']
        if not finite.any():
            raise UsageError(f'no step of epoch {epoch} had a finite loss: lower --learning-rate')
        mean = {k: float(v[finite].mean()) for k, v in metrics.items()}
        row = {
            'epoch': epoch, 'loss': mean['loss'], 'data_term': mean['data_term'],
            'learning_rate': learning_rate, 'train_error': 100 * mean['error'],
            'test_error': self._test_error(state.params, self.config.threshold),
            **self.counts(state),
            'skipped_steps': int((~finite).sum()), 'seconds': seconds,
            'images_per_second': order.size / seconds,
        }  # fmt: skip
        if self.variational:
            row |= {'kl': mean['kl'], 'kl_weight': mean['kl_weight']}
        return state, row

    def counts(self, state: svd.TrainState) -> dict[str, Any]:
        """Nonzero weights, as the summary has them."""
        sparsity = svd.sparsity(state.params, self.config.threshold)
        return {
            'compression': sparsity.compression if sparsity.nonzero else None,
            'nonzero': sparsity.nonzero,
            'total': sparsity.total,
            'sparsity_per_layer': {k: v.percent for k, v in sparsity.layers.items()},
        }

    def frame(self, state: svd.TrainState) -> pictures.Frame:
        """A frame of the GIF."""
        return pictures.snapshot(jax.device_get(state.params), self.config.threshold)

    def results(self, state: svd.TrainState) -> dict[str, Any]:
        """The results of the last epoch; no epoch is picked."""
        config = self.config
        return {
            'method': 'sparse_vd' if self.variational else 'dense',
            'dataset': self.dataset.name, 'seed': config.seed, 'epochs': config.epochs,
            'test_error': self._test_error(state.params, config.threshold),
            'test_error_mean_weights': self._test_error(state.params, float('inf')),
            'evaluated_on': f'{config.validation} held out' if config.validation else 'test set',
            **self.counts(state),
            'config': config.identity(),
        }  # fmt: skip


def _batches(array: np.ndarray, fill: int = 0) -> jax.Array:
    """(N, ...) to (batches, 1000, ...), the last one filled up."""
    missing = -len(array) % _EVALUATION_BATCH
    padding = np.full((missing, *array.shape[1:]), fill, array.dtype)
    padded = np.concatenate([array, padding])
    return jnp.asarray(padded.reshape(-1, _EVALUATION_BATCH, *array.shape[1:]))


def _identity(experiment: str, config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """What `run.json` holds: whose output folder it is."""
    return {
        'experiment': experiment,
        'dataset': dataset.name,
        'examples': fingerprint(*dataset[1:]),
        **config.identity(),
    }


@contextlib.contextmanager
def _claimed(out: Path, identity: dict[str, Any], resume: bool) -> Iterator[None]:
    """Makes the output folder this run's, and this process the only one that writes to it.

    Raises:
      UsageError: it holds another run, or this one without ``--resume``; another process is at
        work in it; or it cannot be written to, now or later.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'cannot make the folder {out} ({error}): choose another --out') from error
    try:
        with lock(out):
            _check_claim(out, identity, resume)
            yield
    except OSError as error:  # a full disk above all; the last checkpoint is as it was
        raise UsageError(
            f'cannot write to {out} ({error}): see to that and --resume, or choose another --out'
        ) from error


def _check_claim(out: Path, identity: dict[str, Any], resume: bool) -> None:
    path = out / 'run.json'
    if not path.exists():
        if any(other.name != 'run.tmp' for other in out.iterdir()):  # that, a kill may leave
            raise UsageError(f'{out} is not empty and holds no run: choose another --out')
    elif not resume:
        raise UsageError(
            f'{out} already holds a run: go on with it by --resume, or choose another --out'
        )
    else:
        try:
            before = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UsageError(f'{path} is damaged: choose another --out') from error
        for name, value in identity.items():
            if before.get(name) != value:
                option = name if name in ('experiment', 'examples') else _option(name)
                raise UsageError(
                    f'{out} holds a run with {option} {before.get(name)}, not {value}: '
                    'give --resume the same options, or choose another --out'
                )


def _option(name: str) -> str:
    return '--' + name.replace('_', '-')


def _warn(console: Console, line: str) -> None:
    # A path may hold what looks like markup, and a log file has lines of any length.
    console.print(line, style='yellow', markup=False, highlight=False, soft_wrap=True)


def _start(
    experiment: str, training: Training, checkpoints: Checkpoints, console: Console
) -> tuple[svd.TrainState, int, float]:
    """The state to start from, the epochs it has behind it and the seconds they took."""
    config = training.config
    if config.resume:
        restored = checkpoints.restore(like=training.init())
        if restored is not None:
            state, facts = restored
            done = facts['epoch']
            console.print(
                f'resuming after epoch {done} of {config.epochs}'
                if done < config.epochs
                else f'all {done} epochs are done: writing the pictures and the summary again'
            )
            return state, done, facts['seconds']
        console.print('no checkpoint yet: starting from the beginning')
    if config.pretrained is None:
        return training.init(), 0, 0.0
    folder = config.pretrained / 'checkpoints'
    advice = (
        f'give --pretrained the output folder of `python -m experiments.{experiment} '
        '--method dense`'
    )
    found = Checkpoints(folder, experiment, advice, partial(_warn, console)).restore(
        like=training.dense_state()
    )
    if found is None:
        raise UsageError(f'no checkpoint in {folder}: {advice}')
    dense, facts = found
    _warn(console, f'starting from the dense weights after epoch {facts["epoch"]} in {folder}')
    return training.init(dense.params), 0, 0.0


def _say(console: Console, out: Path, params: Any, summary: dict[str, Any]) -> None:
    console.print()
    weights = ''
    if summary['method'] == 'sparse_vd':
        console.print(str(svd.sparsity(params, summary['config']['threshold'])), highlight=False)
        console.print()
        ratio = summary['compression']
        weights = 'no weights left, ' if ratio is None else f'{ratio:.1f} times fewer weights, '
    console.print(
        f'error {summary["test_error"]:.2f} % ({summary["evaluated_on"]}, {summary["dataset"]}), '
        f'{weights}{summary["train_seconds"]:.0f} s of training'
    )
    console.print(
        f'summary, metrics, checkpoints and pictures: {out}',
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
