"""The losses and metrics of language models and classifiers."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

from fedjax_llm.evaluation import classification as classification_metrics
from fedjax_llm.evaluation import likelihood
from fedjax_llm.models import classification, language


class Objective(NamedTuple):
  """Makes the functions that train and evaluate a network.

  Attributes:
    loss_fn: network -> fn(trainable, frozen, examples, mask, key), the loss of
      a batch.
    score_fn: network -> fn(trainable, frozen, examples), the scores of a batch
      that `evaluator` needs.
    evaluator: (score function, rows) -> fn(trainable, frozen), the metrics.
  """

  loss_fn: Callable[..., Any]
  score_fn: Callable[..., Any]
  evaluator: Callable[..., Any]

  def of_all_parameters(self) -> Self:
    """Returns the objective for full fine-tuning, without an adapter."""

    def loss_fn(network):
      loss = self.loss_fn(network)
      return lambda params, _, *arguments: loss({}, params, *arguments)

    def score_fn(network):
      score = self.score_fn(network)
      return lambda params, _, examples: score(None, params, examples)

    return self._replace(loss_fn=loss_fn, score_fn=score_fn)


LANGUAGE = Objective(language.loss_fn, language.score_fn, likelihood.evaluator)
CLASSIFICATION = Objective(
  classification.loss_fn,
  classification.score_fn,
  classification_metrics.evaluator,
)
