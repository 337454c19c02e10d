"""Weights laid out for decoding, in every format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import decoder as decoder_lib
from mor.decode import storage
from mor.decode import weights
from mor.model import transformer
from mor.serve import generate
from tests.helpers import platforms
from tests.helpers import tiny

ERROR = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 2e-2}  # of a product, relative to the greatest


@pytest.mark.parametrize("weight_format", weights.FORMATS)
@pytest.mark.parametrize("num", [1, 3, 20])
def test_products_are_within_the_formats_tolerance(weight_format, num):
  rng = np.random.default_rng(0)
  x_MI, w_OI = rng.normal(size=(num, 24)).astype(np.float32), rng.normal(size=(17, 24)).astype(np.float32)
  x_MI *= 10.0 ** rng.integers(-3, 3, (num, 1))  # rows of any size are as exact
  y_MO = weights.project(jnp.asarray(x_MI), weights._matrix(jnp.asarray(w_OI), weight_format))
  assert y_MO.dtype == jnp.float32
  right_MO = x_MI @ w_OI.T
  error_M = np.abs(y_MO - right_MO).max(axis=1) / np.abs(right_MO).max(axis=1)
  assert error_M.max() < ERROR[weight_format]
  assert (error_M.max() > ERROR["float32"]) == (weight_format != "float32")


def test_a_row_of_zeros_is_zero_in_int8():
  matrix = weights._matrix(jnp.zeros((5, 4)), "int8")
  assert not weights.project(jnp.zeros((2, 4)), matrix).any()
  assert not weights.project(jnp.ones((2, 4)), matrix).any()


@pytest.mark.parametrize("weight_format", weights.FORMATS)
def test_a_token_through_the_model_is_within_the_formats_tolerance(weight_format):
  config = tiny.config(model=dict(router=tiny.FIXED)).model
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 1)).astype(np.int32)
  module = transformer.Transformer(config)
  variables = module.init(jax.random.key(0), tokens)
  out = module.apply(variables, tokens, routing="decide")
  right_BV = transformer.unembed(variables["params"], out.hidden_BTD)[:, 0]
  decoder = decoder_lib.Decoder(config, storage.Dense(4, config.num_kv_heads, config.head_dim, "float32"))
  cache = decoder.tables.make_cache(3, 9, 3, 1)
  position_B = jnp.zeros(3, jnp.int32)
  _, logits_BV, _ = generate.advance(decoder, weights.prepare(config, variables, weight_format), cache,
                                     jnp.asarray(tokens[:, 0]), position_B, position_B == 0)
  tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 6e-2}[weight_format]
  assert np.abs(logits_BV - right_BV).max() < tolerance * np.abs(right_BV).max()


def test_the_matrices_have_the_formats_size():
  config = tiny.config().model
  variables = transformer.Transformer(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))
  size = {name: sum(m.w_OI.nbytes for m in jax.tree.leaves(
      weights.prepare(config, variables, name).stack, is_leaf=lambda x: isinstance(x, weights.Matrix))
                    if isinstance(m, weights.Matrix)) for name in weights.FORMATS}
  assert size["float32"] == 2 * size["bfloat16"] == 4 * size["int8"] > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weight_format", weights.FORMATS)
def test_an_accelerator_stores_the_embedding_once(weight_format, tied):
  """Where the output matrix is the embedding in the same format; the states are those of the CPU's table, bit for bit."""
  config = tiny.config(model=dict(tie_embeddings=tied)).model
  variables = transformer.Transformer(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))
  decoder = decoder_lib.Decoder(config, storage.Dense(4, config.num_kv_heads, config.head_dim, "float32"))
  tokens_B = jnp.arange(config.vocab_size)[::-3]
  expected_BD = decoder.embed(weights.prepare(config, variables, weight_format), tokens_B)
  with platforms.pretend("tpu"):
    made = weights.prepare(config, variables, weight_format)
    np.testing.assert_array_equal(decoder.embed(made, tokens_B), expected_BD)
  assert (made.lookup_VD is None) == (tied and weight_format != "int8")
  assert made.table_VD.dtype == ("float32" if weight_format == "float32" else "bfloat16")
  assert made.devices() == {jax.devices()[0]}


def test_unknown_format_is_refused():
  config = tiny.config().model
  with pytest.raises(ValueError, match="int4.*use one of float32, bfloat16, int8"):
    weights.prepare(config, {"params": {}}, "int4")
