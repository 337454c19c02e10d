"""The programs that an accelerator runs, on the CPU: every request gets the tokens of `generate` from each of them."""

import pytest

from mor.decode import packed
from mor.decode import variant
from mor.model.kv import plans as kv_plans
from mor.model.routers import table as router_table
from tests.helpers import exiting
from tests.helpers import platforms
from tests.helpers import serving
from tests.helpers import tiny

GREEDY = dict(temperature=0.0, repetition_penalty=1.0, logprobs=False)
# Platforms, and the storages of keys and values that they serve with; kernels are interpreted.
STORAGES = [("gpu", "dense"), ("gpu", "paged"), ("gpu", "gather"), ("gpu", "packed"), ("tpu", "packed")]
KERNELS = [("gpu", "packed"), ("tpu", "packed")]
FILTERED = dict(temperature=0.8, top_k=5, repetition_penalty=1.0, logprobs=True)


def record(monkeypatch):
  """Returns the set of the variants that runners pick from now on."""
  seen = set()

  def pick(*needs, real=variant.pick):
    seen.add(real(*needs))
    return real(*needs)

  monkeypatch.setattr(variant, "pick", pick)
  return seen


def check_engine(model, *groups, platform="gpu", **options):
  """Serves groups of requests one after the other, as an accelerator does; returns the engine."""
  expected = serving.reference(model, sum(groups, []))
  with platforms.pretend(platform):
    engine = serving.engine(model, **options)
    for requests in groups:
      done, _ = serving.serve(engine, requests, order=0)
      for place, completion in done.items():
        serving.assert_same(completion, expected[place], requests[place])
      expected = expected[len(requests):]
    serving.assert_all_free(engine)
  return engine


def test_a_dispatch_runs_the_program_of_its_requests(monkeypatch):
  picked = record(monkeypatch)
  check_engine(serving.model(), serving.requests(5, **GREEDY), serving.requests(5, **FILTERED), storage="dense")
  assert picked == {variant.Variant("greedy", False, False), variant.Variant("filtered", True, False)}


@pytest.mark.parametrize("platform", [pytest.param("gpu", marks=pytest.mark.slow), "tpu"])
def test_an_engine_reads_packed_pages_by_the_kernel_of_its_platform(platform):
  """A short one: the kernel compiles for long, and `slow` tests serve from all storages."""
  model, requests = serving.model(kv_plan="hybrid"), serving.requests(6, **GREEDY)
  engine = check_engine(model, requests, platform=platform, ticks=1)
  assert engine.replicas[0].runner.decoder.tables.storage == packed.PackedPages(4, 2, 6, "float32", platform)


@pytest.mark.slow
@pytest.mark.parametrize("platform, storage", STORAGES)
@pytest.mark.parametrize("plan", kv_plans.PLANS)
@pytest.mark.parametrize("router", router_table.ROUTERS)
def test_every_router_and_plan(monkeypatch, router, plan, platform, storage):
  picked = record(monkeypatch)
  check_engine(serving.model(kv_plan=plan, router=tiny.router(router)), serving.requests(20), serving.requests(20, **GREEDY),
               platform=platform, storage=storage)
  assert {v.sampling for v in picked} >= {"greedy", "filtered"} and {v.logprobs for v in picked} == {False, True}


@pytest.mark.slow
@pytest.mark.parametrize("platform, storage", KERNELS)
def test_a_small_pool_preempts_and_changes_no_token(platform, storage):
  options = dict(max_tokens=31, stop_tokens=[], temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
  requests = [(prompt[:1], options) for prompt, options in serving.requests(10, **options)]
  # With more ticks a dispatch, requests wait in the queue until none would be preempted.
  engine = check_engine(serving.model(), requests, platform=platform, storage=storage, num_pages=24, ticks=6)
  assert engine.metrics()["preemptions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["verify", "trust"])
@pytest.mark.parametrize("kind", exiting.KINDS)
@pytest.mark.parametrize("platform, storage", [("gpu", "dense"), *KERNELS])
def test_exits_give_the_tokens_that_a_cpu_gives(monkeypatch, kind, mode, platform, storage):
  """Some requests may leave early, some may not; both programs run."""
  model, picked = exiting.model(kind), record(monkeypatch)
  leaves = dict(exit=mode, threshold=0.2)
  requests = [(p, o | (leaves if i < 6 else {})) for i, (p, o) in enumerate(serving.requests(12, **exiting.GREEDY, logprobs=False))]
  expected = exiting.answers(exiting.engine(model, kind), requests)
  with platforms.pretend(platform):
    engine = exiting.engine(model, kind, storage=storage)
    got = exiting.answers(engine, requests[:6]) + exiting.answers(engine, requests[6:])
  for place, completion in enumerate(got):
    assert exiting.told(completion) == exiting.told(expected[place]), requests[place]
    assert completion.early == expected[place].early
  assert {v.exits for v in picked} >= {False, True}
