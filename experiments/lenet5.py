"""LeNet-5-Caffe on MNIST by Sparse Variational Dropout.

Result: test error 0.78 %, 279.2 times fewer weights (200 epochs, seed 0), about 90 minutes alone on
two cores of a CPU.
"""

from experiments import config, loop, models

DEFAULTS = config.Config(decay_from=0.0)


def run(options: config.Config) -> None:
    loop.run('lenet5', models.LeNet5, options)


if __name__ == '__main__':
    config.command_line(run, DEFAULTS, __doc__)
