r"""Trains on tool calls (ToolAlpaca style), without feedback.

The teacher reads another rollout's correct calls.

Run:    python -m sdpo_jax.main --config=configs/tool_use.py:model=qwen3-8b --workdir=runs/tool_use
Other:  python -m sdpo_jax.main --config=configs/tool_use.py:method=sdpo_blend \
          --config.method.teacher_context.feedback=without_solution --workdir=runs/tool_use_feedback
Smoke:  python -m sdpo_jax.main --config=configs/tool_use.py:local --workdir=runs/tool_use_smoke
Data:   data=DIR holds {train,test}.jsonl in the row format of the paper's repository,
        lasgroup/SDPO; by default $SDPO_JAX_DATA/tooluse, or data/tooluse.
        The environment always says what does not match; the second command also shows that to the
        teacher.
        Each call keeps its own arguments; the paper's release merges those of all calls:
        --config.env.arguments=merged.
Cost:   the full run has not been measured.
Result: the full run has not been measured.
"""

import os

from sdpo_jax import config


def get_config(arg: str = ""):
  a = config.parse_arg(
    arg,
    data=os.path.join(os.environ.get("SDPO_JAX_DATA", "data"), "tooluse"),
    top_k=100,
    method="sdpo",
    model="qwen3-8b",
    seed=0,
    local=False,
  )
  c = config.paper(a, rich_feedback=False)
  c.env = dict(name="tool_use")
  c.data.sources = (os.path.join(a.data, "{split}.jsonl"),)
  if a.local and "data" not in a.given:
    c.data.sources = (os.path.join(config.ROWS, "tool_use.{split}.jsonl"),)
  return c
