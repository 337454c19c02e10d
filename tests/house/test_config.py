"""Bad configurations: one line with what, the value and the remedy."""

import dataclasses
import functools
import json

import pytest

from mor import config
from mor import fields as fields_lib
from tests.helpers import tiny


def _router(**fields):
  return dict(model=dict(router=fields))


def _token(**fields):
  return _router(**tiny.TOKEN_CHOICE | fields)


def _drawn(**fields):
  return dict(model=dict(router=tiny.FIXED, recursions_train=fields))


def _halting(**fields):
  return _router(**tiny.router("halting", **fields))


BAD = [  # overrides, words of the message: what, value, remedy
    (dict(model=dict(d_modle=3)), ["config.model.d_modle", "unknown", "d_model"]),
    (dict(depth=3), ["config.depth", "unknown", "model"]),
    (dict(model=dict(d_model="3")), ["config.model.d_model", "'3'", "str", "int"]),
    (dict(model=dict(d_model=3.5)), ["config.model.d_model", "3.5", "float", "int"]),
    (dict(model=dict(scan_layers=1)), ["config.model.scan_layers", "1", "bool"]),
    (dict(train=dict(steps=True)), ["config.train.steps", "True", "bool", "int"]),
    (dict(optim=dict(learning_rate="fast")), ["config.optim.learning_rate", "'fast'", "float"]),
    (dict(model=dict(router=_router)), ["config.model.router", "RouterConfig"]),
    (_router(capacity=0.5), ["config.model.router.capacity", "0.5", "list"]),
    (_router(capacity=(1.0, "a", 0.5)), ["config.model.router.capacity[1]", "'a'", "float"]),
    (dict(model=dict(sharing="middle")), ["config.model.sharing", "'middle'", "middle_cycle"]),
    (dict(model=dict(kv_plan="none")), ["config.model.kv_plan", "'none'", "recursion_wise"]),
    (_router(name="random"), ["config.model.router.name", "'random'", "expert_choice"]),
    (dict(optim=dict(schedule="step")), ["config.optim.schedule", "'step'", "cosine"]),
    (dict(model=dict(num_heads=5)), ["num_heads=5", "num_kv_heads=2", "[1, 5]"]),
    (dict(model=dict(head_dim=7)), ["head_dim=7", "even"]),
    (dict(model=dict(vocab_size=0)), ["vocab_size=0", ">= 1"]),
    (dict(model=dict(num_layers=9)), ["num_layers=9", "middle_cycle", "3", "8 or 11"]),
    (dict(model=dict(num_layers=3)), ["num_layers=3", "middle_cycle", "5 or 8"]),
    (dict(model=dict(sharing="cycle")), ["num_layers=8", "cycle", "6 or 9"]),
    (dict(model=dict(sharing="vanilla")), ["num_recursions=3", "vanilla", "use 1"]),
    (dict(model=dict(sharing="sequence", num_layers=6, kv_plan="shared")),
     ["kv_plan='shared'", "'sequence'", "middle_cycle"]),
    (_router(capacity=(1.0, 0.5)), ["router.capacity=(1.0, 0.5)", "2 entries", "3 fractions"]),
    (_router(capacity=(1.0, 1.5, 0.5)), ["router.capacity=(1.0, 1.5, 0.5)", "(0, 1]"]),
    (_router(capacity=(1.0, 0.5, 0.0)), ["router.capacity=(1.0, 0.5, 0.0)", "(0, 1]"]),
    (_router(capacity=(1.0, 0.4, 0.5)), ["router.capacity=(1.0, 0.4, 0.5)", "non-increasing"]),
    (_router(activation="softmax"), ["router.activation='softmax'", "expert_choice", "'sigmoid'"]),
    (_router(gating="every_step"), ["router.gating='every_step'", "'weighted'"]),
    (_router(balancing="loss"), ["router.balancing='loss'", "expert_choice", "'none'"]),
    (_token(activation="tanh"), ["router.activation='tanh'", "'softmax'"]),
    (_token(sampling="aux_loss"), ["router.sampling='aux_loss'", "'none'"]),
    (_token(capacity_warmup_steps=3), ["capacity_warmup_steps=3", "use 0"]),
    (_token(arch="random"), ["router.balancing='loss'", "'random'", "'none'"]),
    (_router(arch="random"), ["router.sampling='aux_loss'", "'random'", "'none'"]),
    (_halting(halting_threshold=0.0), ["router.halting_threshold=0.0", "(0, 1]"]),
    (_halting(halting_coef=-1.0), ["router.halting_coef=-1.0", ">= 0"]),
    (_halting(sampling="aux_loss"), ["router.sampling='aux_loss'", "halting", "'none'"]),
    (_halting(balancing="loss"), ["router.balancing='loss'", "halting_coef", "'none'"]),
    (_halting(arch="random"), ["router.arch='random'", "learns nothing", "'linear'"]),
    (_halting(capacity_warmup_steps=3), ["capacity_warmup_steps=3", "no warm-up", "use 0"]),
    (_halting(z_loss_coef=0.1), ["router.z_loss_coef=0.1", "no z-loss", "use 0"]),
    (dict(model=dict(attention="splash", router=tiny.router("halting"))), ["model.attention='splash'", "'auto' or 'xla'"]),
    (dict(model=dict(router=tiny.router("halting"), recursions_train=dict(backprop=1))), ["backprop=1", "use 0"]),
    (_router(temperature=0.0), ["router.temperature=0.0", "> 0"]),
    (_router(z_loss_coef=-1.0), ["router.z_loss_coef=-1.0", ">= 0"]),
    (_drawn(values=(2, 3)), ["recursions_train.values=(2, 3)", "'fixed'", "use () or"]),
    (_drawn(distribution="uniform"), ["recursions_train.values=()", "'uniform'", "one or more"]),
    (_drawn(distribution="uniform", values=(3, 2)), ["recursions_train.values=(3, 2)", "ascending"]),
    (_drawn(distribution="uniform", values=(0, 2)), ["recursions_train.values=(0, 2)", "from 1"]),
    (_drawn(distribution="poisson"), ["recursions_train.most=0", "'poisson'", "a number of steps"]),
    (_drawn(most=3), ["recursions_train.most=3", "'fixed'", "use 0 or"]),
    (_drawn(mean=2.0), ["recursions_train.mean=2.0", "'fixed'", "use 0 or"]),
    (_drawn(distribution="poisson", most=3, mean=4.0), ["recursions_train.mean=4.0", "most=3", "up to most"]),
    (_drawn(distribution="poisson", most=2), ["recursions_train.mean=0.0", "num_recursions=3", "most=2"]),
    (_drawn(distribution="poisson", most=3, sigma=0.0), ["recursions_train.sigma=0.0", "> 0"]),
    (_drawn(backprop=-1), ["recursions_train.backprop=-1", "use 0 for all"]),
    (dict(model=dict(recursions_train=dict(distribution="uniform", values=(2, 3)))),
     ["recursions_train.distribution='uniform'", "'expert_choice'", "router 'fixed'"]),
    (dict(model=dict(recursions_train=dict(backprop=1))), ["backprop=1", "'expert_choice'", "router 'fixed'"]),
    (dict(model=_drawn(distribution="uniform", values=(2, 3))["model"] | dict(lora=dict(q=2))),
     ["2 recursion steps", "model.lora={'q': 2}", "use ranks of 0"]),
    (dict(model=tiny.VANILLA | dict(recursions_train=dict(distribution="uniform", values=(1, 2)))),
     ["2 recursion steps", "'vanilla'", "repeats layers"]),
    (_drawn(distribution="uniform", values=(2, 3)) | dict(exit=dict(layers=(5,))), ["exit.layers=(5,)", "layers 3"]),
    (_drawn(backprop=1) | dict(exit=dict(layers=(3,))), ["backprop=1", "exit.layers=(3,)", "use 0"]),
    (dict(data=dict(seq_len=1)), ["data.seq_len=1", "at least 2"]),
    (dict(data=dict(batch_size=0)), ["data.batch_size=0", "at least 1"]),
    (dict(data=dict(validation_fraction=1.0)), ["data.validation_fraction=1.0", "(0, 1)"]),
    (dict(data=dict(max_bytes=-1)), ["data.max_bytes=-1", "0 for all"]),
    (dict(optim=dict(learning_rate=0.0)), ["optim.learning_rate=0.0", "> 0"]),
    (dict(optim=dict(learning_rate=float("nan"))), ["optim.learning_rate=nan", "finite"]),
    (dict(optim=dict(cooldown_fraction=1.2)), ["optim.cooldown_fraction=1.2", "[0, 1]"]),
    (dict(optim=dict(warmup_steps=6)), ["optim.warmup_steps=6", "train.steps=5", "longer"]),
    (dict(optim=dict(clip_norm=-1.0)), ["optim.clip_norm=-1.0", "0 for off"]),
    (dict(train=dict(steps=0)), ["train.steps=0", ">= 1"]),
    (dict(train=dict(eval_rows=-1)), ["train.eval_rows=-1", ">= 0"]),
    (dict(train=dict(keep_every=-1)), ["train.keep_every=-1", ">= 0"]),
    (dict(train=dict(step_timeout=-0.5)), ["train.step_timeout=-0.5", ">= 0"]),
    (dict(train=dict(accumulation=3)), ["data.batch_size=4", "train.accumulation=3", "3 or 6"]),
    (dict(mesh=dict(data=-1, tensor=-1)), ["mesh", "data=-1, fsdp=1, tensor=-1", "one axis"]),
    (dict(mesh=dict(data=0)), ["mesh", "data=0", ">= 1"]),
]


