"""Pre-training of a small base model, in one process.

It made the model that the package ships. A round is a fixed number of optimizer
steps, so a pre-training run is recorded, checkpointed and resumed like any
other experiment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.data import batches
from fedjax_llm.evaluation import likelihood
from fedjax_llm.experiments import programs, runner
from fedjax_llm.federated import draws
from fedjax_llm.models import decoder, language, pretrained

if TYPE_CHECKING:
  import transformers

_START = "<|endoftext|>"


def train_tokenizer(
  texts: Sequence[str], vocabulary: int, context: int
) -> transformers.PreTrainedTokenizerFast:
  """Trains a byte-level BPE tokenizer that adds `<|endoftext|>` before a text.

  Args:
    texts: texts to train on.
    vocabulary: number of tokens, at least 257.
    context: context length of the model, recorded in the tokenizer.

  Raises:
    ValueError: if the vocabulary is too small for all bytes.
  """
  import tokenizers
  import transformers
  from tokenizers import (
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
  )

  if vocabulary < 257:
    raise ValueError(
      f"expected vocabulary >= 257, all bytes and the start, got {vocabulary=}."
    )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=vocabulary,
      special_tokens=[_START],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{_START} $A",
    special_tokens=[(_START, tokenizer.token_to_id(_START))],
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=_START,
    eos_token=_START,
    model_max_length=context,
  )


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long and how fast to train.

  Attributes:
    steps: number of optimizer steps.
    steps_per_round: optimizer steps in a round, which has one line in the log.
    batch_size: rows in a step.
    rows_at_once: rows whose gradients are computed together, a divisor of
      `batch_size`. On a CPU a few rows are fastest, because they fit in caches.
    learning_rate: the largest learning rate, reached after `warmup` steps; a
      cosine decay ends at a tenth of it.
    warmup: steps of linear warm-up.
    weight_decay: weight decay of AdamW, for all parameters but norm scales.
    clip: largest global norm of a gradient.
    seed: seed of the initial parameters and of the order of rows.
  """

  steps: int
  steps_per_round: int
  batch_size: int
  rows_at_once: int
  learning_rate: float
  warmup: int
  weight_decay: float = 0.1
  clip: float = 1.0
  seed: int = 0

  def __post_init__(self):
    for name in ("steps", "steps_per_round", "batch_size", "rows_at_once"):
      if getattr(self, name) < 1:
        raise ValueError(f"expected {name} >= 1, got {self}.")
    for whole, part in (
      ("steps", "steps_per_round"),
      ("batch_size", "rows_at_once"),
    ):
      if getattr(self, whole) % getattr(self, part):
        raise ValueError(f"expected {part} to divide {whole}, got {self}.")
    if not 0 <= self.warmup < self.steps:
      raise ValueError(f"expected warmup from 0 to below steps, got {self}.")

  def optimizer(self) -> optax.GradientTransformation:
    """Returns AdamW with warm-up, cosine decay and clipping."""
    rate = optax.warmup_cosine_decay_schedule(
      0.0,
      self.learning_rate,
      self.warmup,
      self.steps,
      end_value=self.learning_rate / 10,
    )
    matrices = lambda params: jax.tree.map_with_path(
      lambda path, _: path[-1].key != "scale", params
    )
    return optax.chain(
      optax.clip_by_global_norm(self.clip),
      optax.adamw(rate, b2=0.95, weight_decay=self.weight_decay, mask=matrices),
    )


