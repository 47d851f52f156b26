"""What a private run guarantees: epsilon, and its assumptions.

A guarantee says what is protected, how cohorts are sampled and how much noise
is added. `check` refuses runs that it does not cover; `describe` states it.
"""

import dataclasses
import math
from typing import Literal

from fedjax_llm.federated.privacy import accounting, mechanisms


@dataclasses.dataclass(frozen=True)
class ClientLevel:
  """Central differential privacy of whole clients, by a private mean.

  With "poisson" sampling, two populations are neighbours if one has one client
  more. With "fixed" sampling, a cohort of `clients_per_round` is drawn without
  replacement, and two populations of equal size are neighbours if one client
  has other data. Two clipped updates are up to two clip norms apart, so the
  same noise protects half as well.

  A sampled client that does not answer is covered: it adds nothing. A cohort in
  which one client's answer excludes another's is not covered, such as one that
  counts only the first answers (over-selection).

  Attributes:
    noise_multiplier: the noise multiplier of the private mean, >= 0.
    delta: the delta, in (0, 1 / population).
    sampling: how cohorts are drawn, see `data.cohorts.cohort_sampler`.
    population: the number of clients.
    clients_per_round: the expected number of clients in a round.
  """

  noise_multiplier: float
  delta: float
  sampling: Literal["poisson", "fixed"]
  population: int
  clients_per_round: int

  def __post_init__(self):
    """Refuses values out of range, or a missing dp-accounting."""
    accounting.library()
    mechanisms.check_noise(self.noise_multiplier)
    if self.sampling not in ("poisson", "fixed"):
      raise ValueError(
        f"expected sampling 'poisson' or 'fixed', got {self.sampling!r}."
      )
    if not 1 <= self.clients_per_round <= self.population:
      raise ValueError(
        "expected 1 <= clients_per_round <= population, got"
        f" {self.clients_per_round} of {self.population}."
      )
    if not 0 < self.delta < 1 / self.population:
      raise ValueError(
        f"expected delta in (0, 1 / {self.population}), got {self.delta}:"
        " publishing all data of one random client has a delta of 1 /"
        " population."
      )

  def epsilon(
    self, rounds: int, accountant: accounting.Accountant = "pld"
  ) -> float:
    """Returns epsilon at `delta` for all releases of `rounds` rounds, or inf.

    Raises:
      ValueError: if `rounds` is below 1 or the accountant unknown.
      ImportError: if dp-accounting is not installed.
    """
    if self.sampling == "poisson":
      epsilon = accounting.poisson_epsilon
    else:
      epsilon = accounting.fixed_size_epsilon
    return epsilon(
      self.population,
      self.clients_per_round,
      self.noise_multiplier,
      rounds,
      self.delta,
      accountant,
    )

  def check(
    self,
    sampling: str,
    clients_per_round: int,
    population: int,
    local_epochs: int | None = None,
  ) -> None:
    """Refuses a run whose sampling differs from the accounted one.

    Raises:
      ValueError: if anything differs.
    """
    del local_epochs  # A client sends one update, whatever its epochs.
    expected = (self.sampling, self.clients_per_round, self.population)
    got = (sampling, clients_per_round, population)
    if expected != got:
      raise ValueError(
        "expected a run with the (sampling, clients_per_round, population) that"
        f" its privacy is accounted for, {expected}, got {got}. Change the run,"
        " or the guarantee."
      )

  def describe(self, rounds: int) -> str:
    """Epsilon with all its assumptions, in a paragraph."""
    chosen, everyone = self.clients_per_round, self.population
    if self.sampling == "poisson":
      neighbours = "that differ by one client more or less"
      cohort = (
        "every client by itself with probability"
        f" {chosen}/{everyone} = {chosen / everyone:.3g} (Poisson)"
      )
    else:
      neighbours = f"of {everyone} clients, one of which has other data"
      cohort = f"{chosen} of {everyone} without replacement (fixed size)"
    return (
      f"Client-level differential privacy, {_bounds(self, rounds)}."
      f" Neighbouring: two populations {neighbours}. Each of {rounds} rounds"
      f" samples {cohort}. Updates are clipped, and their sum gets Gaussian"
      f" noise of standard deviation {self.noise_multiplier:.4g} clip norms."
      " Central: the server is trusted, which sees the updates and adds the"
      f" noise. Protected are the released models only, {_NOT_COVERED}."
    )


