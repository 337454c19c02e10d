"""The launch scripts, with nothing but fakes of the programs that they start."""

import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from benchmarks import launch_costs
from mor import main

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TOOLS = "bash cat dirname env mktemp realpath rm sed sleep tee".split()
ARGS = ["--config=configs/paper.py:mor-360m-r3", "--config.data.source=texts of 'mine'/*.gz"]
QUOTED = "--config=configs/paper.py:mor-360m-r3 '--config.data.source=texts of '\\''mine'\\''/*.gz'"
TPU = ["tpu_vm", "--name=a", "--zone=z", "--type=v5litepod-256", "--workdir=gs://b/r"]
GPU = ["gpu", "--workdir=/runs/a"]
SLURM = ["slurm", "--name=a", "--time=1:00:00", "--workdir=/runs/a"]
XPK = ["gke_xpk", "--name=a", "--cluster=c", "--zone=z", "--type=v6e-64", "--image=r/m:1", "--workdir=gs://b/r"]

# Says what it was called with and takes the next of `statuses`, a line a call: a number
# is its status, `lost` takes the slice away and ends as gcloud does.
WORKER = '''echo "worker $*" >>"$STATE/calls"
read -r status <"$STATE/statuses"; sed -i 1d "$STATE/statuses"; exit "${status:-0}"'''
GCLOUD = '''echo "$3 $4" >>"$STATE/calls"
case "$3 $4" in
  "queued-resources create") echo ACTIVE >"$STATE/queue"; echo READY >"$STATE/vm" ;;
  "queued-resources delete") rm -f "$STATE/queue" ;;
  "queued-resources describe") cat "$STATE/queue" ;;
  "tpu-vm describe") cat "$STATE/vm" ;;
  "tpu-vm ssh")
    read -r status <"$STATE/statuses"; sed -i 1d "$STATE/statuses"
    if [[ $status == lost ]]; then echo PREEMPTED >"$STATE/vm"; echo "mor: exit status 1"; exit 1; fi
    for one in ${status//,/ }; do echo "host: mor: exit status $one"; done
    exit $((status != 0)) ;;
esac'''


@pytest.fixture
def launch(tmp_path):
  """`launch(arguments, fakes, statuses)` runs a script where only TOOLS and the fakes are programs."""
  shutil.copytree(ROOT / "launch", tmp_path / "tree/launch")
  (tmp_path / "bin").mkdir()
  for tool in TOOLS:
    (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

  def fake(path, text):
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)

  def start(arguments, fakes=(), statuses=(), args=ARGS, **environment):
    fake(tmp_path / "tree/launch/worker.sh", WORKER)
    for name, text in dict(fakes).items():
      fake(tmp_path / "bin" / name, text)
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    script, *options = arguments
    return subprocess.Popen(
        [tmp_path / f"tree/launch/{script}.sh", *options, "--", *args], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=dict(PATH=str(tmp_path / "bin"), STATE=str(tmp_path), PAUSE="0", **environment))

  def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=60)
    calls = tmp_path / "calls"
    return process.returncode, out.splitlines(), err, calls.read_text().splitlines() if calls.exists() else []

  run.start, run.state = start, tmp_path
  return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
  subprocess.run(["bash", "-n", path], check=True)


def test_statuses_are_those_of_the_program():
  common = (ROOT / "launch/common.sh").read_text()
  assert f"STOPPED={main.STOPPED} " in common
  fatal, = re.findall(r"case \$1 in ([\d |]+)\) return 1", common)
  assert {main.WRONG, main.DIVERGED, 0} <= set(map(int, fatal.split("|"))) and str(main.STOPPED) not in fatal


def starts(lines, beginnings):
  assert len(lines) == len(beginnings), "\n".join(lines)
  for line, beginning in zip(lines, beginnings):
    assert line.startswith(beginning), line


def test_dry_run_on_a_tpu(launch):
  status, lines, err, calls = launch([*TPU, "--spot", "--delete", "--project=p", "--dry_run"])
  assert (status, err, calls) == (0, "", [])
  starts(lines, [
      "gcloud compute tpus queued-resources create a --zone=z --project=p --node-id=a "
      "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --spot",
      "git archive --format=tar.gz --prefix=mor/ -o ",
      "gcloud compute tpus tpu-vm scp ", "gcloud compute tpus tpu-vm ssh a --worker=all ",
      "gcloud compute tpus queued-resources delete a --zone=z --project=p --force --quiet"])
  remote = shlex.split(lines[3])[7].removeprefix("--command=")
  assert f"mor/launch/worker.sh tpu,gcs --distributed=auto --workdir=gs://b/r {QUOTED}; echo" in remote
  assert shlex.split(remote.partition("--workdir=gs://b/r ")[2].partition("; echo")[0]) == ARGS


