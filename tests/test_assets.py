"""The tiny base models that come with the package: their tokenizers are the ones that the corpus builds, and hindsight helps them."""

import dataclasses

import pytest

from sdpo_jax.config import MODELS
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.data.corpus import DOMAINS, Mixture, build_tokenizer
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.pretrain import accuracy
from sdpo_jax.sampler import Sampler

ASSETS = [   # domain, model, what it solves: ranges that hold the shares over 256 problems in configs/pretrain_tiny.py, and what 128 of them may differ by
    ("tinycode", "tiny", dict(plain=(0.05, 0.20), feedback=(0.30, 0.55), solution=(0.98, 1.0))),
    ("tinycode", "tiny_notes", dict(plain=(0.03, 0.20), feedback=(0.28, 0.52), solution=(0.97, 1.0), notes=(0.28, 0.52), imagine_verdict=(0.70, 0.95))),
    ("arithmetic", "tiny_arithmetic", dict(plain=(0.01, 0.15), feedback=(0.50, 0.75), solution=(0.98, 1.0), notes=(0.60, 0.90), imagine_verdict=(0.60, 1.0))),
]


@pytest.mark.parametrize("name, path, ranges", ASSETS, ids=[path for _, path, _ in ASSETS])
def test_hindsight_helps(name, path, ranges):
  tokenizer, (domain, _) = load_tokenizer(MODELS[path]), DOMAINS[name]
  assert tokenizer.get_vocab() == build_tokenizer(name).get_vocab()
  model, params = load_pretrained(MODELS[path], dtype="float32")
  chat, reads = Chat(tokenizer), 1.0 if "notes" in ranges else 0.0
  solved = accuracy(params, model, chat, domain, dataclasses.asdict(Mixture(notes=reads, imagine=reads)), questions=128, max_new_tokens=28,
                    sampler=Sampler(model, rows=128, prompt_multiple=128, chunk=64, pad_token=chat.pad_token))
  for view, (lowest, highest) in ranges.items():
    assert lowest <= solved[f"eval/{view}"] <= highest, solved
