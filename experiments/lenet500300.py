"""LeNet-500-300 on MNIST: the network of Structured Bayesian Pruning, for whole units.

Its results are in docs/results.md; --method dense first, then --pretrained and --groups units.
"""

from experiments import config, loop, models

DEFAULTS = config.Config(decay_from=0.5)


def run(options: config.Config) -> None:
    loop.run('lenet500300', models.LeNet500300, options)


if __name__ == '__main__':
    config.command_line(run, DEFAULTS, __doc__)
