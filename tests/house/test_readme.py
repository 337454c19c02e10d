"""The examples of README.md and docs/ work as printed, and what they name exists."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

from absl import flags
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mor
from mor import costs
from mor import experiments
from mor import main
from mor import sharding
from mor.conversion import hf_export
from mor.data import tokenizer as tokenizer_lib
from mor.model import transformer
from mor.model.routers import table
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from mor.train import step as step_lib
from tests.helpers import alternate
from tests.helpers import serving
from tests.helpers import tiny
from tests.helpers import weights as test_weights

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
each_page = pytest.mark.parametrize("page", sorted(TEXTS))


def block(page, text):
  """Returns the one Python example of a page with that text."""
  found, = [source for source in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL) if text in source]
  return found


def anchors(page):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
  assert len(README.splitlines()) <= 120


@each_page
def test_links_resolve(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
    if "://" in target:
      continue
    path, _, anchor = target.partition("#")
    file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    assert file.is_file(), f"{page} links to {target}"
    if anchor:
      assert anchor in anchors(str(file.relative_to(ROOT))), f"{page} links to {target}"


def test_every_page_is_linked_from_the_readme():
  assert {page for page in TEXTS if page != "README.md"} <= set(re.findall(r"\]\(([\w/.]+)\)", README))


def test_the_maps_have_every_room():
  floors = (ROOT / "mor/FLOORS").read_text(encoding="utf-8").splitlines()
  rooms = {line.split(".")[1] for line in floors if line.startswith("mor.")}
  section = TEXTS["docs/concepts.md"].partition("## Map of the rooms")[2]
  assert rooms == set(re.findall(r"`mor/(\w+)(?:/|\.py)`", section.partition("\ntorch is")[0]))
  folders = {room for room in rooms if (ROOT / "mor" / room).is_dir()}
  assert folders <= set(re.findall(r"`mor/(\w+)/`", README))


def test_headlines_are_the_results():
  load = lambda name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
  step, = [row for row in load("train_h200_1700m")["models"] if row["model"] == "mor-r3"]
  batch, = [batch for batch in load("decode_135m")["batches"] if batch["batch"] == 32]
  gain, = batch["gains"]
  exits, = [row for row in load("early_exit_smollm2")["batches"][0]["variants"] if row["variant"] == "verify-0.1"]
  quickstart = load("quickstart")["summary"]
  rows = re.findall(r"^\| [^|]* \| ([^|]*) \| [^|]* \| \[(\w+)\]\(.*\) \|$", README, re.MULTILINE)
  assert [name for _, name in rows] == ["train_h200_1700m", "decode_135m", "early_exit_smollm2", "quickstart"]
  assert [re.findall(r"\d+\.\d+", text) for text, _ in rows] == [
      [f"{step['wall_ratio']['median']:.3f}"], [f"{gain['gain']['median']:.3f}"],
      [f"{exits['to_full']['median']:.2f}"], [f"{quickstart['bpb_causal']:.3f}", f"{quickstart['bpb_xz']:.3f}"]]


@pytest.mark.parametrize("page", ["README.md", "docs/decoding.md"])
def test_generation(page, monkeypatch, capsys):
  config = tiny.config(tiny.BYTES).model
  params = jax.tree.map(jnp.asarray, test_weights.draw(config))
  model = model_lib.Model(config, {"params": params}, tokenizer_lib.ByteTokenizer(), 24)
  monkeypatch.setattr(mor, "load", lambda workdir: model, raising=False)
  namespace = {}
  exec(block(page, "mor.load"), namespace)
  first, second = namespace["answers"]
  wanted, = model.generate(["My fellow citizens"], temperature=0.8, top_p=0.95, seed=1)
  assert capsys.readouterr().out == f"{first.text} {first.depths} length\n{wanted.text}"
  assert len(first.tokens) == 6 and len(second.tokens) == 11  # up to the context


def test_serving_of_the_docs(monkeypatch, capsys):
  config = tiny.config(tiny.BYTES).model
  params = jax.tree.map(jnp.asarray, test_weights.draw(config))
  model = model_lib.Model(config, {"params": params}, tokenizer_lib.ByteTokenizer(), 24)
  namespace = dict(engine=mor.Engine(model, num_slots=2))
  exec(block("docs/decoding.md", "engine.step"), namespace)
  wanted = model.generate(["My fellow citizens", "The people of"], max_tokens=20, temperature=0.0)
  assert [answer.tokens for answer in namespace["answers"]] == [answer.tokens for answer in wanted]
  assert {line.split(" ")[0] for line in capsys.readouterr().out.splitlines()} >= set(map(str, namespace["numbers"]))


def test_exits_of_the_docs():
  config = tiny.config(tiny.BYTES, model=dict(router=tiny.FIXED, sharing="vanilla", num_recursions=1, num_layers=6)).model
  params = jax.tree.map(jnp.asarray, test_weights.draw(config))
  namespace = dict(model=model_lib.Model(config, {"params": params}, tokenizer_lib.ByteTokenizer(), 24))
  exec(block("docs/early_exit.md", "engine.submit").replace("16", "2"), namespace)
  requests = [job.payload.request for job in namespace["engine"].scheduler.queue]
  assert [(request.exit, request.threshold) for request in requests] == [("trust", 0.9), ("verify", 0.5), ("none", None)]


def test_options_of_a_request_are_listed():
  with pytest.raises(ValueError, match="the options are (.*)") as error:
    request_lib.make([1], dance=1)
  listed = TEXTS["docs/decoding.md"].partition("**Options** of a request:")[2].partition(". ")[0]
  assert sorted(re.findall(r"`(\w+)`", listed)) == str(error.value).partition("are ")[2].split(", ")


def test_flags_and_modes_exist():
  text = re.sub(r"<!-- table:.*?<!-- end -->", "", "".join(TEXTS.values()), flags=re.DOTALL)  # those of benchmarks
  names = set(re.findall(r"(?<![\w-])--(\w+)=", text))
  programs = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
  assert len(names) >= 10 and not {name for name in names if name not in flags.FLAGS and f'"--{name}"' not in programs}
  names = set(re.findall(r"--config=([a-z][\w:.-]*\w)", text))
  assert len(names) >= 5 and all(experiments.read(name) for name in names)
  modes = set(re.findall(r"--mode=(\w+)", text))
  assert len(modes) >= 5 and modes <= set(main.MODES)


@pytest.fixture
def docs_router(monkeypatch):
  """The fields of the router of docs/extending.md, which is in the table under its own name."""
  monkeypatch.setitem(table.ROUTERS, alternate.NAME, alternate.load())
  return tiny.router(alternate.NAME)


def wanted_depth(position):
  return 1 if position % 2 else 2 if position % 4 else 3


def test_router_of_the_docs_routes(docs_router):
  config = tiny.config(model=dict(router=docs_router))
  batch = jax.tree.map(jnp.asarray, tiny.batch(config))
  variables = jax.jit(transformer.Transformer(config.model).init)(jax.random.key(0), batch["tokens_BT"])
  hidden = {}
  for execution in ("gathered", "masked"):
    model = transformer.Transformer(dataclasses.replace(config.model, execution=execution))
    out = jax.jit(model.apply)(variables, batch["tokens_BT"], batch["segment_BT"])
    hidden[execution] = out.hidden_BTD
    for r, keep_BT in enumerate(np.asarray(out.keep_RBT)):
      wanted_BT = np.array(batch["segment_BT"] > 0)
      wanted_BT[:, np.arange(config.data.seq_len) % 2**r != 0] = False
      np.testing.assert_array_equal(keep_BT, wanted_BT)
  chex.assert_trees_all_close(hidden["gathered"], hidden["masked"], atol=1e-5)


def test_router_of_the_docs_trains_in_micro_batches(docs_router):
  def losses(accumulation):
    config = tiny.config(model=dict(router=docs_router, num_layers=5), optim=dict(eps=1e-3),
                         train=dict(accumulation=accumulation))
    mesh = sharding.make_mesh(config.mesh)
    state, train_step = step_lib.init_state(config, mesh), step_lib.make_train_step(config, mesh)
    found = []
    for i in range(3):
      state, metrics = train_step(state, sharding.put_batch(mesh, tiny.batch(config, i)), i)
      found.append([float(metrics[name]) for name in ("loss", "grad_norm", "load_2", "load_3")])
    return found
  np.testing.assert_allclose(losses(2), losses(1), rtol=1e-5)


def test_router_of_the_docs_serves(docs_router):
  model, requests = serving.model(router=docs_router), serving.requests(6)
  answers = serving.reference(model, requests)
  done, _ = serving.serve(serving.engine(model), requests)
  assert len(done) == len(requests)
  for place, answer in done.items():
    serving.assert_same(answer, answers[place], requests[place])
    first = len(requests[place][0]) - 1  # the position that draws the first new token
    assert answer.depths == [wanted_depth(first + i) for i in range(len(answer.depths))]


def test_router_of_the_docs_has_costs_and_no_export(docs_router, tmp_path):
  config = tiny.config(model=dict(router=docs_router))
  assert costs.step_fractions(config.model, 12) == (1.0, 0.5, 0.25)
  figures, plain = costs.report(config), costs.report(tiny.config(model=dict(router=tiny.FIXED)))
  assert figures["params_non_embedding"] == plain["params_non_embedding"]
  assert figures["kv_bytes_per_token"] == plain["kv_bytes_per_token"] * (2 + 2 * 1.75) / (2 + 2 * 3)
  variables = {"params": test_weights.draw(config.model)}
  with pytest.raises(ValueError, match="router.name='alternate': modeling_mor.py has no such router .* write it there"):
    hf_export.write(tmp_path / "out", config.model, variables, tokenizer=None, chat_template=None, context=12,
                    dtype="float32", special_ids={})


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["model/test_transformer.py", "decode/test_decode.py", "serve/test_engine.py",
                                   "model/test_prescribed.py model/test_routers.py"])
def test_every_suite_runs_the_router_of_the_docs(suite):
  """The suites are parametrised over the table, so that none knows the router."""
  command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.helpers.alternate", "-p", "no:cacheprovider", "-k", "alternate",
             "-m", "slow or not slow", *(f"tests/{path}" for path in suite.split())]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-2000:]


@each_page
def test_names_exist(page):
  paths = re.findall(r"(?<![\w/.])(?:mor|configs|launch|notebooks|tests|docs|benchmarks)/[\w./]*\w", TEXTS[page])
  missing = sorted({path for path in paths if not (ROOT / path).exists()})
  assert not missing, f"{page} names {missing}"


@each_page
def test_options_exist(page):
  fields = dataclasses.asdict(tiny.config())
  named = re.findall(r"--config\.([a-z]\w*)\.(\w+)=", TEXTS[page])
  named += re.findall(rf"`({'|'.join(fields)})\.(\w+)`", TEXTS[page])
  missing = [f"{group}.{field}" for group, field in named
             if field not in fields[group] and not (group == "model" and hasattr(model_lib.Model, field))]
  assert not missing, f"{page} names {missing}"
