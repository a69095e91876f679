"""Reads the check of a test: a program too, which the author of a data set wrote.

A check is Python source that defines one of two functions:

  check(candidate)                calls `candidate` like the judged function, and asserts
  check(input, output, expected)  is asked about the answer to each test: texts for a program that
                                  reads standard input, values for a function, whose `input` is the
                                  list of its arguments

The program is right if the check returns None or something true. It is wrong if an assertion fails,
if another exception ends the check, or if the check returns something else. A check(candidate) that
ends in any way before it has called the program judges nothing: its verdict is `sandbox_failed`.

Values are None, booleans, numbers, texts, bytes, and lists, tuples, sets and dictionaries of them.
An iterator, a range or a view of a dictionary arrives as an iterator. A list, set or dictionary
that the function changes is changed in the check too. An exception of the program is raised in the
check, under its own name if that is a built-in one and not StopIteration, which would pass for the
end of a loop in the check. Nothing else crosses: no function, no object of a class, and of NumPy
only scalars.
"""

import ast
import builtins
import functools
from typing import NamedTuple

_WANTED = "_sdpo_wanted"  # where an assertion keeps what it waits for
_NOTE = "_sdpo_note"  # jail.py makes an assertion's message by this name


class Check(NamedTuple):
  """Holds a check that is ready for the jail."""

  source: str  # its assertions tell what they waited for
  judges_answers: bool  # else it calls the judged function


@functools.lru_cache(maxsize=1024)
def read_check(source: str, fn_name: str | None) -> Check:
  """Reads a check of a program. Raises ValueError if it defines neither of the two functions.

  `fn_name` is the judged function, which a check may call by that name as well, or None.
  """
  try:
    tree = ast.parse(source)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
    raise ValueError(f"the check is not Python: {e}") from e
  functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
  function = next((f for f in reversed(functions) if f.name == "check"), None)
  if function is None:
    raise ValueError("the check defines no function check")
  arguments = function.args.posonlyargs + function.args.args
  names = [argument.arg for argument in arguments]
  if len(names) not in (1, 3):
    raise ValueError(
      f"check({', '.join(names)}) must be check(candidate) or check(input, output, expected)"
    )
  if len(names) == 1 and fn_name is None:
    raise ValueError(f"check({names[0]}) needs fn_name: a whole program has no function to call")
  if len(names) == 1:
    _require_clear_names(tree, names[0], fn_name)
  explained = _Explainer({names[0], fn_name}).visit(tree)
  return Check(ast.unparse(ast.fix_missing_locations(explained)), len(names) == 3)


def _require_clear_names(tree: ast.Module, candidate: str, fn_name: str) -> None:
  """Raises ValueError if a check may mean a built-in function by the judged function's name.

  It would ask the judged program for the right answer, and every program would pass.
  """
  used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
  if candidate != fn_name and hasattr(builtins, fn_name) and {candidate, fn_name} <= used:
    raise ValueError(
      f"the check uses {candidate} and {fn_name}, which is the judged function's name and a "
      f"built-in one: call the judged function {candidate}, and the other builtins.{fn_name}"
    )


class _Explainer(ast.NodeTransformer):
  """Gives each assertion a message that holds its text and, of an equation, the awaited value."""

  def __init__(self, called: set[str | None]):
    self._called = called

  def visit_Assert(self, node: ast.Assert) -> ast.Assert:
    """Returns the assertion with its message."""
    told: list[ast.expr] = [ast.Constant(ast.unparse(node.test)[:300])]
    match node.test:
      case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
        calls_left, calls_right = self._calls(left), self._calls(right)
        if calls_left and not calls_right:
          node.test.comparators[0] = _kept(right)
        elif calls_right and not calls_left:
          node.test.left = _kept(left)
        if calls_left != calls_right:
          told.append(ast.List([ast.Name(_WANTED, ast.Load())], ast.Load()))
    message = [ast.keyword("message", node.msg)] if node.msg else []
    node.msg = ast.Call(ast.Name(_NOTE, ast.Load()), told, message)
    return node

  def _calls(self, node: ast.expr) -> bool:
    """Tells whether an expression mentions the judged function."""
    return any(isinstance(x, ast.Name) and x.id in self._called for x in ast.walk(node))


def _kept(node: ast.expr) -> ast.expr:
  """Returns the expression, with its value kept for the assertion's message."""
  return ast.NamedExpr(ast.Name(_WANTED, ast.Store()), node)