def test_dry_run_on_gpus(launch):
  status, lines, err, calls = launch([*GPU, "--gpus=0,1", "--extra=cuda12", "--dry_run"])
  assert (status, err, calls) == (0, "", [])
  assert lines == ["launch/worker.sh cuda12",
                   f"env CUDA_VISIBLE_DEVICES=0,1 launch/worker.sh cuda12 --workdir=/runs/a {QUOTED}"]


def test_dry_run_on_slurm(launch):
  status, lines, err, calls = launch([*SLURM, "--nodes=2", "--gpus=4", "--partition=q", "--dry_run"])
  assert (status, err, calls) == (0, "", [])
  assert lines[0] == "launch/worker.sh cuda" and lines[-1] == "sbatch --parsable"
  assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --requeue", "#SBATCH --signal=TERM@120",
          "#SBATCH --partition=q"} <= set(lines)
  assert (f"srun --kill-on-bad-exit=1 .venv/bin/python -m mor.main --distributed=auto --workdir=/runs/a {QUOTED} "
          "|| status=$?") in lines


def test_dry_run_on_gke(launch):
  status, lines, err, calls = launch([*XPK, "--retries=7", "--dry_run"])
  assert (status, err, calls) == (0, "", [])
  starts(lines, [
      "git archive HEAD | docker build --file=launch/Dockerfile --build-arg=EXTRAS=tpu,gcs --tag=r/m:1 -",
      "docker push r/m:1", "xpk workload create --workload=a --cluster=c --zone=z --tpu-type=v6e-64 --num-slices=1 "
      f"--docker-image=r/m:1 --max-restarts=7 --restart-on-exit-codes={main.STOPPED},"])
  command = shlex.split(lines[2])[-1].removeprefix("--command=")
  assert shlex.split(command) == ["python", "-m", "mor.main", "--distributed=auto", "--workdir=gs://b/r", *ARGS]
  assert launch([*XPK, "--built", "--dry_run"])[1][0].startswith("xpk workload create")


@pytest.mark.parametrize("command", [TPU, GPU, SLURM, XPK], ids=lambda command: command[0])
def test_what_is_missing_is_one_line(launch, command):
  for missing in command[1:]:
    name = missing.partition("=")[0]
    status, out, err, calls = launch([part for part in command if part != missing])
    assert (status, out, calls) == (2, [], []) and err.startswith(f"error: {name} is not given; add {name}=")
    assert len(err.splitlines()) == 1
  status, out, err, calls = launch(command, args=[])
  assert (status, out, calls) == (2, [], []) and err.startswith("error: there is nothing to train; add -- --config=")


@pytest.mark.parametrize("arguments, message", [
    ([*GPU, "--dance=1"], "--dance is no option with a value"), ([*GPU, "--spot"], "--spot is no switch"),
    ([*GPU, "train"], "'train' is no option"), ([*GPU, "--retries=many"], "--retries=many is no number"),
    ([*TPU, "--workdir=/runs/a"], "--workdir=/runs/a is not seen by all hosts; use gs://"),
    ([*TPU, "--type=v9-8"], "--type=v9-8 has no image"), ([*XPK, "--workdir=runs"], "--workdir=runs is not seen"),
])
def test_what_is_wrong_is_one_line(launch, arguments, message):
  status, out, err, calls = launch(arguments)
  assert (status, out, calls) == (2, [], []) and err.startswith(f"error: {message}") and len(err.splitlines()) == 1


@pytest.mark.parametrize("script", ["tpu_vm", "gpu", "slurm", "gke_xpk"])
def test_help_is_the_comment_at_the_top(launch, script):
  status, out, err, _ = launch([script, "--help"])
  assert (status, err) == (0, "") and f"./launch/{script}.sh" in out[1] and "set -euo pipefail" not in out
  assert any("--dry_run" in line for line in out)


@pytest.mark.parametrize("statuses, status, runs", [
    ([0], 0, 1), ([75, 76, 137, 0], 0, 4), ([75, 1, 0], 1, 2), ([2, 0], 2, 1), ([127, 0], 127, 1),
    ([75, 75, 75, 75, 0], 75, 4),
])
def test_gpu_runs_go_on(launch, statuses, status, runs):
  got, _, err, calls = launch([*GPU, "--retries=3"], statuses=[0, *statuses])  # the first installs
  assert (got, len(calls) - 1) == (status, runs)
  assert calls[0] == "worker cuda" and calls[1] == " ".join(["worker cuda --workdir=/runs/a", *ARGS])
  assert err.count("going on") == runs - 1 and ("after 3 retries" in err) == (runs == 4 and status == 75)


