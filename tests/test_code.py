"""How the code reads: the limits that a linter cannot keep."""

import pathlib

from tests import code_figures

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = code_figures.read(code_figures.python_files([ROOT / "sdpo_jax", ROOT / "configs"]))
TESTS = code_figures.read(code_figures.python_files([ROOT / "tests"]))

# At most five functions may be longer than 60 lines, each with its reason.
LONG_FUNCTIONS = {
  "base": "every setting with its unit, in one place",
}
# Signatures that others rely on, and that one list of arguments makes plainer than a record.
MANY_ARGUMENTS = {
  "distill_kl": "the public kernel, and its implementations, which share its signature",
  "sdpo_loss": "the specification of the objective",
}


def over(values, limit):
  return {place.what for count, place in values if count > limit}


def test_no_line_is_wider_than_a_hundred_columns():
  assert not PACKAGE.wide
  assert not TESTS.wide
  assert code_figures.table(PACKAGE)["lines > 80 columns, %"] <= 25


def test_functions_fit_on_a_page():
  assert over(PACKAGE.functions, code_figures.MAX_FUNCTION_LINES) == set(LONG_FUNCTIONS)
  assert len(LONG_FUNCTIONS) <= 5


def test_functions_take_at_most_eight_arguments():
  assert over(PACKAGE.arguments, code_figures.MAX_ARGUMENTS) == set(MANY_ARGUMENTS)


def test_statements_have_one_idea():
  figures = code_figures.table(PACKAGE)
  assert figures[f"statements > {code_figures.MAX_STATEMENT_NODES} nodes, %"] <= 0.8
  assert figures["named lambdas per 1,000 code lines"] <= 2
  assert not PACKAGE.conditionals


def test_docstrings_are_sentences():
  figures = code_figures.table(PACKAGE)
  assert figures[f"docstring sentences > {code_figures.MAX_SENTENCE_WORDS} words, %"] <= 3
  assert len(PACKAGE.sentences) > 1000  # of what the figure is a share


def test_the_figures_see_what_they_measure(tmp_path):
  file = tmp_path / "dense.py"
  file.write_text(
    f'"""{"word " * 31}."""\n'
    f"x = {'1 + ' * 40}1\n"
    "f = lambda a: a if a else (1 if x else 2)\n"
    f"def g({', '.join(f'a{i}' for i in range(9))}):\n" + "  pass\n" * 60 + f"# {'w' * 99}\n"
  )
  figures = code_figures.read([file])
  assert [len(figures.wide), len(figures.conditionals), len(figures.lambdas)] == [3, 1, 1]
  assert over(figures.functions, 60) == over(figures.arguments, 8) == {"g"}
  assert over(figures.statements, 60) == {"Assign"}
  assert [words for words, _ in figures.sentences] == [32]
