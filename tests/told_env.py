"""TinyCode that tells in files when it judges: tests stop or kill a run at that moment."""

import os
import pathlib
import time

from sdpo_jax.envs.tinycode import TinyCode
from sdpo_jax.records import Feedback, Task


class Told(TinyCode):
  """Judges as TinyCode does, a little later."""

  def judge(self, task: Task, response: str) -> Feedback:
    """Touches judged-SPLIT in the directory that SDPO_TOLD names, waits, and judges.

    A line of the file `judged` there tells of each response.
    """
    told = os.environ.get("SDPO_TOLD")
    if told:
      (pathlib.Path(told) / f"judged-{task.split}").touch()
      with open(pathlib.Path(told) / "judged", "a") as file:
        file.write(f"{task.id}\n")
      time.sleep(0.05)
    return super().judge(task, response)
