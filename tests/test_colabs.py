"""The notebooks of colabs/: stripped, thin, alike where they should be, and run from top to bottom.

SDPO_JAX_SMALL makes them toy sizes. They share the directory of their runs, as they do for whoever
opens one after another: the later ones go on from what train_tinycode has left.
"""

import json
import pathlib
import re
import resource
import subprocess
import sys

from nbclient import NotebookClient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "colabs"
NAMES = (  # in the order in which they run
  "train_tinycode",
  "inspect_run",
  "where_it_teaches",
  "bring_your_own_environment",
  "agents",
  "real_model",
)
MOST_CPU_S = 180  # of one notebook at toy sizes
MOST_LINES = {"cell": 20, "notebook": 90}  # of code; the file of one's own environment is longer


def read(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code(notebook):
  return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


def test_every_notebook_is_run():
  assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_stripped(name):
  """`nbstripout --keep-id` strips one; ids are words, so that a change shows only what changed."""
  notebook = read(name)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  nbformat.validate(notebook)
  assert set(notebook.metadata) <= {"accelerator", "colab", "kernelspec", "language_info"}
  for cell in notebook.cells:
    assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id
    assert not cell.metadata and re.fullmatch("[a-z]+(-text)?", cell.id), cell.id


@pytest.mark.parametrize("name", NAMES)
def test_its_first_cell_states_runtime_and_time(name):
  notebook = read(name)
  first = notebook.cells[0]
  assert first.cell_type == "markdown" and first.source.startswith("# ")
  _, runtime, time = re.split(r"\*\*(?:Runtime|Time):\*\*", first.source)
  assert "free" in runtime and re.search(r"\d+ (minutes|seconds)|not measured", time)
  # a notebook without it opens on a CPU
  wants_gpu = "T4" in runtime
  assert notebook.metadata.get("accelerator") == ("GPU" if wants_gpu else None)
  assert notebook.metadata.colab.get("gpuType") == ("T4" if wants_gpu else None)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_thin(name):
  cells = code(read(name))
  assert list(cells)[:2] == ["install", "sizes"]
  own = {
    key: source.count("\n") + 1
    for key, source in cells.items()
    if key not in ("install", "sizes") and not source.startswith("%%writefile")
  }
  assert max(own.values()) <= MOST_LINES["cell"] and sum(own.values()) <= MOST_LINES["notebook"]


def test_all_begin_alike():
  for key in ("install", "sizes"):
    assert len({code(read(name))[key] for name in NAMES}) == 1


# ---- the installation ----------------------------------------------------------------------------

PRETENDED = """
import importlib.util, json, os, shutil, subprocess, sys
sys.path, calls = [p for p in sys.path if "packages" not in p], []
subprocess.run = lambda command, check: calls.append([*command, check])
importlib.util.find_spec = lambda name: %(installed)s
shutil.which = lambda name: %(gpu)r
sys.modules.update(%(loaded)r)
try:
  exec(%(source)r)
except RuntimeError as error:
  calls.append(str(error))
print(json.dumps(calls))
"""


def install(tmp_path, *, installed=None, gpu=None, loaded=()):
  """Runs the install cell where nothing is installed; returns the commands that it would give."""
  source = code(read(NAMES[0]))["install"]
  modules = dict.fromkeys(loaded)
  program = PRETENDED % dict(installed=installed, gpu=gpu, loaded=modules, source=source)
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
  )
  return json.loads(done.stdout)


def test_nothing_is_installed_where_the_package_is(tmp_path):
  assert install(tmp_path, installed="object()") == []


@pytest.mark.parametrize("gpu, extra", [(None, ""), ("/usr/bin/nvidia-smi", "[cuda]")])
def test_a_stock_image_gets_the_package(tmp_path, gpu, extra):
  clone, uninstall, installed = install(tmp_path, gpu=gpu)
  assert clone[:3] == ["git", "clone", "-q"] and clone[-2:] == ["./sdpo-jax", True]
  assert uninstall[1:4] == ["-m", "pip", "uninstall"] and "jax-cuda12-plugin" in uninstall
  assert installed[1:] == ["-m", "pip", "install", "-q", f"./sdpo-jax{extra}", True]


def test_a_second_try_does_not_clone_again(tmp_path):
  (tmp_path / "sdpo-jax").mkdir()
  assert [command[2:4] for command in install(tmp_path)] == [
    ["pip", "uninstall"],
    ["pip", "install"],
  ]


def test_whoever_has_a_clone_installs_that_one(tmp_path):
  (tmp_path / "setup.py").touch()
  (tmp_path / "colabs").mkdir()
  _, installed = install(tmp_path / "colabs")
  assert installed[-2:] == ["./..", True]


def test_who_has_loaded_older_packages_is_told_to_restart(tmp_path):
  assert "restart the session" in install(tmp_path, loaded=["numpy"])[-1]


# ---- the readme ----------------------------------------------------------------------------------


def test_the_readme_has_badges_of_every_notebook():
  text = (FOLDER / "README.md").read_text(encoding="utf-8")
  colab = re.findall(r"research\.google\.com/github/(\S+?)/blob/main/colabs/(\w+)\.ipynb\)", text)
  kaggle = re.findall(r"src=https://github\.com/(\S+?)/blob/main/colabs/(\w+)\.ipynb\)", text)
  assert [name for _, name in colab] == [name for _, name in kaggle]
  assert sorted(name for _, name in colab) == sorted(NAMES)
  (repository,) = {repository for repository, _ in colab + kaggle}
  assert f'"https://github.com/{repository}"' in code(read(NAMES[0]))["install"]


# ---- run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_its_folder(name, shared_runs, tmp_path, monkeypatch):
  monkeypatch.setenv("SDPO_JAX_SMALL", "1")
  monkeypatch.setenv("SDPO_JAX_RUNS", str(shared_runs))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
  # one device, as on Colab, compiled in as much of a hurry as in other tests
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  before = sorted(FOLDER.iterdir())
  begun = cpu_of_children()
  notebook = read(name)
  place = {"metadata": {"path": str(FOLDER)}}
  NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
  assert cpu_of_children() - begun < MOST_CPU_S
  assert sorted(FOLDER.iterdir()) == before
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert any("image/png" in output.get("data", ()) for output in outputs)
  said = "".join(output.text for output in outputs if output.output_type == "stream")
  warned = set(re.findall(r"\w+Warning: ", said)) - {"TqdmWarning: "}  # it misses ipywidgets
  assert not warned, said


def cpu_of_children():
  """Seconds of all processes that this one has started and that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime
