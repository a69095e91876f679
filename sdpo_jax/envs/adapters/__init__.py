"""Environments that were written for other trainers, as environments of this one.

Each is named like one's own, as in `config.env.name="sdpo_jax.envs.adapters.gym:GymText"`:

  gym:GymText                 reset and step on text, as Gymnasium has them
  trl:TRLTools                a class for TRL's `environment_factory`
  openenv:OpenEnvText         a server of OpenEnv
  verifiers:Verifiers         an environment of verifiers, up to its version 0.3
  reasoning_gym:ReasoningGym  a generator of reasoning-gym; it judges single responses

They add what those trainers drop: what the world says to each turn is kept as feedback, which a
teacher may read. What a foreign world raises, and a turn in which it hangs, cost one episode.
"""
