"""Balances: how much the token signal counts where it is added to the surrogate.

Without one, `policy_share` blends the two. With one the loss is

  surrogate + lambda signal + mu reference KL,

where the surrogate counts whole, as `policy_share` 1 says.

  fixed     lambda is a constant of the program; mu is the coefficient of the reference KL
  contrast  both follow the share of tokens whose credit c is strong (CRAFT, arXiv 2606.29476,
            pillar 2): the more of them, the more the signal counts, and the less the reference KL
"""

from typing import Any, Protocol

import jax

from sdpo_jax.objectives.control import Controller, Facts
from sdpo_jax.objectives.cti import CREDIT

# of objectives/loss.py: tokens with |c| above `contrast.strong`, among all that are scored
STRONG = "train/contrast_strong"


class Balance(Protocol):
  """What a part of this axis is."""

  def signal(self, control: dict[str, jax.Array]) -> float | jax.Array:
    """Returns lambda. control: as in `TrainBatch`."""

  def reference(self, control: dict[str, jax.Array]) -> float | jax.Array | None:
    """Returns mu; None: it is the reference KL's own coefficient."""


def none() -> None:
  """Blends surrogate and token signal by policy_share."""


class Fixed:
  """Counts the signal by a constant.

  share: lambda.
  """

  def __init__(self, *, share: float = 0.01):
    self._share = share

  def signal(self, control: dict[str, jax.Array]) -> float:
    return self._share

  def reference(self, control: dict[str, jax.Array]) -> None:
    return None


class ByContrast:
  """Moves weight between the signal and the reference KL, one step late.

  With rho a moving average of the share of tokens whose credit is strong, lambda = least + width
  rho and mu = least + width (1 - rho). The paper's target for rho has no formula and is left out.
  rho is an input of the program (`control`), so that a change of it compiles nothing.

  With two-valued rewards nearly every token of a group with both outcomes is strong (`cti.py`). rho
  is then the share of tokens in such groups: it measures the difficulty of the questions.

  least, width: of lambda and of mu.
  rho: at the start. hold: so many batches it stays there. decay: of the average, a batch.
  """

  reads = (CREDIT,)

  def __init__(
    self,
    *,
    least: float = 0.005,
    width: float = 0.015,
    rho: float = 0.5,
    hold: int = 10,
    decay: float = 0.95,
  ):
    self._least, self._width = least, width
    self._rho, self._hold, self._decay = rho, hold, decay

  def controller(self) -> Controller:
    return StrongShare(self, rho=self._rho, hold=self._hold, decay=self._decay)

  def signal(self, control: dict[str, jax.Array]) -> jax.Array:
    return self.coefficients(control["balance"])[0]

  def reference(self, control: dict[str, jax.Array]) -> jax.Array:
    return self.coefficients(control["balance"])[1]

  def coefficients(self, rho: Any) -> tuple[Any, Any]:
    """Returns (lambda, mu) for the share of strong tokens, a number or an array."""
    return self._least + self._width * rho, self._least + self._width * (1.0 - rho)


class StrongShare:
  """Averages the share of tokens whose credit is strong, over the batches of a run.

  Decided here: a batch counts if the step has said something of it, and its last gradient was
  finite. What it says is seen by the next batch.
  """

  def __init__(self, balance: ByContrast, *, rho: float, hold: int, decay: float):
    self._balance, self._hold, self._decay = balance, hold, decay
    self._rho, self._batches = float(rho), 0

  def begin(self, facts: Facts) -> tuple[float, dict[str, float]]:
    signal, reference_kl = self._balance.coefficients(self._rho)
    return self._rho, {"control/signal": signal, "control/reference_kl": reference_kl}

  def end(self, metrics: dict[str, Any], *, applied: bool) -> None:
    share = metrics[STRONG].mean
    if share is None or not applied:
      return
    self._batches += 1
    if self._batches > self._hold:
      self._rho = self._decay * self._rho + (1.0 - self._decay) * share

  def state(self) -> dict:
    return {"rho": self._rho, "n": self._batches}

  def restore(self, state: dict) -> None:
    self._rho, self._batches = state["rho"], state["n"]


BALANCES = {"none": none, "fixed": Fixed, "contrast": ByContrast}
