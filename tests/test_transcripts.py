"""Episodes from Python: what a person reads of them is what was played."""

import pytest

from sdpo_jax import main, transcripts
from sdpo_jax.data.chat import Chat
from sdpo_jax.envs.agents.household import Household
from sdpo_jax.errors import SettingError
from sdpo_jax.records import Completion, Feedback, Rollout, Segment, Status, Turn
from tests import fakes

CHAT = Chat(fakes.ByteTokenizer(), thinking=False, eos_ids=(257,))


def played(answers, end, feedback):
  """An episode of two turns of the policy."""
  segments = []
  for number, text in enumerate(("go", "no")):
    tokens = [*CHAT.text_tokens(text), 257]
    segments.append(
      Segment(3 * number, Completion((0, 0, number), 0, tokens, [-1.0, -2.0, -3.0], "stop"))
    )
  task = Household().task("heldout", 0)
  tokens = [token for segment in segments for token in segment.completion.tokens]
  return Rollout(task, [1], tokens, [], end, "", feedback, sampled=segments, turns=answers)


def test_turns_are_what_was_said():
  answers = [Turn("You arrive.", 0.25, False), Turn("Nothing happens.", 0.5, True, valid=False)]
  episode = transcripts.transcript(played(answers, "done", Feedback(0.5, "")), "A task.", CHAT)
  first, second = episode.turns
  assert first.message == "go" and first.tokens[:2] == ["g", "o"] and first.logp == [-1, -2, -3]
  assert [turn.observation for turn in episode.turns] == ["You arrive.", "Nothing happens."]
  assert [turn.reward for turn in episode.turns] == [0.25, 0.5]
  assert first.valid and not second.valid
  assert str(episode) == (
    "A task.\n\n> go\nYou arrive.\n> no\nNothing happens.\n\nend: done, reward 0.5"
  )


def test_a_world_that_did_not_answer_leaves_the_last_turn_open():
  lost = Feedback(0.0, "no answer", Status.ENV_FAILED)
  episode = transcripts.transcript(played([Turn("Yes.", 1.0, False)], "lost", lost), "", CHAT)
  assert episode.turns[-1].observation is None and not episode.turns[-1].valid
  assert episode.turns[-1].reward == 1.0 and episode.reward == 0.0
  assert str(episode).endswith("Yes.\n> no\n\nend: lost, reward 0")


def settings(config, *more):
  return main.parse(["main", f"--config={config}", "--config.mesh.fsdp=1", *more])[1]


def test_the_tiny_model_is_played_and_says_the_same_again():
  c = settings("configs/agentic.py:local")
  first, again = (transcripts.play(c, tasks=2, episodes=2) for _ in range(2))
  assert len(first) == 4 and first[0].task == first[1].task != first[2].task
  assert [str(episode) for episode in first] == [str(episode) for episode in again]
  for episode in first:
    assert "Your task is to:" in episode.prompt and episode.end in ("done", "budget")
    assert 1 <= len(episode.turns) <= 10 and episode.turns[-1].reward == episode.reward
    for turn in episode.turns:
      assert len(turn.tokens) == len(turn.logp) and all(logp <= 0 for logp in turn.logp)


def test_an_environment_that_judges_is_refused_in_a_line():
  with pytest.raises(SettingError, match="config.env.name='tinycode' judges single responses"):
    transcripts.play(settings("configs/tinycode.py:local"))
