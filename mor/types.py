"""The dimension letters, and the array types that carry them.

Every array of rank >= 1 ends in its shape suffix. The letters:

  B batch rows          T query positions     S key positions
  C kept tokens         D model width         F feed-forward width
  N query heads         K key/value heads     G query heads per KV head (N // K)
  H head width          V vocabulary          L layers of the shared stack
  R recursion steps     1 a size-one axis     A rank of a low-rank delta

and in decoding

  B slots of the engine M tokens, or rows of a flat batch
  P pages of a row      E entries of a page, or stop tokens of a request
  I, O in and out of a projection
"""

import jax
from jaxtyping import Bool, Float, Int
import numpy as np

Array = jax.Array | np.ndarray

Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Segments = Int[Array, "B T"]
Mask = Bool[Array, "B T"]
Activations = Float[Array, "B T D"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
AttentionMask = Bool[Array, "B T S"]
Embedding = Float[Array, "V D"]
