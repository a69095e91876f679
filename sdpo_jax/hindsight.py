"""Has the policy write in hindsight what should have gone otherwise in its episodes. Host side.

The prompt holds the task, all turns of the episode with their numbers, and the outcome. It is
rendered as a teacher's prompt is, and an episode that is too long for it loses its middle, visibly.
The answer is sampled with the engine and the weights of the episode, is judged by nobody and not
trained on. `objectives/contexts_hindsight.py` reads it, when the batch is packed.

Multi-host: every process sees the same groups and calls the engine alike.
"""

import dataclasses

from sdpo_jax.alternatives import charge
from sdpo_jax.data.teacher_prompt import teacher_prompt
from sdpo_jax.errors import TaskError
from sdpo_jax.objectives.contexts_hindsight import Hindsight, read_hints
from sdpo_jax.objectives.teacher_context import without_thinking
from sdpo_jax.records import Ratio, Request, Rollout, Sampling
from sdpo_jax.rollout import Source, prompt_seed, sample


@dataclasses.dataclass(frozen=True)
class Reflector:
  """Gives episodes what the policy writes of them; made once per run.

  max_prompt_tokens: of the prompt that asks for it.
  """

  context: Hindsight
  player: Source
  seed: int
  max_prompt_tokens: int

  def explore(
    self, params, groups: list[list[Rollout]], *, sampling: Sampling, step: int
  ) -> dict[str, Ratio | float]:
    """Sets `reflection`, `extra_tokens` and `extra_calls` of every judged episode.

    Returns metrics of the step.
    """
    episodes = [r for group in groups for r in group if r.is_judged and r.turns]
    sampling = dataclasses.replace(sampling, max_new_tokens=self.context.hint_tokens, entropy=False)
    requests, shortened = [], 0
    for number, episode in enumerate(episodes):
      prompt, was_shortened = self._prompt(episode)
      seed = prompt_seed(self.seed, "hindsight", step, number)
      requests += [Request(number, prompt, 1, sampling, seed)] if prompt else []
      shortened += was_shortened
    engine, chat = self.player.engine, self.player.chat
    engine.load(params, step - 1)
    for completion in sample(engine, requests):
      episode = episodes[completion.key]
      episode.reflection = chat.response_text(completion.tokens, teacher=True)
      charge(episode, tokens=len(completion.tokens), calls=1)
    engine.unload()
    return measure(episodes) | {
      "hindsight/shortened": float(shortened),
      "hindsight/not_asked": float(len(episodes) - len(requests)),
    }

  def _prompt(self, episode: Rollout) -> tuple[list[int], bool]:
    """Returns the prompt, and whether the episode was shortened; [] where there is no room."""
    chat = self.player.chat
    said = [chat.response_text(segment.completion.tokens) for segment in episode.sampled]
    context = self.context.reflect_on(episode, [without_thinking(text).strip() for text in said])
    messages = self.player.env.prompt(episode.task)
    try:
      return teacher_prompt(chat, messages, context, self.max_prompt_tokens)
    except TaskError:  # the words around the episode take more
      return [], False


def measure(episodes: list[Rollout]) -> dict[str, Ratio]:
  """Returns how much of what the policy wrote of episodes is of use.

  hint_share: turns with a hint. parse_failures: answers without any JSON. refused: entries of JSON
  that are no hint.
  """
  asked = [episode for episode in episodes if episode.reflection is not None]
  read = [read_hints(episode.reflection, len(episode.turns)) for episode in asked]
  hints, refused = sum(len(x.of) for x in read), sum(x.refused for x in read)
  return {
    "hindsight/hint_share": Ratio(hints, sum(len(episode.turns) for episode in episodes)),
    "hindsight/parse_failures": Ratio(sum(not x.has_json for x in read), len(read)),
    "hindsight/refused": Ratio(refused, hints + refused),
  }