def test_an_interrupt_saves_and_ends(launch):
  waits = "if (($# == 1)); then exit; fi\ntrap 'echo saved >>\"$STATE/calls\"; exit 75' TERM\n" \
          "echo up >>\"$STATE/calls\"; while true; do sleep 0.05; done"
  script = (ROOT / "launch/gpu.sh").read_text()
  (launch.state / "tree/launch/gpu.sh").write_text(script.replace("worker.sh", "waits.sh"))
  path = launch.state / "tree/launch/waits.sh"
  path.write_text(f"#!{shutil.which('bash')}\n{waits}\n")
  path.chmod(0o755)
  process = launch.start([*GPU])
  while not (launch.state / "calls").exists():
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 75
  assert (launch.state / "calls").read_text() == "up\nsaved\n"


MADE, SENT, SEEN = ["queued-resources create"], ["tpu-vm scp", "tpu-vm ssh"], ["queued-resources describe"]


@pytest.mark.parametrize("statuses, status, made, sent", [
    (["0,0"], 0, 1, 1), (["75,75", "0,0"], 0, 1, 2), (["lost", "lost", "0,0"], 0, 3, 3), (["1,134", "0,0"], 1, 1, 1),
    (["lost", "1,1", "0,0"], 1, 2, 2), (["0,76", "0,0"], 0, 1, 2), (["", "0,0"], 0, 1, 2), (["2,2"], 2, 1, 1),
])
def test_tpu_slices_are_made_anew(launch, statuses, status, made, sent):
  git = 'echo "git $1" >>"$STATE/calls"'
  got, _, _, calls = launch([*TPU, "--delete"], dict(gcloud=GCLOUD, git=git), statuses)
  assert (got, calls.count("queued-resources create"), calls.count("tpu-vm ssh")) == (status, made, sent)
  assert calls.count("git archive") == calls.count("tpu-vm scp") == sent
  assert calls.count("queued-resources delete") == made and calls[-1] == "queued-resources delete"


def test_a_slice_that_cannot_be_made_ends_the_run(launch):
  gcloud = GCLOUD.replace("echo ACTIVE", "exit 1; echo ACTIVE")
  got, _, _, calls = launch(TPU, dict(gcloud=gcloud, git=":"))
  assert (got, calls) == (1, ["queued-resources describe", "queued-resources create"])


@pytest.mark.parametrize("status, count, queued", [(75, 0, True), (76, 2, True), (143, 0, True), (0, 0, False),
                                                   (1, 0, False), (2, 0, False), (75, 3, False)])
def test_slurm_jobs_are_queued_again(launch, status, count, queued):
  fakes = dict(sbatch='cat >"$STATE/job"; bash "$STATE/job"', srun=f"exit {status}",
               scontrol='echo "scontrol $*" >>"$STATE/calls"')
  environment = dict(SLURM_JOB_ID="9") | (dict(SLURM_RESTART_COUNT=str(count)) if count else {})
  got, _, _, calls = launch([*SLURM, "--retries=3"], fakes, **environment)
  assert got == status and calls == ["worker cuda"] + ["scontrol requeue 9"] * queued


def test_commands_of_the_page_are_right(launch):
  page = launch_costs.README.read_text(encoding="utf-8")
  commands = re.findall(r"`\./launch/(\w+\.sh) ([^`]*)`", page)
  assert [name for name, _ in commands] == ["tpu_vm.sh", "gke_xpk.sh", "slurm.sh", "gpu.sh"]
  for name, options in commands:
    options, _, args = options.partition(" -- ")
    command = [name.removesuffix(".sh"), *shlex.split(options), "--dry_run"]
    status, lines, err, _ = launch(command, args=shlex.split(args))
    assert (status, err) == (0, "") and lines


def test_costs_of_the_page_are_current():
  page = launch_costs.README.read_text(encoding="utf-8")
  assert launch_costs.rewrite(page) == page, "run python -m benchmarks.launch_costs"


def test_costs_by_hand():
  """9438 steps of 1024 x 2048 tokens, three forward passes of 849 MFLOP each, on 8 x 989 TFLOP/s at 40 %."""
  one = launch_costs.cost("vanilla-360m")
  assert one["tokens"] == 9438 * 1024 * 2048 and one["flops"] == pytest.approx(one["tokens"] * 3 * 849e6, rel=0.01)
  assert launch_costs.hours(one["flops"], 8, "H100") == pytest.approx(5.04e19 / (8 * 989e12 * 0.4) / 3600, rel=0.01)
  with pytest.raises(ValueError, match="no <!-- costs --> with <!-- end -->"):
    launch_costs.rewrite("nothing")


def test_a_wrong_option_rewrites_nothing(monkeypatch):
  monkeypatch.setattr(launch_costs, "README", None)  # would fail if it were read
  with pytest.raises(ValueError, match="unrecognized arguments: --nope; --help"):
    launch_costs.main(["--nope"])