def pretraining(
  *,
  config: decoder.DecoderConfig,
  tokenizer: transformers.PreTrainedTokenizerFast,
  train: Sequence[str],
  held_out: Sequence[str],
  sequence_length: int,
  schedule: Schedule,
  data: dict[str, str],
) -> runner.Experiment:
  """Makes an experiment that trains all parameters of a Llama on `train`.

  Args:
    config: shape of the model.
    tokenizer: tokenizer of the model.
    train: texts to train on.
    held_out: texts to evaluate on.
    sequence_length: tokens predicted in a row.
    schedule: how long and how fast to train.
    data: name and fingerprint of the texts, for the run's record.

  Returns:
    An experiment whose export is a Hugging Face folder `model`.

  Raises:
    ValueError: if there are fewer rows than in a batch, or a row does not fit
      the model.
  """
  if sequence_length > config.max_position_embeddings:
    raise ValueError(
      f"expected sequence_length <= {config.max_position_embeddings}, the"
      f" model's context, got {sequence_length=}."
    )
  rows = batches.rows_of_text(train, tokenizer, sequence_length)
  if len(rows.tokens) < schedule.batch_size:
    raise ValueError(
      f"expected at least {schedule.batch_size} rows of {sequence_length}"
      f" tokens, got {len(rows.tokens)}: lower batch_size or sequence_length."
    )
  model = decoder.Decoder(config)
  optimizer = schedule.optimizer()
  loss_fn = language.loss_fn(model)
  device_rows = jax.device_put(rows)
  held_out_rows = batches.rows_of_text(held_out, tokenizer, sequence_length)
  evaluate = likelihood.evaluator(language.score_fn(model), held_out_rows)

  @jax.jit
  def init():
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = model.init(draws.key(schedule.seed), tokens)["params"]
    return params, optimizer.init(params)

  def total_loss(params, examples):
    everything = jnp.ones(schedule.rows_at_once, bool)
    return loss_fn({}, params, examples, everything, jax.random.key(0))

  def step(rows, state, indices):
    params, optimizer_state = state

    def accumulate(sums, indices):
      examples = jax.tree.map(lambda x: x[indices], rows)
      values = jax.value_and_grad(total_loss, has_aux=True)(params, examples)
      return jax.tree.map(jnp.add, sums, values), None

    parts = indices.reshape(-1, schedule.rows_at_once)
    nothing = (jnp.float32(0), jnp.int32(0))
    zeros = (nothing, jax.tree.map(jnp.zeros_like, params))
    ((total, count), gradient), _ = jax.lax.scan(accumulate, zeros, parts)
    # Divided by all tokens at the end, so that a padded row weighs less.
    loss, gradient = jax.tree.map(lambda x: x / count, (total, gradient))
    updates, optimizer_state = optimizer.update(
      gradient, optimizer_state, params
    )
    return (optax.apply_updates(params, updates), optimizer_state), loss

  @jax.jit
  def steps(state, rows, indices):
    advance = lambda state, indices: step(rows, state, indices)
    state, losses = jax.lax.scan(advance, state, indices)
    return state, losses.mean()

  def round_fn(state, round_number):
    first = round_number * schedule.steps_per_round
    indices = _batches(len(rows.tokens), schedule, first)
    state, loss = steps(state, device_rows, indices)
    return state, {"train_loss": loss, "tokens": indices.size * sequence_length}

  def program(state):
    indices = _batches(len(rows.tokens), schedule, 0)
    return {
      "round": programs.of_function(steps, state, device_rows, indices),
      "start": programs.of_arrays(state),
      "rows": programs.of_arrays(device_rows),
      **dataclasses.asdict(schedule),
    }

  def export(state, folder):
    pretrained.save(folder / "model", config, state[0])
    tokenizer.save_pretrained(folder / "model")

  return runner.Experiment(
    rounds=schedule.steps // schedule.steps_per_round,
    init=init,
    round=round_fn,
    evaluate=lambda state: evaluate(None, state[0]),
    export=export,
    data=data,
    program=program,
  )


def _batches(rows: int, schedule: Schedule, first: int) -> np.ndarray:
  """Returns the rows of a round that starts at step `first`: [steps, batch].

  Rows are shuffled anew every epoch; rows that do not fill a batch are left out
  of the epoch.
  """
  per_epoch = rows // schedule.batch_size

  def one(step):
    epoch, position = divmod(step, per_epoch)
    order = draws.generator(schedule.seed, draws.Purpose.PRETRAINING, epoch)
    start = position * schedule.batch_size
    return order.permutation(rows)[start : start + schedule.batch_size]

  steps = range(first, first + schedule.steps_per_round)
  return np.stack([one(step) for step in steps]).astype(np.int32)
