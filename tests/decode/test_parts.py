"""A model in parts: what it splits, and what cannot be split."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mor import sharding
from mor.decode import decoder as decoder_lib
from mor.decode import parts as parts_lib
from mor.decode import slots as slots_lib
from mor.decode import storage as storage_lib
from mor.decode import tick as tick_lib
from mor.decode import variant as variant_lib
from mor.decode import weights as weights_lib
from tests.helpers import decoding
from tests.helpers import platforms
from tests.helpers import tiny


def test_a_part_has_its_share_of_what_is_split():
  model = tiny.config(model=dict(vocab_size=62)).model
  part = parts_lib.cut(model, 2)
  assert (part.num_heads, part.num_kv_heads, part.d_ff) == (2, 1, 14)
  assert (part.vocab_size, part.d_model, part.head_dim) == (62, 20, 6)
  assert parts_lib.cut(model, 1) == model


@pytest.mark.parametrize("num, message", [
    (4, r"tensor=4 does not divide model.num_kv_heads=2, model.vocab_size=62; use 1 or 2"),
    (3, r"tensor=3 does not divide model.num_heads=4, model.num_kv_heads=2, model.d_ff=28, model.vocab_size=62; use 1 or 2"),
])
def test_what_does_not_divide_is_refused_by_name(num, message):
  with pytest.raises(ValueError, match=message):
    parts_lib.cut(tiny.config(model=dict(vocab_size=62)).model, num)


def test_an_odd_vocabulary_is_refused_by_name():
  with pytest.raises(ValueError, match=r"tensor=2 does not divide model.vocab_size=61; use 1$"):
    parts_lib.cut(tiny.config().model, 2)


def test_a_tick_sums_twice_a_layer_and_joins_the_logits_once():
  """As an accelerator runs it, which has one head for all slots; the embedding is one more sum."""
  model = tiny.config(model=dict(vocab_size=62, num_layers=5)).model  # prelude, one shared layer, coda
  part, leaves = parts_lib.cut(model, 2), []
  decoder = decoder_lib.Decoder(part, storage_lib.Dense(12, part.num_kv_heads, part.head_dim, "float32"))

  def make(variables):
    weights = parts_lib.arrange(model, weights_lib.prepare(model, variables, "float32"), 2)
    slots = slots_lib.make(decoder, weights, 3, 9, 3, 1)
    leaves.extend((jax.tree.structure(weights), jax.tree.structure(slots), parts_lib.list_specs(weights),
                   parts_lib.list_slots_specs(slots)))
    return jax.tree.leaves(weights), [jnp.concatenate([leaf] * (2 if spec else 1)) if leaf.ndim else leaf
                                      for leaf, spec in zip(jax.tree.leaves(slots), leaves[3])]

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
  shapes = jax.eval_shape(make, decoding.draw(model))
  with platforms.pretend("tpu"):
    run = functools.partial(tick_lib.run, decoder, num_ticks=1, vocab_size=62, together=False,
                            variant=variant_lib.Variant("greedy", False, False))
    program = parts_lib.compile_program(mesh, run, tuple(leaves[:2]), tuple(leaves[2:]))
    text = str(jax.make_jaxpr(program)(*shapes, (), {}))
  assert len(re.findall(r"= psum\w*\[", text)) == 2 * 3 + 1 and len(re.findall(r"= all_gather\w*\[", text)) == 1


@pytest.mark.parametrize("weight_format", weights_lib.FORMATS)
def test_parts_hold_the_whole_model_once(weight_format):
  """Neighbouring rows of an arranged matrix are some heads of q, of k and of v; together they are all rows."""
  config = tiny.config(model=dict(vocab_size=62, lora=dict(q=2, v=1, o=3, up=4))).model
  whole = weights_lib.prepare(config, decoding.draw(config), weight_format, first=7)
  arranged = parts_lib.arrange(config, whole, 2)
  for old, new in zip(whole.stack + whole.coda, arranged.stack + arranged.coda):
    for name in ("qkv", "gate_up"):
      before, after = (np.asarray(layer.matrices[name].w_OI, np.float32) for layer in (old, new))
      assert (np.sort(before, axis=0) == np.sort(after, axis=0)).all() and (before != after).any()
    q_OI, k_OI, v_OI = np.split(np.asarray(old.matrices["qkv"].w_OI), [24, 36])
    first_OI = np.concatenate([q_OI[:12], k_OI[:6], v_OI[:6]])
    np.testing.assert_array_equal(np.asarray(new.matrices["qkv"].w_OI)[:24], first_OI)
    for name in ("o", "down"):
      np.testing.assert_array_equal(old.matrices[name].w_OI, new.matrices[name].w_OI)
  assert [delta["qkv"].outs for delta in arranged.deltas] == [(12, 6, 6)] * len(whole.deltas)
  specs = {sharding.path_name(path): spec for (path, _), spec in zip(
      jax.tree_util.tree_leaves_with_path(arranged), parts_lib.list_specs(arranged))}
  wide, deep, whole = P("tensor"), P(None, "tensor"), P()
  assert {name: specs[f"stack/0/matrices/{name}/w_OI"] for name in ("qkv", "gate_up", "o", "down")} == dict(
      qkv=wide, gate_up=wide, o=deep, down=deep)
  assert (specs["deltas/0/qkv/a/w_OI"], specs["deltas/0/qkv/b/0/w_OI"]) == (whole, wide)
  assert (specs["deltas/0/o/a/w_OI"], specs["deltas/0/o/b/0/w_OI"]) == (deep, whole)
  assert [specs[name] for name in ("head/w_OI", "lookup_VD", "draft_head/w_OI", "final_norm_D")] == [wide, wide, whole, whole]
  if weight_format == "int8":
    assert (specs["coda/0/matrices/qkv/scale_O"], specs["coda/0/matrices/o/scale_O"]) == (wide, whole)
