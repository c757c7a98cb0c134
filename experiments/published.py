"""What others have published, each number with its source.

Nonzero weights, the rate of a code, and bytes of a file are three different things: each has a
table of its own here, and so on the page that `experiments.results` writes.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """Where a number was read.

    Attributes:
      name: how it is cited.
      url: where it is.
      quoted: the number was read in a later paper's comparison, not in its own.
    """

    name: str
    url: str
    quoted: bool = False

    def markdown(self) -> str:
        return f'[{self.name}]({self.url})' + (' (quoted)' if self.quoted else '')


def _arxiv(number: str, quoted: bool = False) -> Source:
    return Source(f'arXiv:{number}', f'https://arxiv.org/abs/{number}', quoted)


PAPER = _arxiv('1701.05369')
PRUNING = _arxiv('1506.02626', quoted=True)
DEEP_COMPRESSION = _arxiv('1510.00149', quoted=True)
DNS, SWS = _arxiv('1608.04493', quoted=True), _arxiv('1702.04008')
SSL, SBP = _arxiv('1608.03665', quoted=True), _arxiv('1705.07283')
BAYESIAN_COMPRESSION = _arxiv('1705.08665', quoted=True)
L0 = _arxiv('1712.01312', quoted=True)
WEIGHTLESS = _arxiv('1711.04686', quoted=True)
MIRACLE, OKTAY = _arxiv('1810.00440'), _arxiv('1906.06624')
LILNETX = _arxiv('2204.02965', quoted=True)
SPARSE_MOMENTUM = _arxiv('1907.04840')
AUTOPRUNE = Source(
    'NeurIPS 2019, abstract',
    'https://papers.nips.cc/paper_files/paper/2019/hash/4efc9e02abdab6b6166251918570a307-Abstract.html',
)
RECURRENT = Source("the authors' logs", 'https://github.com/tipt0p/SparseBayesianRNN')

_BC = 'Bayesian Compression (Louizos et al. 2017)'
_L0 = 'L0 (Louizos et al. 2018)'
_SBP = 'Structured Bayesian Pruning (Neklyudov et al. 2017)'


class Weights(NamedTuple):
    """A network with fewer nonzero weights.

    Attributes:
      method: whose.
      source: where it was read.
      compression: weights over nonzero weights; biases do not count.
      error: test error in percent; None if it was not given, or not in percent.
      zeros: percent of the weights of each layer.
      bits: bits per character, of a language model.
      epochs: of training.
    """

    method: str
    source: Source
    compression: float
    error: float | None = None
    zeros: str = ''
    bits: float | None = None
    epochs: int | None = None


class Rate(NamedTuple):
    """A network in the format of Deep Compression: dense bits over coded bits."""

    method: str
    source: Source
    rate: float
    error: float


class Units(NamedTuple):
    """A network of fewer units.

    Attributes:
      method: whose.
      source: where it was read.
      error: test error in percent.
      left: units of each layer, or of its inputs.
      fewer: how many times fewer floating point operations.
      cpu, gpu: how many times faster.
      operations: multiply-adds left, of those who count so.
    """

    method: str
    source: Source
    error: float
    left: str
    fewer: str = ''
    cpu: str = ''
    gpu: str = ''
    operations: str = ''


class File(NamedTuple):
    """A file that holds a network."""

    method: str
    source: Source
    nbytes: int
    error: float


WEIGHTS = {
    'lenet300': [
        Weights('the paper, dense', PAPER, 1, 1.64),
        Weights('the paper, Sparse VD', PAPER, 68, 1.92, '98.9-97.2-62.0', epochs=200),
        Weights('Pruning (Han et al. 2015)', PRUNING, 12, 1.59, '92-91-74'),
        Weights('DNS (Guo et al. 2016)', DNS, 56, 1.99, '98.2-98.2-94.5'),
        Weights('SWS (Ullrich et al. 2017)', SWS._replace(quoted=True), 23, 1.94),
        Weights('Sparse Momentum (Dettmers & Zettlemoyer 2019)', SPARSE_MOMENTUM, 67, 2.05),
    ],
    'lenet5': [
        Weights('the paper, dense', PAPER, 1, 0.80),
        Weights('the paper, Sparse VD', PAPER, 280, 0.75, '67-98-99.8-95', epochs=200),
        Weights('Pruning (Han et al. 2015)', PRUNING, 12, 0.77, '34-88-92-81'),
        Weights('DNS (Guo et al. 2016)', DNS, 111, 0.91, '86-97-99.3-96'),
        Weights('SWS (Ullrich et al. 2017)', SWS._replace(quoted=True), 200, 0.97),
        Weights('Sparse Momentum (Dettmers & Zettlemoyer 2019)', SPARSE_MOMENTUM, 200, 1.14),
        Weights('Sparse Momentum (Dettmers & Zettlemoyer 2019)', SPARSE_MOMENTUM, 250, 1.40),
        Weights('AutoPrune (Xiao et al. 2019), "without accuracy drop"', AUTOPRUNE, 310),
    ],
    'vgg': [
        Weights('the paper, Sparse VD, at most, over widths and data sets', PAPER, 68),
        Weights('AutoPrune (Xiao et al. 2019), "without accuracy drop"', AUTOPRUNE, 75),
    ],
    'char_lm': [
        Weights('LSTM on Penn Treebank, dense', RECURRENT, 1, bits=1.455),
        Weights('LSTM on Penn Treebank, Sparse VD', RECURRENT, 7.9, bits=1.429),
        Weights('LSTM on Penn Treebank, Sparse VD with groups', RECURRENT, 10.0, bits=1.430),
    ],
}

RATES = {
    'lenet300': [Rate('SWS (Ullrich et al. 2017)', SWS, 64, 1.94)],
    'lenet5': [Rate('SWS (Ullrich et al. 2017)', SWS, 162, 0.97)],
}

UNITS = {
    'lenet500300': [
        Units('dense', SBP, 1.54, '784-500-300-10', '1', '1', '1'),
        Units('Sparse VD', SBP, 1.57, '537-217-130-10', '3.73', '1.19', '1.03'),
        Units('SSL (Wen et al. 2016)', SSL, 1.49, '434-174-78-10', '6.06', '2.21', '1.04'),
        Units(_SBP, SBP, 1.55, '245-160-55-10', '11.23', '2.33', '1.08'),
    ],
    'lenet5': [
        Units('dense', SBP, 0.80, '20-50-800-500', '1', '1', '1'),
        Units('Sparse VD', SBP, 0.75, '17-32-329-75', '2.19', '1.48', '1.41'),
        Units('SSL (Wen et al. 2016)', SSL, 1.00, '3-12-800-500', '3.90', '5.17', '1.80'),
        Units(_SBP, SBP, 0.86, '3-18-284-283', '10.49', '5.41', '1.91'),
        Units(f'{_BC}, BC-GNJ', BAYESIAN_COMPRESSION, 1.0, '8-13-88-13', operations='290,000'),
        Units(f'{_BC}, BC-GHS', BAYESIAN_COMPRESSION, 1.0, '5-10-76-16', operations='158,000'),
        Units(_L0, L0, 0.9, '20-25-45-462', operations='1,300,000'),
        Units(f'{_L0}, L0-sep', L0, 1.0, '9-18-65-25', operations='403,000'),
    ],
    'vgg': [
        Units('k = 1, dense', SBP, 7.2, '', '1', '1', '1'),
        Units('k = 1, Sparse VD', SBP, 7.2, '', '2.27', '2.50', '1.69'),
        Units(f'k = 1, {_SBP}', SBP, 7.5, '', '2.30', '2.71', '1.74'),
        Units(f'k = 1, {_SBP}, more', SBP, 9.0, '', '3.16', '3.68', '2.06'),
    ],
}

FILES = {
    'lenet300': [
        File('Deep Compression (Han et al. 2016)', DEEP_COMPRESSION, 27_000, 1.58),
        File('Oktay et al. 2020', OKTAY, 8_560, 1.9),
    ],
    'lenet5': [
        File('Deep Compression (Han et al. 2016)', DEEP_COMPRESSION, 44_000, 0.8),
        File('Weightless (Reagen et al. 2018)', WEIGHTLESS, 4_520, 1.0),
        File('MIRACLE (Havasi et al. 2019)', MIRACLE, 3_030, 0.69),
        File('Oktay et al. 2020', OKTAY, 2_840, 1.0),
        File(_BC, BAYESIAN_COMPRESSION, 2_300, 1.0),
        File('MIRACLE (Havasi et al. 2019)', MIRACLE, 1_520, 0.96),
    ],
    'vgg': [
        File('VGG-16, MIRACLE (Havasi et al. 2019)', MIRACLE, 384_000, 6.57),
        File('VGG-16, MIRACLE (Havasi et al. 2019)', MIRACLE, 135_000, 10.0),
        File('VGG-16, LilNetX (Girish et al. 2022)', LILNETX, 129_000, 7.4),
        File('VGG-16, Oktay et al. 2020', OKTAY, 101_000, 10.0),
        File('VGG-16, LilNetX (Girish et al. 2022)', LILNETX, 76_000, 10.0),
    ],
}

# Of the paper's approximation of the KL divergence, equation 14: k1, k2, k3.
KL_CONSTANTS = (0.63576, 1.87320, 1.48695)
