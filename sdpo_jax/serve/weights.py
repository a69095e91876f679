"""Loads what is served: the policy of a run's checkpoint, or a model with its weights."""

import dataclasses

import jax

from sdpo_jax.config import MODELS, model_location, model_of_run
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.evaluation.evaluate import find_model
from sdpo_jax.export import policy_of_run
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.session import Loaded, check_tokens


def load_checkpoint(source: str, dtype: str | None) -> Loaded:
  """Loads WORKDIR[:step], a Hugging Face directory, or a model with a short name.

  dtype: of weights and products; None: the run's own, or float32. ValueError or OSError of one line
  for what cannot be read.
  """
  found = None if source in MODELS else find_model(source)
  if found is None or found.step is None:
    path = model_location(source)
    model, params = load_pretrained(path, dtype=dtype or "float32")
  else:
    path, model, params = policy_of_run(found.root, found.step)
    model = dataclasses.replace(model, dtype=model_of_run(found.root)["dtype"])
  if dtype is not None:
    model = dataclasses.replace(model, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
  chat = Chat(load_tokenizer(path), eos_ids=model.eos_ids)
  check_tokens(chat, model, path)
  return Loaded(model, params, chat)
