"""The tiny base models that come with the package: their tokenizers are the ones that the corpus builds, and hindsight helps them."""

import dataclasses

import pytest

from sdpo_jax.config import MODELS
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.corpus import DOMAINS, Mixture, build_tokenizer
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.pretrain import accuracy
from sdpo_jax.sampler import Sampler


@pytest.mark.parametrize("name, path, alone, feedback", [("tinycode", "tiny", (0.05, 0.20), (0.30, 0.55)), ("arithmetic", "tiny_arithmetic", (0.01, 0.15), (0.50, 0.75))])
def test_hindsight_helps(name, path, alone, feedback):
  """Ranges that hold the shares over 256 problems in configs/pretrain_tiny.py, and what 128 of them may differ by."""
  tokenizer, (domain, _) = load_tokenizer(MODELS[path]), DOMAINS[name]
  assert tokenizer.get_vocab() == build_tokenizer(name).get_vocab()
  model, params = load_pretrained(MODELS[path], dtype="float32")
  chat = Chat(tokenizer)
  solved = accuracy(params, model, chat, domain, dataclasses.asdict(Mixture()), questions=128, max_new_tokens=28,
                    sampler=Sampler(model, rows=128, prompt_multiple=32, chunk=64, pad_token=chat.pad_token))
  assert alone[0] <= solved["eval/plain"] <= alone[1] and feedback[0] <= solved["eval/feedback"] <= feedback[1] and solved["eval/solution"] >= 0.98, solved
