"""Links and availability: what a round costs its users, and who answers.

All of it is NumPy on the host, around the compiled round, which needs to know
of none of it: a client that does not answer is one of weight zero without
examples, which every method leaves out, with its memory as it was.

A round of one client takes

  latency + 8 download_bytes / (1e6 download_mbits) + steps * seconds_per_step
  + latency + 8 upload_bytes / (1e6 upload_mbits)

seconds. Bytes are paid for by whoever got or sent them: a client that drops out
before the round has neither, one that drops out during it has downloaded. One
that comes too late for the deadline, or after enough others have answered, has
paid for its whole upload, though it counts for nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from fedjax_llm.federated import clients, draws

_MEGA = 1e6


class Link(NamedTuple):
  """The link and the speed of a client.

  Attributes:
    download_mbits: megabits, 1e6 bits, a second that it receives.
    upload_mbits: megabits a second that it sends; on most links of homes and
      phones 4 to 16 times fewer.
    latency_seconds: of each of the two messages.
    seconds_per_step: of a local step on a batch.
  """

  download_mbits: float
  upload_mbits: float
  latency_seconds: float = 0.0
  seconds_per_step: float = 0.0


class Outcome(NamedTuple):
  """What became of the clients of a cohort in a round; all bool [cohort].

  Attributes:
    selected: who was to take part: those of positive weight.
    started: who received the download.
    uploaded: who sent an answer, in time or not.
    answered: whose answer counts.
  """

  selected: Any
  started: Any
  uploaded: Any
  answered: Any

  def cohort(self, cohort: clients.Cohort) -> clients.Cohort:
    """The cohort, in which those that do not answer train nothing."""
    return cohort._replace(
      mask=cohort.mask & self.answered[:, None, None],
      weights=np.where(self.answered, cohort.weights, 0),
    )

  def sent(self, metrics: Mapping[str, Any], trainable: int) -> dict[str, int]:
    """Sums of a round's messages, of those that were really sent.

    Args:
      metrics: of the round, with sizes for the whole cohort.
      trainable: messages of fewer numbers than these are sparse ones.

    Returns:
      Bytes of each direction, of all messages and of the largest; how many
      numbers they hold; how many messages are sparse, with how many numbers.
    """
    sums = {"trainable": trainable, "sparse_messages": 0, "sparse_entries": 0}
    senders = {"download": self.started, "upload": self.uploaded}
    for direction, who in senders.items():
      nbytes = metrics[f"{direction}_bytes"][who].astype(np.int64)
      entries = metrics[f"{direction}_entries"][who].astype(np.int64)
      sparse = entries[entries < trainable]
      sums[f"{direction}_bytes"] = int(nbytes.sum())
      sums[f"{direction}_bytes_per_client"] = int(nbytes.max(initial=0))
      sums[f"{direction}_entries"] = int(entries.sum())
      sums["sparse_messages"] += sparse.size
      sums["sparse_entries"] += int(sparse.sum())
    return sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """The links of all clients, and how reliable these are.

  Attributes:
    tiers: of the clients.
    of_client: numbers of clients -> numbers of their tiers; None deals the
      tiers out in turn, client modulo tiers.
    dropout_before: chance in [0, 1] that a selected client is not there when
      the round starts.
    dropout_during: chance in [0, 1] that one that has started does not answer.
    deadline_seconds: the server waits no longer; None for as long as it takes.
    over_selection: at least 1; times as many clients are selected as are
      wanted, and the first to answer count (Bonawitz et al., 2019, arXiv
      1902.01046, selects 1.3 times as many).
    seed: of the dropouts, each drawn from (seed, round, client).
  """

  tiers: Sequence[Link]
  of_client: Callable[[Any], Any] | None = None
  dropout_before: float = 0.0
  dropout_during: float = 0.0
  deadline_seconds: float | None = None
  over_selection: float = 1.0
  seed: int

  def __post_init__(self):
    if not self.tiers:
      raise ValueError("Network expected at least one tier, got none.")
    for tier in self.tiers:
      if min(tier[:2]) <= 0 or min(tier[2:]) < 0:
        raise ValueError(
          f"Network expected tiers of positive Mbit/s and of seconds >= 0, got"
          f" {tier}."
        )
    for name in ("dropout_before", "dropout_during"):
      if not 0 <= (chance := getattr(self, name)) <= 1:
        raise ValueError(f"Network expected {name} in [0, 1], got {chance}.")
    if self.deadline_seconds is not None and self.deadline_seconds <= 0:
      raise ValueError(
        "Network expected deadline_seconds to be None or > 0, got"
        f" {self.deadline_seconds}."
      )
    if not 1 <= self.over_selection < math.inf:
      raise ValueError(
        f"Network expected over_selection >= 1, got {self.over_selection}."
      )

  @property
  def is_race(self) -> bool:
    """Whether it depends on the clients' times who of them counts."""
    return self.deadline_seconds is not None or self.over_selection > 1

  def round(
    self,
    advance: Callable[[Any, clients.Cohort], tuple[Any, Any]],
    state: Any,
    cohort: clients.Cohort,
    *,
    round_number: int,
    wanted: int,
  ) -> tuple[Any, Any, Outcome, float]:
    """Runs a round of those of a cohort that answer.

    Args:
      advance: (state, cohort) -> the next state and metrics on the host, those
        of a `rounds.FederatedAlgorithm`; may donate the state.
      state: before the round.
      cohort: who is selected; a weight of zero stands for nobody.
      round_number: names the draws.
      wanted: at most so many answers count.

    Returns:
      The next state, the metrics, in which messages have sizes that were not
      sent, the outcome, and the simulated seconds of the round.
    """
    sizes = lambda metrics: (metrics["download_bytes"], metrics["upload_bytes"])
    seconds = np.zeros(len(cohort.clients))
    if self.is_race:
      # Who answers depends on the sizes: those of a round of nobody, by the
      # same program, which trains nothing.
      nobody = np.zeros(len(cohort.clients), bool)
      nobody = Outcome(*[nobody] * 4).cohort(cohort)
      _, metrics = advance(jax.tree.map(jnp.copy, state), nobody)
      seconds = self.seconds(cohort, *sizes(metrics))
    outcome = self.outcome(
      cohort, seconds, round_number=round_number, wanted=wanted
    )
    state, metrics = advance(state, outcome.cohort(cohort))
    seconds = self.seconds(cohort, *sizes(metrics))
    waited = self.waited(outcome, seconds, wanted=wanted)
    return state, metrics, outcome, waited

  def selected(self, clients_per_round: int) -> int:
    """How many clients to select, where so many answers are wanted."""
    # Rounded, because 10 * 1.1 is a little more than 11.
    return math.ceil(round(clients_per_round * self.over_selection, 6))

  def seconds(
    self,
    cohort: clients.Cohort,
    download_bytes: Int[np.ndarray, " cohort"],
    upload_bytes: Int[np.ndarray, " cohort"],
  ) -> Float[np.ndarray, " cohort"]:
    """How long the round takes each client, from its start to its answer."""
    number = np.asarray(cohort.clients)
    of_client = self.of_client or (lambda client: client % len(self.tiers))
    tiers = np.array(self.tiers, float)[np.asarray(of_client(number))]
    download_mbits, upload_mbits, latency, step = tiers.T
    steps = cohort.mask.any(axis=2).sum(axis=1)
    return (
      latency
      + 8.0 * download_bytes / (_MEGA * download_mbits)
      + steps * step
      + latency
      + 8.0 * upload_bytes / (_MEGA * upload_mbits)
    )

  def outcome(
    self,
    cohort: clients.Cohort,
    seconds: Float[np.ndarray, " cohort"],
    *,
    round_number: int,
    wanted: int,
  ) -> Outcome:
    """Who takes part in a round, and how far they come.

    Arguments are those of `round`, and the `seconds` of each client. If more
    answer than are wanted, the first ones count; of two at the same time that
    of the client that stands first in the cohort.
    """
    selected = cohort.weights > 0
    present = self._present(round_number, cohort.clients)
    started = selected & present[:, 0]
    uploaded = started & present[:, 1]
    order = np.argsort(np.where(uploaded, seconds, np.inf), kind="stable")
    is_first = np.zeros_like(uploaded)
    is_first[order[:wanted]] = True
    in_time = seconds <= (self.deadline_seconds or math.inf)
    return Outcome(selected, started, uploaded, uploaded & is_first & in_time)

  def waited(
    self,
    outcome: Outcome,
    seconds: Float[np.ndarray, " cohort"],
    *,
    wanted: int,
  ) -> float:
    """When the server goes on: the simulated seconds of a round.

    That is with the last answer that counts; or at the deadline, if there is
    one and fewer have answered than are wanted and were selected. Without a
    deadline the server is taken to know at once who will not answer, so a
    round of which nobody does takes no time.
    """
    expected = min(wanted, outcome.selected.sum())
    if self.deadline_seconds and outcome.answered.sum() < expected:
      return self.deadline_seconds
    return float(seconds[outcome.answered].max(initial=0))

  def _present(
    self, round_number: int, numbers: Int[np.ndarray, " cohort"]
  ) -> Bool[np.ndarray, "cohort 2"]:
    """Whether each client is there, before the round and during it."""
    streams = [
      draws.generator(self.seed, draws.Purpose.DROPOUT, round_number, client)
      for client in numbers
    ]
    chances = np.array([self.dropout_before, self.dropout_during])[None]
    return np.array([rng.random(2) for rng in streams]) >= chances


# Everybody answers, at once.
IDEAL = Network(tiers=(Link(math.inf, math.inf),), seed=0)
