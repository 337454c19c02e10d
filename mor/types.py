"""The glossary of words, the dimension letters, and the array types that carry them.

One word has one meaning:

  layer          a set of parameters: attention, feed-forward, norms
  stack          the layers that every recursion step shares
  stack index    index of a layer within the stack
  prelude, coda  layers that run once, before and after the recursion
  step           one pass through the stack, 0-based; also an optimizer step in training
  depth          number of steps that process a token
  position       place of a token in its sequence, 0-based
  segment        a document within a packed row; 0 is padding
  batch row      one sequence of a batch
  KV row         stored keys and values of one sequence at one step
  slot           place for one running request in the engine
  tick           one pass of the stack for all slots, each at its own step
  flat token     one of the M tokens that a tick runs, from any slot
  router         the part that decides how many steps process a token
  capacity       fraction, or number C, of the tokens that a step keeps
  gate           factor of the output of a step for a token
  aux loss       loss of a router, added to the loss of the model
  causal         routing by past tokens alone (`decide`), as in generation
  oracle         routing as in training (`select`), which may see the whole row
  exit           point after a layer where a confident token may leave early
  pending token  a token that left early and whose deeper keys are not yet computed
  draft          a token predicted at an exit, to be verified at full depth

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
