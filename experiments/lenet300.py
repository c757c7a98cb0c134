"""LeNet-300-100 on MNIST by Sparse Variational Dropout::

python -m experiments.lenet300 [--data-dir DIR] [--epochs 200] [--seed 0]
"""

from experiments import config, loop, models

DEFAULTS = config.Config(decay_from=0.5)


def run(options: config.Config) -> None:
    loop.run('lenet300', models.LeNet300, options)


if __name__ == '__main__':
    config.command_line(run, DEFAULTS, __doc__)
