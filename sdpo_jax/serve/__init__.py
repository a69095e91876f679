"""A small server over the local engine: OpenAI's routes, with ids and log-probabilities.

  GET  /health               200 while the engine runs; needs no token
  GET  /v1/models            the one model that is served
  POST /v1/completions       prompt: a text, or a list of ids
  POST /v1/chat/completions  messages, through the checkpoint's own template

Fields have the names that OpenAI and vLLM give them (`fields.py` lists them); a field that is not
there is refused with its name, never ignored. Ours alone are

  prompt_logprob_ids    one list of ids for each of the prompt's last positions
  prompt_id_logprobs    of the answer: a list of log-probabilities for each of these lists
  prompt_token_logprobs of the answer: that of the prompt's own token at each of these positions

Every log-probability, of the prompt and of what was sampled, is at the request's temperature (at
temperature 0, as at 1), over the whole vocabulary, before cuts and biases. vLLM's are by default
those of the raw logits, that is of temperature 1 (`--logprobs-mode raw_logprobs`).

max_tokens=0 samples nothing: it is for requests that only ask about their prompt.
"""
