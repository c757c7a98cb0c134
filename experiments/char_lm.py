"""A character language model on Tiny Shakespeare, by Sparse Variational Dropout.

The models are plain Flax, an LSTM and a Transformer; svd.variational and svd.apply make them
variational from outside.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

import svd_jax as svd
from experiments import config, language_models, loop, pictures, text
from experiments.training import Training, compute_dtype, is_random

_EVALUATION_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """Options of a training run of a language model."""

    model: Literal['lstm', 'transformer'] = 'lstm'
    """Which network."""
    dataset: str = text.NAME
    """tiny_shakespeare, or the path of a text file."""
    length: int = 64
    """Characters in a training sequence."""
    width: int | None = None
    """Of the model; its own default if not given."""
    depth: int = 2
    """Blocks of the Transformer."""
    batch_size: int = 32
    """Training sequences per step."""
    gates: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --groups: the gates of the LSTM cell have scales as well (Chirkova et al. 2018)."""
    # What is for images only.
    validation: tyro.conf.Suppress[int] = 0
    shift: tyro.conf.Suppress[int] = 0
    flip: tyro.conf.Suppress[bool] = False
    stream: tyro.conf.Suppress[Literal['auto', 'yes', 'no']] = 'auto'

    def __post_init__(self) -> None:
        super().__post_init__()
        config.require(self.length >= 2, 'length', 'must be at least 2')
        config.require(self.depth >= 1, 'depth', 'must be at least 1')
        if self.width is not None:
            whole = type(self.width) is int and self.width >= 1
            config.require(whole, 'width', f'must be a whole number from 1, not {self.width!r}')
            heads = language_models.Transformer.heads
            fits = self.model == 'lstm' or self.width % heads == 0
            config.require(fits, 'width', f'must be a multiple of {heads} for the Transformer')
        has_gates = self.model == 'lstm' and self.groups != 'none'
        config.require(has_gates or not self.gates, 'gates', 'is for --model lstm with --groups')

    def folder(self, experiment: str) -> Path:
        return super().folder(f'{experiment}-{self.model}')

    def identity(self) -> dict[str, Any]:
        unused = ('validation', 'shift', 'flip')
        return {name: value for name, value in super().identity().items() if name not in unused}


def make_model(options: Config, characters: int) -> nn.Module:
    """The network that the options name."""
    dtype = compute_dtype(options)
    sizes: dict[str, Any] = {} if options.width is None else {'width': options.width}
    if options.model == 'lstm':
        return language_models.LSTM(characters, **sizes, dtype=dtype)
    return language_models.Transformer(
        characters, **sizes, depth=options.depth, length=options.length, dtype=dtype
    )