@pytest.mark.parametrize("overrides, words", BAD, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_bad_fields_are_named(overrides, words):
  with pytest.raises(ValueError) as caught:
    tiny.config(overrides)
  message = str(caught.value)
  assert "\n" not in message
  assert "; " in message, "what and the value, then the remedy"
  for word in words:
    assert word in message, message


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_field_takes_a_float_that_is_not_finite(value):
  floats = [row.path for row in fields_lib.rows(config.Config()) if isinstance(row.value, float)]
  assert len(floats) > 15
  for path in floats:
    values = config.to_dict(config.Config())
    *groups, name = path.split(".")
    functools.reduce(dict.__getitem__, groups, values)[name] = value
    with pytest.raises(ValueError, match=f"{path}={value}"):
      config.from_dict(values)
  with pytest.raises(ValueError, match="optim.learning_rate=inf; use a finite number"):
    config.Config(optim=config.OptimConfig(learning_rate=float("inf")))
  values = config.to_dict(config.Config())
  values["model"]["router"]["capacity"] = [1.0, value]
  with pytest.raises(ValueError, match=rf"model.router.capacity\[1\]={value}; use a finite number"):
    config.from_dict(values)


def test_missing_field_is_named():
  fields = config.default().to_dict()
  del fields["optim"]["b2"]
  with pytest.raises(ValueError, match=r"config\.optim\.b2; start from config\.default\(\)"):
    config.from_dict(fields)


def test_unknown_field_of_a_config_dict_is_named():
  fields = config.default()
  with fields.unlocked():
    fields.train.stepz = 3
  with pytest.raises(ValueError, match=r"unknown field.*config\.train\.stepz"):
    config.from_config_dict(fields)


# What runs did that were made before these fields were.
OLD = dict(
    init=dict(method="stepwise", lora="svd"),
    distill=dict(teacher="", weight=0.5, temperature=1.0),
    exit=dict(layers=(), weighting="constant", coef=0.1, kl=1.0, hidden="none", hidden_coef=0.5, layer_dropout=0.0,
              curriculum="none"),
    model=dict(tie_embeddings=True, attention="auto", lora=dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 0),
               rope_scaling=dict(factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)),
    train=dict(keep_every=0, step_timeout=0.0))


