"""Links and availability: what a round costs its users, and who answers.

All of it is NumPy on the host, around the compiled round. A client that does
not answer gets weight zero and no examples, so every method leaves it out and
does not change its memory.

A round of one client takes

  latency + 8 download_bytes / (1e6 download_mbits) + steps * seconds_per_step
  + latency + 8 upload_bytes / (1e6 upload_mbits)

seconds. Bytes count if they were really received or sent. A client that drops
out before the round has no bytes; one that drops out during the round has
downloaded. A client that answers after the deadline, or after enough others,
has also uploaded, although its answer does not count.
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
    download_mbits: the megabits (1e6 bits) per second that it receives.
    upload_mbits: the megabits per second that it sends; mostly 4 to 16 times
      fewer at homes and on phones.
    latency_seconds: the latency of each of the two messages.
    seconds_per_step: the time of a local step on a batch.
  """

  download_mbits: float
  upload_mbits: float
  latency_seconds: float = 0.0
  seconds_per_step: float = 0.0


class Outcome(NamedTuple):
  """What the clients of a cohort did in a round; all bool [cohort].

  Attributes:
    selected: the selected clients: those of positive weight.
    started: the clients that received the download.
    uploaded: the clients that sent an answer, in time or not.
    answered: the clients whose answer counts.
  """

  selected: Any
  started: Any
  uploaded: Any
  answered: Any

  def cohort(self, cohort: clients.Cohort) -> clients.Cohort:
    """Returns the cohort, where clients that do not answer train nothing."""
    return cohort._replace(
      mask=cohort.mask & self.answered[:, None, None],
      weights=np.where(self.answered, cohort.weights, 0),
    )

  def sent(self, metrics: Mapping[str, Any], trainable: int) -> dict[str, int]:
    """Adds up the round's messages that were really sent.

    Args:
      metrics: the round's metrics, with sizes for the whole cohort.
      trainable: the number of trainable parameters; a message with fewer
        entries is sparse.

    Returns:
      For each direction: the bytes of all messages, the bytes of the largest
      one, and the entries of all. For both together: the number of sparse
      messages, and their entries.
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
  """The links of all clients, and how reliable the clients are.

  Attributes:
    tiers: the link of each tier.
    of_client: a function from client numbers to tier numbers. If not given,
      client i is in tier i modulo tiers.
    dropout_before: the chance in [0, 1] that a selected client is absent when
      the round starts.
    dropout_during: the chance in [0, 1] that a client that has started does not
      answer.
    deadline_seconds: how long the server waits; None for no limit.
    over_selection: the ratio of selected clients to wanted answers, at least 1;
      the first answers count (Bonawitz et al., 2019, arXiv 1902.01046, select
      1.3 clients for each wanted answer).
    seed: the seed of the dropouts, each drawn from (seed, round, client).
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

  def describe(self, population: int) -> dict[str, Any]:
    """Returns all settings as JSON values, to tell networks apart.

    Args:
      population: the number of clients, whose tiers are listed.
    """
    fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
    return fields | {
      "tiers": [list(link) for link in self.tiers],
      "of_client": self._tiers_of(np.arange(population)).tolist(),
    }

  def round(
    self,
    advance: Callable[[Any, clients.Cohort], tuple[Any, Any]],
    state: Any,
    cohort: clients.Cohort,
    *,
    round_number: int,
    wanted: int,
  ) -> tuple[Any, Any, Outcome, float]:
    """Runs a round with the clients of a cohort that answer.

    Args:
      advance: (state, cohort) -> the next state, and the metrics of a
        `rounds.FederatedAlgorithm` on the host; may donate the state.
      state: the state before the round.
      cohort: the selected clients; one of weight zero is not selected.
      round_number: the number of the round, which names the draws.
      wanted: the largest number of answers that count.

    Returns:
      The next state; the metrics, which also have sizes of messages that were
      not sent; the outcome; and the simulated seconds of the round.

    Raises:
      ValueError: if a weight of the cohort is negative or not finite.
    """
    clients.check_cohort(cohort)
    sizes = lambda metrics: (metrics["download_bytes"], metrics["upload_bytes"])
    seconds = np.zeros(len(cohort.clients))
    if self.deadline_seconds is not None or self.over_selection > 1:
      # Which answers count depends on the sizes of the messages. To get them,
      # the same program runs with an empty cohort, which trains nothing.
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
    """Returns how many clients to select for `clients_per_round` answers."""
    # Rounded, because 10 * 1.1 is a little more than 11.
    return math.ceil(round(clients_per_round * self.over_selection, 6))

  def seconds(
    self,
    cohort: clients.Cohort,
    download_bytes: Int[np.ndarray, " cohort"],
    upload_bytes: Int[np.ndarray, " cohort"],
  ) -> Float[np.ndarray, " cohort"]:
    """Returns the seconds from the round's start to each client's answer."""
    links = np.array(self.tiers, float)[self._tiers_of(cohort.clients)]
    download_mbits, upload_mbits, latency, step = links.T
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
    """Draws which clients of a round drop out, and whose answers count.

    Arguments are those of `round`, and the `seconds` of each client. If more
    clients answer than are wanted, the first count; ties go to the client that
    comes first in the cohort.
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
    """Returns the simulated seconds until the server goes on.

    The server goes on after the last answer that counts. If there is a deadline
    and too few clients have answered, it goes on at the deadline. Without a
    deadline it knows at once who will not answer, so a round without answers
    takes no time.
    """
    expected = min(wanted, outcome.selected.sum())
    if self.deadline_seconds and outcome.answered.sum() < expected:
      return self.deadline_seconds
    return float(seconds[outcome.answered].max(initial=0))

  def _tiers_of(self, numbers: Any) -> Any:
    """Returns the tier numbers of clients, given their numbers."""
    of_client = self.of_client or clients.in_turn(len(self.tiers))
    return np.asarray(of_client(np.asarray(numbers)))

  def _present(
    self, round_number: int, numbers: Int[np.ndarray, " cohort"]
  ) -> Bool[np.ndarray, "cohort 2"]:
    """Draws whether each client is present before the round, and during it."""
    streams = [
      draws.generator(self.seed, draws.Purpose.DROPOUT, round_number, client)
      for client in numbers
    ]
    chances = np.array([self.dropout_before, self.dropout_during])[None]
    return np.array([rng.random(2) for rng in streams]) >= chances


# Three tiers of clients whose upload is 16, 8 and 4 times slower than their
# download.
ASYMMETRIC = (
  Link(4, 0.25, 0.1, 0.2),
  Link(16, 2, 0.05, 0.1),
  Link(64, 16, 0.02, 0.05),
)
# Every client answers at once.
IDEAL = Network(tiers=(Link(math.inf, math.inf),), seed=0)