@dataclasses.dataclass(frozen=True)
class ExampleLevel:
  """Differential privacy of a client's examples, by `dp_sgd.local_update`.

  Two data sets of a client are neighbours if one example is replaced by
  nothing: its gradient is zero. The number of examples is public. In an epoch
  each example is in one batch, and the order of batches does not matter. So an
  epoch costs one Gaussian mechanism, however many steps it has. Shuffling is
  not counted as amplification: the bound for Poisson batches does not hold for
  it (Chua et al., "How Private are DP-SGD Implementations?", 2024).

  Attributes:
    noise_multiplier: the noise multiplier of the private training, >= 0.
    delta: the delta, in (0, 1); it should be well below 1 over the number of a
      client's examples.
    local_epochs: a client's passes over its examples in a round.
  """

  noise_multiplier: float
  delta: float
  local_epochs: int = 1

  def __post_init__(self):
    """Refuses values out of range, or a missing dp-accounting."""
    accounting.library()
    mechanisms.check_noise(self.noise_multiplier)
    if not 0 < self.delta < 1:
      raise ValueError(f"expected delta in (0, 1), got {self.delta}.")
    if self.local_epochs < 1:
      raise ValueError(f"expected local_epochs >= 1, got {self.local_epochs}.")

  def epsilon(
    self, rounds: int, accountant: accounting.Accountant = "pld"
  ) -> float:
    """Returns epsilon at `delta` for a client that is in `rounds` rounds.

    Raises:
      ValueError: if `rounds` is below 1 or the accountant unknown.
      ImportError: if dp-accounting is not installed.
    """
    passes = rounds * self.local_epochs
    return accounting.gaussian_epsilon(
      self.noise_multiplier, passes, self.delta, accountant
    )

  def check(
    self,
    sampling: str,
    clients_per_round: int,
    population: int,
    local_epochs: int | None = None,
  ) -> None:
    """Refuses a run with another number of passes, whatever its sampling.

    Raises:
      ValueError: if `local_epochs` differs, or is not given.
    """
    del sampling, clients_per_round, population
    if local_epochs != self.local_epochs:
      raise ValueError(
        f"expected a run with local_epochs={self.local_epochs}, for which its"
        f" privacy is accounted, got {local_epochs=}."
      )

  def describe(self, rounds: int) -> str:
    """Epsilon with all its assumptions, in a paragraph."""
    return (
      f"Example-level differential privacy, {_bounds(self, rounds)}, for a"
      f" client in all of {rounds} rounds. Neighbouring: two data sets of a"
      " client, in one of which an example (a row) is replaced by nothing; how"
      f" many it has is public. It takes each {self.local_epochs} times a"
      " round, in shuffled batches, for which no amplification is claimed."
      " Gradients of examples are clipped, and the sum of a batch gets Gaussian"
      f" noise of standard deviation {self.noise_multiplier:.4g} clip norms."
      " Local: nobody but the client is trusted. Protected are its updates"
      f" only, {_NOT_COVERED}."
    )


Guarantee = ClientLevel | ExampleLevel

_NOT_COVERED = (
  "not metrics such as the training loss, not what choosing hyperparameters or"
  " stopping a run says, and nothing from those who know the seed of the noise"
)


def noise_multiplier_for(
  target_epsilon: float,
  rounds: int,
  guarantee: Guarantee,
  accountant: accounting.Accountant = "pld",
) -> float:
  """Finds the least noise multiplier that keeps a guarantee within a budget.

  Args:
    target_epsilon: the budget, > 0 and finite.
    rounds: the number of rounds.
    guarantee: the guarantee; its own noise multiplier is not used.
    accountant: "pld" or "rdp".

  Returns:
    A multiplier whose epsilon is at most the target. It is at most 0.1 % larger
    than necessary.

  Raises:
    ValueError: if the target is out of range.
  """
  if not 0 < target_epsilon < math.inf:
    raise ValueError(f"expected {target_epsilon=} to be > 0 and finite.")

  def is_enough(multiplier):
    noisy = dataclasses.replace(guarantee, noise_multiplier=multiplier)
    return noisy.epsilon(rounds, accountant) <= target_epsilon

  high = 1.0
  while not is_enough(high):
    high *= 2
  low = high / 2
  while is_enough(low):
    low, high = low / 2, low
  while high > 1.001 * low:
    middle = math.sqrt(low * high)
    low, high = (low, middle) if is_enough(middle) else (middle, high)
  return high


def _bounds(guarantee, rounds):
  """Returns epsilon by both accountants, and delta, as text."""
  pld, rdp = (guarantee.epsilon(rounds, name) for name in ("pld", "rdp"))
  return (
    f"epsilon = {pld:.4g} by PLD ({rdp:.4g} by RDP) at delta ="
    f" {guarantee.delta:.3g}"
  )
