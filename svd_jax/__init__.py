"""Sparse Variational Dropout for JAX and Flax (not singular value decomposition).

Train a network whose every weight learns its own noise level, drop the weights that turn out to be
only noise, and ship what is left::

    import svd_jax as svd

    y, kl = svd.linen.Dense(300)(x)             # layers return the KL beside the activations
    params = svd.variational(params)            # a dense tree becomes variational
    step = svd.make_train_step(model.apply, svd.classification_loss, tx, num_data=60_000)
    sparse = svd.sparsify(params)               # zeros where log_alpha >= 3
    print(svd.sparsity(sparse))
    svd.save('network.svd', sparse)             # a small file

Molchanov, Ashukha & Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017.
"""

from svd_jax import backend as backend
from svd_jax import linen as linen
from svd_jax import nnx as nnx
from svd_jax._version import __version__ as __version__
from svd_jax.compaction import Compact as Compact
from svd_jax.compaction import compact as compact
from svd_jax.compaction import fold as fold
from svd_jax.convention import weight_paths as weight_paths
from svd_jax.cost import kl_weights as kl_weights
from svd_jax.cost import unit_costs as unit_costs
from svd_jax.diagnosis import Diagnosis as Diagnosis
from svd_jax.diagnosis import Sparsity as Sparsity
from svd_jax.diagnosis import diagnose as diagnose
from svd_jax.diagnosis import sparsity as sparsity
from svd_jax.export import export_arrays as export_arrays
from svd_jax.export import export_onnx as export_onnx
from svd_jax.export import export_stablehlo as export_stablehlo
from svd_jax.file import SvdFormatError as SvdFormatError
from svd_jax.file import load as load
from svd_jax.file import save as save
from svd_jax.inspection import compare as compare
from svd_jax.inspection import inspect as inspect
from svd_jax.inspection import verify as verify
from svd_jax.pretrained import load_pretrained as load_pretrained
from svd_jax.runtime import compile as compile
from svd_jax.shrinking import Shrunk as Shrunk
from svd_jax.shrinking import shrink as shrink
from svd_jax.symmetry import sort_units as sort_units
from svd_jax.train import TrainState as TrainState
from svd_jax.train import classification_loss as classification_loss
from svd_jax.train import elbo_loss as elbo_loss
from svd_jax.train import kl_warmup as kl_warmup
from svd_jax.train import kl_warmup_for as kl_warmup_for
from svd_jax.train import make_train_step as make_train_step
from svd_jax.transform import apply as apply
from svd_jax.transform import sample as sample
from svd_jax.tree import Shared as Shared
from svd_jax.tree import kl as kl
from svd_jax.tree import log_alpha as log_alpha
from svd_jax.tree import sparsify as sparsify
from svd_jax.tree import variational as variational
