"""Imports point one way: a file may import files of lower levels, and of its own level only inside
its own folder.
"""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "sdpo_jax"

LEVELS = {  # a folder's level holds for its files unless they have their own
  "records": 0,
  "errors": 0,
  "ranges": 0,
  "stats": 0,
  "text": 0,
  "thought": 0,
  "workdir": 0,
  "sharding": 0,
  "hosts": 0,
  "chips": 0,
  "preemption": 0.5,
  "compilation": 0,
  "kernels": 0,
  "sandbox": 0.5,
  "model": 1,
  "objectives": 1,
  "envs": 1,
  "data/chat": 1,
  "metrics": 1,
  "trackers": 1,
  "ending": 1.5,
  "signs": 1.5,
  "engine": 2,
  "monitors": 2,
  "symptoms": 2,
  "optimizer": 2,
  "train_step": 2,
  "data": 2,
  "checkpoint": 2,
  "stored": 1,
  "worlds": 2,
  "rollout": 3,
  "play": 3.2,
  "episodes": 3.4,
  "hlo": 3,
  "ahead": 3,
  "judging": 2,
  "given_teacher": 2.5,
  "given_policy": 2.5,
  "remote_teacher": 3,
  "teacher_gate": 3,
  "alternatives": 3.5,
  "hindsight": 3.6,
  # config reads the METHODS table and the kernels' names alone; train asks it to validate
  "config": 4,
  "report": 4,
  "rollout_log": 4,
  "learner": 4.5,
  "session": 4.5,
  "export": 4.5,
  "import_gguf": 4.5,
  "evaluation": 4.7,
  "final_scores": 4.8,
  "kept": 4.85,
  "summary": 4.9,
  "tuning": 4.7,
  "plan": 4.7,
  "acting": 4.7,
  "transcripts": 4.7,
  "plots": 4.8,
  "train": 5,
  "diagnose": 4.7,
  "discover": 5,
  "pretrain": 5,
  "experiment": 5,
  "bench": 5,
  "serve": 5,
  "main": 6,
}
FORBIDDEN = {  # on top of the levels; a folder's rule holds for its files
  "records": {"jax", "sdpo_jax"},
  "stats": {"jax", "sdpo_jax"},
  "kernels": {"sdpo_jax.model", "sdpo_jax.objectives"},
  "errors": {"jax", "sdpo_jax"},
  "ranges": {"jax", "sdpo_jax"},
  "text": {"jax", "sdpo_jax"},
  "thought": {"jax", "sdpo_jax"},
  "sandbox": {"jax", "sdpo_jax.envs"},
  "envs": {"jax", "flax", "sdpo_jax.model", "sdpo_jax.objectives"},
  "objectives": {"sdpo_jax.envs", "sdpo_jax.data", "transformers"},
}
# nor may anything that they import
WITHOUT_JAX = (
  "records",
  "thought",
  "ranges",
  "stats",
  "envs",
  "report",
  "trackers/sinks",
  "trackers/__main__",
  "discover/results",
  "objectives/teacher_context",
)
# corpus makes the tokenizer of the tiny model, import_gguf that of a GGUF file
HUGGING_FACE = {"data/chat", "data/corpus", "import_gguf", "model/hf_weights"}

FILES = sorted(
  str(path.relative_to(PACKAGE).with_suffix(""))
  for path in PACKAGE.rglob("*.py")
  if path.name != "__init__.py"
)


def lookup(table, name, default=None):
  return table.get(name, table.get(name.split("/")[0], default))


def imports(name):
  """Dotted names of all that a file imports, inside functions too; `from a import b` counts as a.b
  if that is a file of ours.
  """
  found = set()
  for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name}: relative import"
      ours = {
        f"{node.module}.{alias.name}"
        for alias in node.names
        if file_of(f"{node.module}.{alias.name}") in FILES
      }
      found |= ours or {node.module}
  return found


def file_of(module):
  return "/".join(module.split(".")[1:]) if module.startswith("sdpo_jax.") else None


def within(module, prefix):
  return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_lies_below(name):
  level = lookup(LEVELS, name)
  assert level is not None, f"give {name} a level"
  for module in imports(name):
    for prefix in lookup(FORBIDDEN, name, ()):
      assert not within(module, prefix), f"{name} imports {module}"
    other = file_of(module)
    if other:
      inside = "/" in name and name.split("/")[0] == other.split("/")[0]
      assert lookup(LEVELS, other) < level or inside and lookup(LEVELS, other) == level, (
        f"{name} imports {other}, which is not below it"
      )
    if module.split(".")[0] in ("transformers", "tokenizers", "huggingface_hub", "datasets"):
      assert name in HUGGING_FACE, f"{name} imports {module}"


@pytest.mark.parametrize(
  "name", [name for name in FILES if name in WITHOUT_JAX or name.split("/")[0] in WITHOUT_JAX]
)
def test_no_jax_behind(name):
  reached, waiting = set(), {name}
  while waiting:
    here = waiting.pop()
    reached.add(here)
    for module in imports(here):
      assert module.split(".")[0] not in ("jax", "flax", "optax", "orbax", "torch"), (
        f"{name} reaches {module} through {here}"
      )
    waiting |= {file_of(module) for module in imports(here)} & set(FILES) - reached


def test_report_knows_only_stats():
  """And how a path is refused."""
  files = [name for name in FILES if name.startswith("report/")]
  found = {module for name in files for module in imports(name) if within(module, "sdpo_jax")}
  assert {module for module in found if not within(module, "sdpo_jax.report")} == {
    "sdpo_jax.errors",
    "sdpo_jax.stats",
  }


def test_the_walk_sees_every_form_of_import():
  assert {"sdpo_jax.stats", "sdpo_jax.report.runs"} <= imports("report/forest")
  assert "matplotlib.figure" in imports("report/curves") and "argparse" in imports(
    "report/__main__"
  )
  assert (
    "sdpo_jax.records" in imports("metrics")
    and "records" in FILES
    and file_of("sdpo_jax.model.decoder") == "model/decoder"
  )
