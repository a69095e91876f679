"""Tokenizers of bytes with the special tokens and the chat templates of the families.

Templates have the form of the released ones, without their branches for tools.
"""

import tokenizers
import transformers

TURN = "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'"
HEADER = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
QWEN25 = (
  "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are Qwen, created by "
  "Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
  "{%- for message in messages %}{{- " + TURN + " }}{%- endfor %}" + HEADER + "{%- endif %}"
)
# It drops the thoughts of turns before the last question, and writes an empty one into the header
# where thinking is off.
QWEN3 = (
  "{%- set ns = namespace(last=messages|length - 1, waits=true) %}"
  "{%- for message in messages[::-1] %}{%- if ns.waits and message.role == 'user' %}"
  "{%- set ns.waits = false %}{%- set ns.last = messages|length - 1 - loop.index0 %}"
  "{%- endif %}{%- endfor %}"
  "{%- for message in messages %}{%- set content = message.content %}"
  "{%- if message.role != 'assistant' %}{{- " + TURN + " }}{%- else %}{%- set thought = '' %}"
  "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0]"
  ".rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
  "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
  "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<|im_start|>assistant\\n<think>"
  "\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
  "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}"
  "{%- endif %}{%- endfor %}" + HEADER + "{%- if enable_thinking is defined and "
  "enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
LLAMA3 = (  # 3.1 and later; they put the day of the rendering where this has a date
  "{{- bos_token }}{%- set system = '' %}{%- if messages[0].role == 'system' %}"
  "{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}{%- endif %}"
  "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n"
  "Today Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}"
  "{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>"
  "\\n\\n' + message.content | trim + '<|eot_id|>' }}{%- endfor %}"
  "{%- if add_generation_prompt %}"
  "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


def olmo3(header: str) -> str:
  """The last message ends with the end of the text where it is the assistant's."""
  return (
    "{%- if not messages|selectattr('role', 'equalto', 'system')|list|length %}"
    "{{- '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' + message.content }}{%- if not loop.last %}"
    "{{- '<|im_end|>' + '\\n' }}{%- else %}{{- eos_token }}{%- endif %}"
    "{%- else %}{{- "
    + TURN
    + " }}{%- endif %}{%- if loop.last and add_generation_prompt %}{{- '"
    + header
    + "' }}"
    "{%- endif %}{%- endfor %}"
  )


# (special tokens, of which the first ends a text and the second begins one; template)
FAMILIES = {
  "qwen2.5": (("<|im_end|>", "<|endoftext|>", "<|im_start|>"), QWEN25),
  "qwen3": (("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>", "</think>"), QWEN3),
  "llama3": (
    ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    LLAMA3,
  ),
  "olmo3": (("<|endoftext|>", "<|im_end|>", "<|im_start|>"), olmo3("<|im_start|>assistant\\n")),
  "olmo3 think": (
    ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    olmo3("<|im_start|>assistant\\n<think>"),
  ),
}
END = {"llama3": "<|eot_id|>"}  # what ends a turn; elsewhere <|im_end|>


def tokenizer(name: str, template: str | None = None, merges=()):
  """A fast tokenizer: one token a byte, but for merges of two characters of the byte alphabet.

  template: instead of the family's own.
  """
  special, own = FAMILIES[name]
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  pieces = [*alphabet, *("".join(pair) for pair in merges)]
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges)))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  thinks = [token for token in special if "think" in token]  # added, but not special ones
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    eos_token=special[0],
    bos_token=special[1],
    additional_special_tokens=[token for token in special[1:] if token not in thinks],
    clean_up_tokenization_spaces=False,
  )
  fast.add_tokens(thinks)
  fast.chat_template = own if template is None else template
  return fast


def end_of_turn(name: str, fast) -> int:
  """The token that ends a turn, which a checkpoint's generation config names."""
  return fast.convert_tokens_to_ids(END.get(name, "<|im_end|>"))
