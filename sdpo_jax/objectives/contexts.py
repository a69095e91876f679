"""The table of teacher contexts: what the teacher may read and the policy does not. Host code."""

from sdpo_jax.objectives.contexts_agents import LaterObservations, Skill, TurnWords
from sdpo_jax.objectives.contexts_hindsight import Hindsight
from sdpo_jax.objectives.contexts_outcome import Drift, RephraseOrHint
from sdpo_jax.objectives.contexts_peers import Peers
from sdpo_jax.objectives.contexts_pmi import QuestionAndReference
from sdpo_jax.objectives.teacher_context import (
  FeedbackOrSolution,
  Instruction,
  NoTeacher,
  QuestionAlone,
  ReferenceSolution,
  SolutionAndVerdict,
)

TEACHER_CONTEXTS = {
  "none": NoTeacher,
  "question_alone": QuestionAlone,
  "feedback_or_solution": FeedbackOrSolution,
  "reference_solution": ReferenceSolution,
  "solution_and_verdict": SolutionAndVerdict,
  "instruction": Instruction,
  "peers": Peers,
  "drift": Drift,
  "rephrase_or_hint": RephraseOrHint,
  "pmi": QuestionAndReference,
  "skill": Skill,
  "turn_words": TurnWords,
  "later_observations": LaterObservations,
  "hindsight": Hindsight,
}
