"""The page of environments: `python -m sdpo_jax.envs` prints it, and the README shows it.

Settings of an environment are the arguments of its class; `base.py` has the contract of them all.
"""

from typing import NamedTuple

PACKAGE = "sdpo_jax.envs.adapters"


class About(NamedTuple):
  """A line on an environment that has a name in ENVS."""

  asks: str
  reward: str  # what gives the highest one
  feedback: str
  shown_by: str  # a configuration, or a file of suites, that has the environment
  extra: str = ""  # of setup.py; "": none


class Adapter(NamedTuple):
  """A line on a class of `adapters/`."""

  written_for: str
  settings: str
  reward: str
  feedback: str
  extra: str = ""


_TURNS = "the world's answer to each turn"
ABOUT = {
  "tinycode": About(
    "a Python function in plain words, some of them never read before",
    "all hidden tests pass",
    "failing input, output and expected output, or the exception with its line",
    "configs/tinycode.py",
  ),
  "arithmetic": About(
    "a word problem of one to three steps, with novel words too",
    "the boxed number is right",
    "the first step that goes off, and what it should come to",
    "configs/counterfactual.py:domain=arithmetic",
  ),
  "instructions": About(
    "a short text that keeps one to three constraints",
    "all are kept",
    "each broken constraint, and what the response has instead",
    "configs/instructions.py",
  ),
  "coding": About(
    "a program or a function: LiveCodeBench, HumanEval, MBPP, rows of one's own",
    "all tests pass in the sandbox",
    "what an online judge says: failing test, exception, time or memory limit, form",
    "configs/coding.py",
  ),
  "mcq": About(
    "a multiple-choice question: SciKnowEval, GPQA, MMLU-Pro",
    "the letter between `<answer>` tags is right",
    "a wrong form; a wrong letter with `tell_correctness` alone",
    "configs/science_mcq.py",
  ),
  "math_qa": About(
    "a problem with one final answer: GSM8K, MATH, rows of that form",
    "the last box equals the answer (math-verify)",
    "a wrong form; a wrong answer with `tell_correctness` alone",
    "configs/math_qa.py",
  ),
  "tool_use": About(
    "calls of documented tools (ToolAlpaca)",
    "actions and arguments are the reference's",
    "unknown tools, wrong or missing arguments; the solution with `reveal_answer` alone",
    "configs/tool_use.py",
  ),
  "ifeval": About(
    "a request with some of IFEval's 25 constraints",
    "all are kept (prompt-level, strict)",
    "each broken constraint, and what the response has instead",
    "configs/eval/instructions.py",
  ),
  "pairwise": About(
    "an open request, and an answer to beat",
    "a judge prefers the response in both orders; 0.5 where the orders disagree",
    "that the response was not preferred",
    "configs/eval/forgetting.py",
  ),
  "household": About(
    "a household task in ALFWorld's wording, with novel words; for the tiny model",
    "the right appliances in their order, and the right place",
    _TURNS,
    "configs/agentic.py",
  ),
  "alfworld": About(
    "a household task: ALFWorld's games, or games of our own on its engine",
    "the goal is reached",
    _TURNS,
    "configs/agentic.py:world=alfworld",
    extra="textworld",
  ),
  "search_qa": About(
    "a question of several hops, answered by searching a corpus of our own",
    "the answer is right",
    _TURNS + ", with the documents found",
    "configs/agentic.py:world=search_qa",
    extra="search",
  ),
  "search_qa_rows": About(
    "likewise, with your questions, over your corpus or a retriever's address",
    "the answer is right",
    _TURNS + ", with the documents found",
    "configs/agentic.py:world=search_qa",
    extra="search",
  ),
  "webshop": About(
    "something to buy, on WebShop's pages: its products, or a small shop of our own",
    "what is bought scores 1 (`won`), or its score (`score`)",
    _TURNS + ", and the score at the end",
    "configs/agentic.py:world=webshop",
    extra="webshop",
  ),
}
ADAPTERS = {
  "gym:GymText": Adapter(
    "Gymnasium: `reset(seed)` and `step(text)`",
    "`--config.env.world=PACKAGE:NAME`",
    "the sum over the steps",
    _TURNS,
  ),
  "trl:TRLTools": Adapter(
    "TRL's `environment_factory`: a class with tools",
    "`--config.env.world=PACKAGE:NAME`, and its data set as "
    "`--config.data.sources=\"('rows.{split}.jsonl',)\"`",
    "`get_reward`, or a reward function: `reward=PACKAGE:NAME`",
    "what the tools return or raise",
  ),
  "openenv:OpenEnvText": Adapter(
    "OpenEnv: a server",
    "`--config.env.url=http://127.0.0.1:8000`, and `action=`, `observation=`: the fields with text",
    "the sum over the steps",
    _TURNS,
    extra="openenv",
  ),
  "verifiers:Verifiers": Adapter(
    "verifiers before 0.4",
    "`--config.env.world=ID`",
    "its rubric",
    _TURNS,
    extra="verifiers",
  ),
  "reasoning_gym:ReasoningGym": Adapter(
    "reasoning-gym, whose questions are judged",
    "`--config.env.generators=leg_counting,countdown`",
    "the package's score",
    "no answer, one that cannot be read, how much of the score a wrong one gets",
    extra="reasoning_gym",
  ),
}


def page() -> str:
  """Returns both tables in Markdown."""
  return f"{own()}\nWritten for another trainer (ADAPTERS is `{PACKAGE}`):\n\n{adapters()}"


def own() -> str:
  """Returns the table of the environments that have a name."""
  header = "| name | asks | reward 1 if | feedback says | shown by |\n|---|---|---|---|---|\n"
  lines = (
    _line(f"`{name}`", x.asks, x.reward, x.feedback, f"`{x.shown_by}`{_needs(x.extra)}")
    for name, x in ABOUT.items()
  )
  return header + "".join(lines)


def adapters() -> str:
  """Returns the table of the classes that play what was written for other trainers."""
  header = "| written for | `--config.env.name=` | and | reward | feedback says |\n"
  lines = (
    _line(x.written_for + _needs(x.extra), f"`ADAPTERS.{name}`", x.settings, x.reward, x.feedback)
    for name, x in ADAPTERS.items()
  )
  return header + "|---|---|---|---|---|\n" + "".join(lines)


def _needs(extra: str) -> str:
  return f' (`".[{extra}]"`)' if extra else ""


def _line(*cells: str) -> str:
  return f"| {' | '.join(cells)} |\n"
