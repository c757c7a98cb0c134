"""Character language models in plain Flax: no layer here knows of Sparse Variational Dropout.

Each takes tokens, integers (batch, time), and returns logits (batch, time, characters): at each
position those of the character after it, from the characters up to it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import svd_jax as svd

# The layers of Flax's LSTM cell: of its input, and of its state, for each of four gates.
_GATES = 'ifgo'
_OF_INPUT, _OF_STATE = (tuple(f'{of}{gate}' for gate in _GATES) for of in 'ih')


class LSTM(nn.Module):
    """One layer of LSTM between an embedding and a dense layer.

    Attributes:
      characters: size of the alphabet.
      embedding: width of the embedding.
      width: of the state.
      dtype: what the layers compute in; None for the type of the parameters.
    """

    characters: int
    embedding: int = 64
    width: int = 256
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.characters, self.embedding, dtype=self.dtype)(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width, dtype=self.dtype))(x)
        return nn.Dense(self.characters, dtype=self.dtype)(x)


class Transformer(nn.Module):
    """A causal Transformer with learnt positions, its layer normalisations before each part.

    Attributes:
      characters: size of the alphabet.
      width: of the stream between the blocks.
      depth: how many blocks.
      heads: of attention, in each block.
      length: the longest sequence.
      dtype: what the layers compute in; None for the type of the parameters.
    """

    characters: int
    width: int = 128
    depth: int = 2
    heads: int = 4
    length: int = 128
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        if tokens.shape[-1] > self.length:
            raise ValueError(
                f'{tokens.shape[-1]} characters are more than the {self.length} that the model has '
                'positions for: cut the sequence, or give it a larger length'
            )
        causal = nn.make_causal_mask(tokens)
        x = nn.Embed(self.characters, self.width, dtype=self.dtype)(tokens)
        positions = jnp.arange(tokens.shape[-1])
        x += nn.Embed(self.length, self.width, dtype=self.dtype, name='positions')(positions)[None]
        for _ in range(self.depth):
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x += nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, mask=causal)
            y = nn.LayerNorm(dtype=self.dtype)(x)
            y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
            x += nn.Dense(self.width, dtype=self.dtype)(y)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(self.characters, dtype=self.dtype)(x)


def units(path: str, gates: bool) -> Any:
    """Which entries of a weight share a scale: as ``groups`` of :func:`svd_jax.variational`.

    Of an LSTM cell that is a scale for each number that it reads, and one for each neuron; with
    ``gates``, one for each gate of each neuron too (Chirkova, Lobacheva & Vetrov 2018). Of a
    Transformer, one for each head of attention.

    Args:
      path: of the weight.
      gates: whether gates have scales.
    """
    layer = path.split('/')[-2]
    if layer == 'out':
        return 0
    for layers in (_OF_INPUT, _OF_STATE):
        if layer in layers:
            gate = svd.Shared('outputs', (f'h{layer[1]}', f'i{layer[1]}'))
            return [svd.Shared('inputs', layers), *([gate] if gates else [])]
    return 'inputs' if layer.startswith('Dense') else None


def neurons(params: Any) -> list[int]:
    """How many neurons of an :class:`LSTM` anything reads, and how many there are."""
    cell = params['OptimizedLSTMCell_0']
    readers = [*(cell[layer]['kernel'] for layer in _OF_STATE), params['Dense_0']['kernel']]
    read = np.any([np.any(np.asarray(kernel) != 0, axis=1) for kernel in readers], axis=0)
    return [int(read.sum()), read.size]