class TextTraining(Training):
    """Trains language models on windows of a text; see :class:`experiments.training.Training`."""

    def __init__(self, options: Config, corpus: text.Corpus) -> None:
        self.dataset = corpus
        self.model = make_model(options, len(corpus.alphabet))
        self._length, self._name, self._gates = options.length, options.model, options.gates
        windows = text.windows_in(len(corpus.train), options.length)
        # The likelihood of the text is a sum over its characters, the loss a mean over them: the
        # KL is divided by their number, not by that of the sequences.
        self._set_up(options, windows, num_data=len(corpus.train))
        self._resident = jnp.asarray(corpus.train)
        # One to choose hyperparameters by, the other for the summary alone.
        self.followed_on, self.evaluated_on = 'validation split', 'test split'
        self._validation = _evaluation_batches(corpus.validation, options.length)
        self._test = _evaluation_batches(corpus.test, options.length)

    def _order(self, config: Any, epoch: int) -> np.ndarray:
        return text.starts(
            config.seed, epoch, len(self.dataset.train), config.length, config.batch_size
        )

    def _batch(self, resident: Any, batch: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        at = batch[:, None] + jnp.arange(self._length + 1)[None]
        windows = resident[at]
        return windows[:, :-1], windows[:, 1:], key

    def _dense_variables(self, key: jax.Array) -> Any:
        tokens = jax.ShapeDtypeStruct((1, self._length), jnp.int32)
        return self.model.lazy_init(key, tokens)  # does not run the network

    def units(self, path: str) -> Any:
        return language_models.units(path, self._gates)

    def _groups(self, state: svd.TrainState) -> dict[str, Any]:
        found = super()._groups(state)
        if found and self._name == 'lstm':
            left = self._left(state.variables, self.config.thresholds)
            found['neurons'] = language_models.neurons(left['params'])
        return found

    def _example(self) -> jax.Array:
        return jnp.asarray(self.dataset.train[None, : self._length])

    def _apply(self, variables: Any, inputs: jax.Array, rngs: Any, **options: Any) -> Any:
        if not is_random(variables['params']):
            return self.model.apply(variables, inputs, **options), jnp.zeros(())
        return svd.apply(
            self.model, variables, inputs, rngs=rngs, kl_method=self.config.kl,
            threshold=self.config.threshold if self.config.mask_in_training else None, **options,
        )  # fmt: skip

    def _shipped(self, variables: Any, inputs: jax.Array) -> jax.Array:
        return self.model.apply(variables, inputs)

    @partial(jax.jit, static_argnums=0)
    def _totals(
        self, variables: Any, inputs: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of each batch, the nats and the wrong guesses of the characters that count."""

        def totals(batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            inputs, targets = batch
            logits = self._shipped(variables, inputs).astype(jnp.float32)
            counted = targets >= 0
            nats = optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.where(counted, targets, 0)
            )
            wrong = jnp.argmax(logits, -1) != targets
            return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted & wrong)

        return lax.map(totals, (inputs, targets))

    def _scores(self, variables: Any) -> dict[str, float]:
        return self._scores_on(self._validation, variables)

    def _final_scores(self, variables: Any) -> dict[str, float]:
        validation = self._scores_on(self._validation, variables)
        return {
            **self._scores_on(self._test, variables),
            'validation_bits_per_character': validation['bits_per_character'],
        }

    def _scores_on(self, batches: Any, variables: Any) -> dict[str, float]:
        nats, wrong = jax.device_get(self._totals(variables, *batches))
        counted = int(np.sum(batches[1] >= 0))
        return {
            'bits_per_character': float(np.sum(nats, dtype=np.float64) / math.log(2) / counted),
            'test_error': 100 * int(np.sum(wrong)) / counted,
        }

    def _speed(self, examples_per_second: float) -> dict[str, float]:
        return {'characters_per_second': self._length * examples_per_second}

    def save_frame(self, folder: Path, epoch: int, state: svd.TrainState) -> None:
        """No GIF: its pictures are of images' weights."""

    def finish(self, folder: Path, state: svd.TrainState, history: pictures.History) -> Any:
        """Writes the file to ship, and the curves."""
        params = jax.device_get(state.params)
        directory = folder / 'pictures'
        directory.mkdir(exist_ok=True)
        if history:
            pictures.training_curves(history, directory / 'curves.png')
        if self.variational and self.config.groups != 'units':  # then no weight has a log alpha
            pictures.log_alpha_histogram(params, self.config.threshold, directory / 'log_alpha.png')
        self._draw_units(folder, params)
        return {'model': self._name, **self._ship(folder, state)}


def _evaluation_batches(tokens: np.ndarray, length: int) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets, (batches, 64, length) each, the last batch filled up with none."""
    inputs, targets = text.evaluation_windows(tokens, length, length // 2)
    return _batches(inputs, 0), _batches(targets, -1)


def _batches(windows: np.ndarray, fill: int) -> jax.Array:
    """(windows, length) to (batches, 64, length), the last one filled up."""
    missing = -len(windows) % _EVALUATION_BATCH
    padding = np.full((missing, windows.shape[1]), fill, windows.dtype)
    padded = np.concatenate([windows, padding])
    return jnp.asarray(padded.reshape(-1, _EVALUATION_BATCH, windows.shape[1]))


DEFAULTS = Config(epochs=15, learning_rate=3e-3, log_sigma2_init=-8.0, log_sigma2_rate=4.0)


def run(options: Config) -> None:
    corpus = text.load(options.dataset, options.data_dir)
    text.starts(options.seed, 0, len(corpus.train), options.length, options.batch_size)  # checks
    facts = {
        'experiment': 'char_lm', 'dataset': corpus.name,
        'examples': config.fingerprint(*corpus[2:]),
    }  # fmt: skip
    loop.run_training(lambda: TextTraining(options, corpus), options, facts)


if __name__ == '__main__':
    config.command_line(run, DEFAULTS, __doc__)
