"""Experiment trackers beside TensorBoard: Weights & Biases and MLflow.

A tracker is fed by a process of its own, which follows the files of the work directory: it reads
metrics.jsonl as it grows, and the rollout files beside it. The training loop calls nothing. So a
tracker that raises, hangs or crashes costs the run nothing but one line on stderr, and what it
missed can be sent later from the same files:

  python -m sdpo_jax.trackers --workdir=runs/A --tracker=wandb

  sinks.py     what is sent where: one class a tracker
  __main__.py  the process: follows a run, or replays one that has ended
  child.py     starts the processes beside a run and ends them; process 0 alone has them

A tracker's files are in WORKDIR/trackers: NAME.json (the run's id there, and the last step that it
has), NAME.log (what its package prints), and what it stores by itself while it is offline.
"""
