"""The command line in processes of its own: errors, Ctrl-C, kill, resume."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fedjax_llm.cli import main as cli
from fedjax_llm.experiments import run_folder

TOY = pathlib.Path(__file__).parent.parent / "toy_config.py"
MODULE = [sys.executable, "-m", "fedjax_llm.cli.main"]
SCRIPT = [str(pathlib.Path(sys.executable).parent / "fedjax-llm")]
# Without a restart for huge pages, with compilations shared.
TUNABLES = "glibc.malloc.hugetlb=1"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  return os.environ | {
    "GLIBC_TUNABLES": TUNABLES,
    "JAX_NUM_CPU_DEVICES": "2",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compilations")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


@pytest.fixture(scope="module")
def start(environment):
  """Starts the program in the background; what is still alive dies at last."""
  processes = []

  def fn(*arguments, program=MODULE, env=environment):
    process = subprocess.Popen(
      [*program, *map(str, arguments)],
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    processes.append(process)
    return process

  yield fn
  for process in processes:
    process.kill()


@pytest.fixture(scope="module")
def call(start):
  """Runs the program to its end: its exit status, stdout and stderr."""

  def fn(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err

  return fn


@pytest.fixture(scope="module")
def run_toy(toy_model):
  """Arguments of a toy run in a folder."""
  return lambda folder, *knobs: (
    "run", TOY, "--model", toy_model, "--out", folder, *knobs
  )  # fmt: skip


@pytest.fixture(scope="module")
def whole(call, run_toy, tmp_path_factory):
  """A run that nothing interrupted: its folder, stdout and stderr."""
  folder = tmp_path_factory.mktemp("runs") / "whole"
  status, out, err = call(*run_toy(folder))
  assert status == 0, err
  return folder, out, err


def metrics(folder):
  lines = run_folder.read_metrics(folder / "metrics.jsonl")
  return [{k: x for k, x in line.items() if k != "seconds"} for line in lines]


def adapter(folder):
  return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_same_run(folder, other):
  assert metrics(folder) == metrics(other)
  assert adapter(folder) == adapter(other)


def wait(process, condition, seconds=200):
  """Polls until `condition()`; the process must live until then."""
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < end, "the process never came so far"
    time.sleep(0.002)


def test_a_run_shows_progress_a_table_and_a_plot(whole):
  folder, out, err = whole
  assert "| toy_config |" in out and "held-out loss" in out
  assert f"Plot: {folder / 'loss.png'}" in out
  assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
  shown = [x for x in err.replace("\r", "\n").splitlines() if x]
  assert "6/6" in shown[-1] and "held-out=" in shown[-1]
  # A newcomer sees the progress bar and no library talking to itself.
  assert [x for x in shown if not x.startswith("toy_config: ")] == []


def test_a_run_folder_holds_what_the_run_was(whole):
  folder, _, _ = whole
  record = json.loads((folder / "run.json").read_text())
  assert record["knobs"]["upload_density"] == 0.25  # A default, resolved.
  assert record["device"] == "2 x cpu"
  assert {"fingerprint", "base_model_fingerprint"} <= record["data"].keys()
  lines = run_folder.read_metrics(folder / "metrics.jsonl")
  assert [line["round"] for line in lines] == list(range(7))
  for line in lines[1:]:
    assert line["upload_bytes"] == 3 * line["upload_bytes_per_client"] > 0
    assert line["download_bytes"] == 3 * line["download_bytes_per_client"] > 0
    assert {"train_loss", "tokens", "seconds"} <= line.keys()
  assert sorted(x.name for x in (folder / "checkpoints").iterdir()) == [
    "4",
    "6",
  ]


@pytest.mark.timeout(600)
def test_killed_at_many_moments_it_ends_with_the_same_bits(
  start, call, run_toy, whole, environment, tmp_path
):
  slow = environment | {"TOY_PAUSE": "0.1"}
  folder = tmp_path / "run"
  log, saved = folder / "metrics.jsonl", folder / "checkpoints"
  written = lambda: log.read_bytes().count(b"\n") if log.exists() else 0
  saving = lambda: any(saved.glob("*tmp*"))
  moments = {
    "while it starts": lambda: True,
    "when the record is there": (folder / "run.json").exists,
    "before the first round": lambda: written() == 1,
    "while a checkpoint is written": saving,
    "after the first checkpoint": lambda: written() > 3,
    "before the end": lambda: written() > 6,
  }
  for reached in moments.values():
    process = start(*run_toy(folder), env=slow)
    wait(process, reached)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  with log.open("a") as file:
    file.write('{"round": 6, "train_lo')
  half = saved / "6.orbax-checkpoint-tmp"
  half.mkdir(parents=True, exist_ok=True)
  status, _, err = call(*run_toy(folder))
  assert status == 0, err
  assert_same_run(folder, whole[0])
  assert not half.exists()


def test_ctrl_c_saves_and_the_same_command_goes_on(
  start, call, run_toy, whole, tmp_path
):
  folder = tmp_path / "run"
  arguments = run_toy(folder)
  process = start(*arguments)
  wait(process, lambda: len(metrics(folder)) > 0)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=200)
  assert process.returncode == 130
  assert "Finishing the round" in err and "Traceback" not in err
  assert "is saved. The same command goes on from there." in err
  done = len(metrics(folder)) - 1
  assert 0 < done < 6
  assert (folder / "checkpoints" / str(done)).is_dir()
  status, _, err = call(*arguments)
  assert status == 0, err
  assert_same_run(folder, whole[0])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_the_process_restarts_itself_for_huge_pages(environment, tmp_path):
  path = tmp_path / "tell.py"
  path.write_text(
    "import os\n"
    "def experiment(*, word: str = 'no'):\n"
    "  import jax\n"
    "  print(os.environ['GLIBC_TUNABLES'], jax.device_count(), word)\n"
    "  raise KeyboardInterrupt"
  )
  keys = ("GLIBC_TUNABLES", "JAX_NUM_CPU_DEVICES")
  env = {k: x for k, x in environment.items() if k not in keys}
  for program in (SCRIPT, MODULE):
    done = subprocess.run(
      [*program, "run", str(path), "--word", "two words"],
      env=env,
      capture_output=True,
      text=True,
    )
    cores = min(os.cpu_count() or 1, 8)
    assert done.stdout == f"{TUNABLES} {cores} two words\n"
    # The exit status is that of the restarted process.
    assert (done.returncode, done.stderr) == (130, "fedjax-llm: stopped.\n")


@pytest.mark.parametrize(
  "knobs, message",
  [
    (["--rounds", "many"], "invalid literal"),
    (["--download-density", "2.0"], "density"),
  ],
)
def test_bad_knobs_end_with_status_2(call, run_toy, tmp_path, knobs, message):
  status, _, err = call(*run_toy(tmp_path / "run", *knobs))
  assert status == 2
  assert message in err
  assert "Traceback" not in err


# What follows needs no process of its own.


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize(
  "arguments, restarts",
  [
    (["run", TOY], True),
    (["pretrain"], True),
    (["evaluate", "runs/mine"], True),
    (["run", TOY, "--help"], False),
    (["run", "-h"], False),
    (["run", "nothing"], False),
    (["walk"], False),
    (["merge", "--help"], False),
    (["compare", "nowhere"], False),
  ],
)
def test_only_what_computes_for_long_restarts_the_process(
  monkeypatch, capsys, arguments, restarts
):
  class Restart(Exception):
    pass

  def execv(path, command):
    raise Restart

  for key in ("JAX_NUM_CPU_DEVICES", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
    monkeypatch.setenv(key, "2")
  # Recorded, so that it is as before at the end.
  monkeypatch.setenv("GLIBC_TUNABLES", "")
  monkeypatch.delenv("GLIBC_TUNABLES")
  monkeypatch.setattr(cli.os, "execv", execv)
  monkeypatch.setattr(sys, "argv", ["fedjax-llm", *map(str, arguments)])
  with pytest.raises(Restart if restarts else SystemExit):
    cli.main()
    raise SystemExit  # Help that needs no option parser just returns.


@pytest.fixture
def main(monkeypatch, capsys):
  """Calls `main` in this process: the exit status, stdout and stderr."""
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setattr(cli, "_prepare_process", lambda **_: None)

  def fn(*arguments):
    monkeypatch.setattr(sys, "argv", ["fedjax-llm", *map(str, arguments)])
    status = 0
    try:
      cli.main()
    except SystemExit as stop:
      status = stop.code
    return status, *capsys.readouterr()

  return fn


def test_help_lists_the_knobs_with_their_docs(main):
  status, out, _ = main("run", "flasc", "--help")
  assert status == 0
  assert "--upload-density" in out and "--out" in out
  assert "share of an update's entries that a client sends" in " ".join(
    out.replace("│", " ").split()
  )


def test_help_lists_the_commands_and_the_configs(main):
  status, out, _ = main("--help")
  assert status == 0 and "run CONFIG" in out
  status, out, _ = main("run", "--help")
  assert status == 0
  for name in ("quickstart", "flasc", "dense_lora", "pretrain"):
    assert f"\n  {name} " in out


def test_data_shows_the_clients_of_a_config(
  main, toy_model, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  status, out, err = main("data", TOY, "--model", toy_model)
  assert status == 0, err
  plot = pathlib.Path("runs") / "toy_config" / "data.png"
  assert f"Plot: {plot}" in out and plot.is_file()
  assert "| clients | 6 |" in " ".join(out.split())
  assert not (plot.parent / "run.json").exists()


def test_pretrain_needs_no_config(main):
  status, out, _ = main("pretrain", "--help")
  assert status == 0
  assert "--warmup" in out


BAD = {
  "no such command": (["walk"], "COMMAND expected one of run, data, export"),
  "no such config": (["run", "nothing"], "got 'nothing'"),
  "no such file": (["run", "no/config.py"], "got 'no/config.py'"),
  "no such knob": (["run", "flasc", "--nothing", "1"], "--nothing"),
  "a knob of another type": (["run", "flasc", "--rounds", "many"], "many"),
  "no run folder": (["compare", "nowhere"], "nowhere"),
  "no text": (["evaluate", "--model", "m", "--text", "none.txt"], "none.txt"),
  "no run": (["evaluate", "no/run", "--task", "mmlu"], "no/run"),
  "no model": (["run", TOY, "--model", "./no/model"], "no/model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_of_one_screen(main, name):
  arguments, message = BAD[name]
  status, _, err = main(*arguments)
  assert status == 2
  assert message in err
  assert len(err.splitlines()) < 24


INSIDE = {
  "clients": (["--clients-per-round", "1000"], "clients_per_round <= 6"),
  "length": (["--sequence-length", "100000"], "sequence_length <= 32"),
  "rounds": (["--rounds", "0"], "rounds >= 1"),
  "divergence": (["--client-learning-rate", "inf"], "not finite"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_an_error_inside_is_of_one_screen_too(main, run_toy, name, tmp_path):
  knobs, message = INSIDE[name]
  status, _, err = main(*run_toy(tmp_path / "run", *knobs))
  assert status == 2
  assert message in err.splitlines()[-1]


def test_a_missing_extra_is_an_error_of_one_line(main, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "dp_accounting", None)
  config = tmp_path / "private.py"
  config.write_text(
    "from fedjax_llm.federated.privacy import guarantees\n\n"
    "def experiment():\n  guarantees.ExampleLevel(1.0, 1e-5)\n"
  )
  status, _, err = main("run", config, "--out", tmp_path / "run")
  assert status == 2
  assert "pip install 'dp-accounting" in err and err.count("\n") == 1


def test_a_file_in_the_place_of_the_folder(main, run_toy, tmp_path):
  (tmp_path / "run").write_text("")
  status, _, err = main(*run_toy(tmp_path / "run"))
  assert status == 2
  assert "run" in err


def test_a_run_with_other_knobs_is_refused(main, run_toy, whole):
  folder, _, _ = whole
  status, _, err = main(*run_toy(folder, "--upload-density", 0.5))
  assert status == 2
  assert "upload_density: 0.25 there, 0.5 now" in err


@pytest.mark.parametrize(
  "source, error",
  [
    ("def experiment(): pass\nint('three')", ValueError),
    ("def experiment(): return int('three')", ValueError),
    ("def experiment(: pass", SyntaxError),
    ("import nothing_of_this_name", ModuleNotFoundError),
  ],
)
def test_a_mistake_in_a_config_of_ones_own_is_traced(
  main, tmp_path, source, error
):
  path = tmp_path / "mine.py"
  path.write_text(source)
  with pytest.raises(error):
    main("run", path, "--out", tmp_path / "run")


def test_an_adapter_is_exported_merged_and_talked_to(
  call, run_toy, whole, tmp_path
):
  folder = tmp_path / "copy"
  shutil.copytree(whole[0], folder)
  shutil.rmtree(folder / "adapter")
  _, *options = run_toy(folder)
  status, out, err = call("export", *options)
  assert status == 0, err
  assert "round 6" in out and adapter(folder) == adapter(whole[0])
  merged = tmp_path / "merged"
  status, out, err = call(
    "merge", "--adapter", folder / "adapter", "--out", merged
  )
  assert status == 0 and (merged / "tokenizer.json").is_file(), err
  said = []
  for model in (("--adapter", folder / "adapter"), ("--model", merged)):
    options = ("--prompt", "2 4 6 8", "--max-new-tokens", 5)
    status, out, err = call("chat", *model, *options)
    assert status == 0, err
    said.append(out)
  assert said[0].startswith("base: ")
  assert f"adapter: {said[1]}" in said[0]
