r"""Trains a small real model in three worlds: do rewards, or the worlds' words, teach it to act?

Run:    python -m sdpo_jax.experiment --config=configs/experiments/worlds.py \
          --workdir=runs/worlds --results=results/worlds --jobs=2
Smoke:  python -m sdpo_jax.experiment --config=configs/experiments/worlds.py:local \
          --workdir=runs/worlds_local
Needs:  the extras `search`, `webshop` and `textworld`, and SmolLM2-135M-Instruct from the hub.
Grid:   GRPO, and `sdpo_turns`, whose teacher knows before each turn what the world will answer to
        it, in each world; one seed, 12 steps of 8 or 16 episodes of a few turns. What a model of
        this size is expected not to do yet is to write an action that the world knows, so that its
        rewards are nearly all 0; look at the invalid turns.
Cost:   not measured.
Result: none yet.
"""

ARMS = ("grpo", "sdpo_turns")
# world: tasks a step, turns, tokens of the first messages, of an episode after them
WORLDS = {
  "search_qa": (4, 3, 192, 576),
  "webshop": (2, 4, 256, 1280),
  "alfworld": (2, 8, 320, 1024),
}


def get_grid():
  return {
    f"{arm}_on_{world}_seed0": _arguments(world, arm, "seed=0") for world in WORLDS for arm in ARMS
  }


def _arguments(world: str, arm: str, more: str) -> list[str]:
  tasks, turns, first, episode = WORLDS[world]
  file = "configs/agentic.py"
  return [
    f"--config={file}:world={world},method={arm},rows=episodes,model=smollm2-135m,{more}",
    # what two CPU cores carry
    "--config.model.dtype=float32",
    "--config.model.remat=dots",
    "--config.train.micro_batches=1",
    f"--config.rollout.questions={tasks}",
    "--config.rollout.group=4",
    "--config.rollout.rows=16",
    "--config.rollout.judge_threads=4",
    "--config.total_steps=12",
    "--config.checkpoint.every_steps=12",
    "--config.checkpoint.keep=1",
    f"--config.env.limit={turns}",
    f"--config.data.max_prompt_tokens={first}",
    f"--config.data.max_teacher_tokens={first + 256}",
    "--config.data.length_multiple=64",
    f"--config.rollout.max_episode_tokens={episode}",
    "--config.rollout.max_new_tokens=48",
    # at temperature 1 a model this small writes incoherent text
    "--config.rollout.temperature=0.7",
    "--config.optimizer.lr=2e-5",
    "--config.eval.every_steps=12",
    "--config.eval.questions=12",
    "--config.eval.temperature=0.7",
  ]


def get_local():
  return {
    f"{arm}_on_{world}": [f"--config=configs/agentic.py:world={world},method={arm},local"]
    for world in WORLDS
    for arm in ARMS
  }