def _without(values, old):
  """A copy of `values` that lacks the fields of `old`."""
  return {name: _without(value, old[name]) if name in ("model", "train") and name in old else value
          for name, value in values.items() if name in ("model", "train") or name not in old}


def test_the_config_of_an_old_run_says_what_it_did():
  wanted = tiny.config(OLD, mesh=dict(tensor=1))
  old = _without(config.to_dict(wanted), OLD) | dict(mesh=dict(data=1, model=1))
  given = json.loads(json.dumps(old))
  assert "exit" not in old and "lora" not in old["model"] and "keep_every" not in old["train"]
  assert config.from_dict(config.upgrade(given)) == wanted
  assert given == json.loads(json.dumps(old)), "an argument is not changed"


def test_a_field_that_every_run_had_is_not_filled_in():
  fields = config.default().to_dict()
  del fields["optim"]["b2"]
  with pytest.raises(ValueError, match=r"config\.optim\.b2"):
    config.from_dict(config.upgrade(fields))


def _rows(cls, path=""):
  """Each field that is no group, with its path."""
  for row in dataclasses.fields(cls):
    if dataclasses.is_dataclass(row.type):
      yield from _rows(row.type, f"{path}{row.name}.")
    else:
      yield f"{path}{row.name}", row


def test_each_field_has_a_default_of_its_type_and_a_help_text():
  rows = dict(_rows(config.Config))
  assert len(rows) > 80
  for path, row in rows.items():
    assert row.default is not dataclasses.MISSING and row.metadata["help"], path
  config.from_config_dict(config.default())  # of the types that the fields state


def test_the_default_is_locked_and_the_callers_own():
  first = config.default()
  first.model.d_model = 7
  assert config.default().model.d_model == 192
  with pytest.raises(AttributeError):
    first.model.d_modle = 7


def test_json_round_trip_is_exact():
  made = tiny.config(_router(capacity=(1.0, 0.7, 0.1)), optim=dict(learning_rate=1))
  assert made.optim.learning_rate == 1.0
  assert config.from_dict(json.loads(json.dumps(config.to_dict(made)))) == made


@pytest.mark.parametrize("router, r, capacity", [
    (dict(), 3, (1.0, 2 / 3, 1 / 3)),
    (dict(), 2, (1.0, 0.5)),
    (dict(capacity=(0.9, 0.2)), 2, (0.9, 0.2)),
])
def test_capacity(router, r, capacity):
  made = tiny.config(model=dict(num_recursions=r, router=router))
  assert made.model.capacity == capacity
