"""An engine whose devices share the model gives the tokens of one device."""

import jax
import pytest

from mor.decode import packed
from mor.model.kv import plans as kv_plans
from mor.model.routers import table as router_table
from mor.serve import engine as engine_lib
from tests.helpers import exiting
from tests.helpers import platforms
from tests.helpers import serving
from tests.helpers import tiny

EVEN = dict(vocab_size=62)  # the other sizes of the tiny model are even


def check(model, requests, tensor=2, expected=None, **options):
  """Serves requests on parts of a model; returns the engine, whose pages are all free."""
  if expected is None:
    expected, _ = serving.serve(serving.engine(model, **options), requests, 0)
  engine = serving.engine(model, tensor=tensor, **options)
  done, _ = serving.serve(engine, requests, 0)
  assert len(done) == len(requests)
  for place, completion in done.items():
    serving.assert_same(completion, expected[place], requests[place])
  serving.assert_all_free(engine)
  return engine


CASES = tiny.crossed(router_table.ROUTERS, kv_plans.PLANS)
ONE = ("expert_choice", "recursion_wise")  # each compiles for long


@pytest.mark.parametrize("router, plan", [
    ONE, *(pytest.param(*case.values, marks=pytest.mark.slow) for case in CASES if case.values != ONE)])
def test_two_parts_give_the_tokens_of_generate(router, plan):
  model, requests = serving.model(**EVEN, kv_plan=plan, router=tiny.router(router)), serving.requests(12)
  engine = check(model, requests, expected=serving.reference(model, requests))
  assert {program._cache_size() for program in engine.runner._parts._programs.values()} == {1}, "compiled twice"
  buffer = engine.runner.slots.cache.stack[0].k
  assert len(buffer.sharding.device_set) == 2 and buffer.addressable_shards[0].data.size == buffer.size // 2


@pytest.mark.slow
def test_four_devices_are_two_replicas_of_two_parts():
  model, requests = serving.model(**EVEN), serving.requests(30)
  engine = check(model, requests, devices=4, expected=serving.reference(model, requests))
  placed = [replica.runner.slots.cache.stack[0].k.sharding.device_set for replica in engine.replicas]
  assert placed == [set(jax.devices()[:2]), set(jax.devices()[2:4])]


@pytest.mark.slow
@pytest.mark.parametrize("fields, options", [
    pytest.param(tiny.VANILLA, {}, id="vanilla"),
    pytest.param(dict(num_kv_heads=4), dict(tensor=4), id="four_parts"),
    pytest.param(dict(qk_norm=True, tie_embeddings=False), {}, id="norms_of_heads"),
    pytest.param(dict(lora=dict(q=2, k=1, o=3, gate=4, down=2)), {}, id="lora"),
    pytest.param({}, dict(weight_format="int8"), id="int8"),
    pytest.param(dict(lora=dict(v=2, o=3)), dict(weight_format="int8", kv_format="bfloat16"), id="int8_lora"),
    pytest.param(dict(kv_plan="hybrid"), dict(storage="dense"), id="dense"),
    pytest.param({}, dict(batching="sequence", num_pages=24), id="small_pool"),
])
def test_other_parts(fields, options):
  vocab_size = 64 if "tensor" in options else 62
  requests = serving.requests(12, **(dict(logprobs=False) if "weight_format" in options else {}))
  check(serving.model(**{"vocab_size": vocab_size} | fields), requests, **options)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_parts_read_packed_pages_by_the_kernel_of_their_platform(platform):
  model, requests = serving.model(**EVEN), serving.requests(6)
  expected = serving.reference(model, requests)
  with platforms.pretend(platform):
    engine = check(model, requests, expected=expected)
  assert engine.runner.decoder.tables.storage == packed.PackedPages(4, 1, 6, "float32", platform)


@pytest.mark.slow
@pytest.mark.parametrize("kind, exits", [("plain", {}), ("plain", dict(first=9)), ("middle", dict(kv="copied")),
                                         ("expert_choice", dict(measure="saturation")), ("hybrid", dict(monitor=True))])
def test_exits_of_parts(kind, exits):
  model = exiting.model(kind, **EVEN)
  modes = ["trust"] if exits.get("kv") == "copied" else ["trust", "verify", "none"]
  requests = [(prompt, dict(options, exit=modes[i % len(modes)]) | (
      dict(threshold=0.1) if modes[i % len(modes)] != "none" else {}))
              for i, (prompt, options) in enumerate(serving.requests(15, temperature=0.0))]
  engines = [exiting.engine(model, kind, exits, **options) for options in ({}, dict(tensor=2))]
  for one, two in zip(*(exiting.answers(engine, requests) for engine in engines)):
    serving.assert_same(two, one)
    assert two.early == one.early


def test_parts_that_cannot_be_are_refused_by_name():
  with pytest.raises(ValueError, match="tensor=2 does not divide model.vocab_size=61; use 1$"):
    engine_lib.Engine(serving.model(), tensor=2)
  with pytest.raises(ValueError, match="tensor=0; use a count >= 1"):
    engine_lib.Engine(serving.model(), tensor=0)
  with pytest.raises(ValueError, match=r"tensor=9, and there are 8 devices \(cpu\)"):
    engine_lib.Engine(serving.model(), tensor=9)
  with pytest.raises(ValueError, match="3 devices are no whole replicas of tensor=2 devices each; use a multiple of 2"):
    engine_lib.Engine(serving.model(**EVEN), devices=3, tensor=2)
