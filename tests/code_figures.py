"""Measures how the code reads.

`python tests/code_figures.py [FILE or FOLDER ...]` prints a table, then every place over a limit.

Widths count characters of lines that are not blank. A statement's size is its number of syntax
nodes; only simple statements count, imports and docstrings left out. A function's length is from
`def` to its last line, docstring included. A docstring's sentence ends at a full stop or a blank
line; tables and indented blocks are left out.
"""

import ast
import io
import pathlib
import re
import statistics
import sys
import tokenize
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
MAX_COLUMNS, WIDE_COLUMNS = 100, 80
MAX_FUNCTION_LINES, MAX_ARGUMENTS = 60, 8
MAX_STATEMENT_NODES, MAX_SENTENCE_WORDS = 60, 30
# A docstring's examples of commands, tables and formulas are no sentences.
_NO_SENTENCE = re.compile(r"^\s{2,}|^\s*[|`$>]|[=]{2,}|-{3,}")


class Place(NamedTuple):
  file: str
  line: int
  what: str


class Figures(NamedTuple):
  """Counts, and the places over a limit, of a set of files."""

  widths: list[int]  # of every line that is not blank
  functions: list[tuple[int, Place]]  # lines of each
  arguments: list[tuple[int, Place]]
  statements: list[tuple[int, Place]]  # syntax nodes of each
  sentences: list[tuple[int, Place]]  # words of each
  lambdas: list[Place]  # bound to a name
  conditionals: list[Place]  # statements with more than one conditional expression
  wide: list[Place]
  code_lines: int
  comment_lines: int


def own_nodes(statement: ast.stmt):
  """Yields the nodes of a statement without those of the statements inside it."""
  waiting = [statement]
  while waiting:
    node = waiting.pop()
    yield node
    waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]


def is_simple(node: ast.stmt) -> bool:
  """Tells whether a statement holds no others and says something: no import, no docstring."""
  if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
    return False
  return not isinstance(node, (ast.Import, ast.ImportFrom)) and not hasattr(node, "body")


def docstring_sentences(text: str) -> list[str]:
  """The sentences of a docstring, without indented blocks, tables and formulas."""
  sentences, paragraph = [], []
  for line in [*text.split("\n"), ""]:
    if line.strip() and not _NO_SENTENCE.search(line):
      paragraph.append(line.strip())
      continue
    sentences += re.split(r"(?<=[.?!])\s+", " ".join(paragraph))
    paragraph = []
  return [sentence for sentence in sentences if sentence]


def read(paths: list[pathlib.Path]) -> Figures:
  """Figures of Python files. SyntaxError for one that cannot be parsed."""
  figures = Figures([], [], [], [], [], [], [], [], 0, 0)
  code_lines = comment_lines = 0
  for path in paths:
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for number, line in enumerate(source.split("\n"), start=1):
      if line.strip():
        figures.widths.append(len(line))
        if len(line) > MAX_COLUMNS:
          figures.wide.append(Place(name, number, f"{len(line)} columns"))
    kinds = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
      if token.type == tokenize.COMMENT:
        comment_lines += 1
      elif token.string.strip() and token.type != tokenize.ENDMARKER:
        kinds.update(dict.fromkeys(range(token.start[0], token.end[0] + 1)))
    code_lines += len(kinds)
    for node in ast.walk(tree):
      _measure(node, name, figures)
  return figures._replace(code_lines=code_lines, comment_lines=comment_lines)


def _measure(node: ast.AST, name: str, figures: Figures) -> None:
  if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
    place = Place(name, node.lineno, node.name)
    figures.functions.append((node.end_lineno - node.lineno + 1, place))
    a = node.args
    count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
    count -= bool(a.args) and a.args[0].arg in ("self", "cls")
    figures.arguments.append((count, place))
  if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
    line = getattr(node, "lineno", 1)
    for sentence in docstring_sentences(ast.get_docstring(node) or ""):
      figures.sentences.append((len(sentence.split()), Place(name, line, sentence)))
  if isinstance(node, ast.stmt):
    own = list(own_nodes(node))
    place = Place(name, node.lineno, type(node).__name__)
    if is_simple(node):
      figures.statements.append((len(own), place))
    if sum(isinstance(x, ast.IfExp) for x in own) > 1:
      figures.conditionals.append(place)
  if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
    figures.lambdas.append(Place(name, node.lineno, "named lambda"))


def share(values, limit: int) -> float:
  """Percent of the values that exceed the limit."""
  values = list(values)
  return 100.0 * sum(value > limit for value in values) / max(len(values), 1)


def table(f: Figures) -> dict[str, float]:
  """Name of a figure -> value; percentages unless the name says otherwise."""
  lines, nodes = [n for n, _ in f.functions], [n for n, _ in f.statements]
  words = [n for n, _ in f.sentences]

  def percentile(values, q):
    return statistics.quantiles(values, n=100)[q - 1] if len(values) > 1 else sum(values)

  return {
    "code lines": f.code_lines,
    "lines > 80 columns, %": share(f.widths, WIDE_COLUMNS),
    "lines > 100 columns, %": share(f.widths, MAX_COLUMNS),
    "function lines, median": statistics.median(lines) if lines else 0,
    "function lines, p90": percentile(lines, 90),
    f"functions > {MAX_FUNCTION_LINES} lines": sum(n > MAX_FUNCTION_LINES for n in lines),
    f"functions > {MAX_ARGUMENTS} arguments": sum(n > MAX_ARGUMENTS for n, _ in f.arguments),
    "nodes a statement, median": statistics.median(nodes) if nodes else 0,
    "nodes a statement, p99": percentile(nodes, 99),
    f"statements > {MAX_STATEMENT_NODES} nodes, %": share(nodes, MAX_STATEMENT_NODES),
    "statements with two conditional expressions": len(f.conditionals),
    "named lambdas per 1,000 code lines": 1000.0 * len(f.lambdas) / max(f.code_lines, 1),
    "words a docstring sentence, median": statistics.median(words) if words else 0,
    f"docstring sentences > {MAX_SENTENCE_WORDS} words, %": share(words, MAX_SENTENCE_WORDS),
    "comment lines per 100 code lines": 100.0 * f.comment_lines / max(f.code_lines, 1),
  }


def places(f: Figures):
  """Every place over a limit, as lines of text."""
  yield from (f"{p.file}:{p.line}: {p.what}" for p in f.wide)
  for values, limit, unit in (
    (f.functions, MAX_FUNCTION_LINES, "lines"),
    (f.arguments, MAX_ARGUMENTS, "arguments"),
    (f.statements, MAX_STATEMENT_NODES, "nodes"),
    (f.sentences, MAX_SENTENCE_WORDS, "words"),
  ):
    yield from (f"{p.file}:{p.line}: {n} {unit}: {p.what[:70]}" for n, p in values if n > limit)
  yield from (f"{p.file}:{p.line}: two conditional expressions" for p in f.conditionals)
  yield from (f"{p.file}:{p.line}: {p.what}" for p in f.lambdas)


def python_files(paths: list[pathlib.Path]) -> list[pathlib.Path]:
  """The files themselves, and those of the folders."""
  return [
    file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
  ]


if __name__ == "__main__":
  asked = [pathlib.Path(argument).resolve() for argument in sys.argv[1:]]
  measured = read(python_files(asked or [ROOT / "sdpo_jax", ROOT / "configs"]))
  for figure, value in table(measured).items():
    sys.stdout.write(f"{figure:45}  {value:8.1f}\n")
  for text in places(measured):
    sys.stdout.write(text + "\n")
