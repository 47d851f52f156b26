"""The base model that the package ships: a 1.4 M parameter Llama of Python.

  fedjax-llm pretrain pretrain --out runs/pretrain

Trained on the part of the standard library that no client of the default
corpus holds. 2 cores of an AMD EPYC, shared: 66 minutes. Seed 0: held-out loss
3.020; the record of the run that made the shipped weights is
`benchmarks/results/pretrain/`. (That run averaged the means of parts of a
batch, which a padded row makes unequal; the command now sums, so its weights
come out alike, not the same to the bit.)
"""

from fedjax_llm.data import corpora
from fedjax_llm.experiments import pretraining, runner
from fedjax_llm.models import decoder


def experiment(
  *,
  seed: int = 0,
  steps: int = 2500,
  steps_per_round: int = 50,
  batch_size: int = 16,
  rows_at_once: int = 4,
  sequence_length: int = 256,
  learning_rate: float = 3e-3,
  warmup: int = 100,
  vocabulary: int = 2048,
  hidden_size: int = 128,
  layers: int = 6,
) -> runner.Experiment:
  """Pre-train the small Llama that the package ships.

  Args:
    seed: of the initial parameters and of the order of rows.
    steps: optimizer steps in all.
    steps_per_round: optimizer steps between lines of the log.
    batch_size: rows a step.
    rows_at_once: rows whose gradients are taken together.
    sequence_length: tokens a row, and the model's context.
    learning_rate: the peak of AdamW's rate.
    warmup: steps until the peak.
    vocabulary: tokens of the byte-level BPE.
    hidden_size: width of the model, a multiple of 64.
    layers: its depth.
  """
  remainder = corpora.standard_library_remainder()
  tokenizer = pretraining.train_tokenizer(
    remainder.train, vocabulary, sequence_length
  )
  config = decoder.DecoderConfig(
    vocab_size=vocabulary,
    hidden_size=hidden_size,
    intermediate_size=3 * hidden_size,
    num_hidden_layers=layers,
    num_attention_heads=hidden_size // 32,
    num_key_value_heads=hidden_size // 64,
    head_dim=32,
    max_position_embeddings=sequence_length,
    tie_word_embeddings=True,
  )
  return pretraining.pretraining(
    config=config,
    tokenizer=tokenizer,
    train=remainder.train,
    held_out=remainder.held_out,
    sequence_length=sequence_length,
    schedule=pretraining.Schedule(
      steps=steps,
      steps_per_round=steps_per_round,
      batch_size=batch_size,
      rows_at_once=rows_at_once,
      learning_rate=learning_rate,
      warmup=warmup,
      seed=seed,
    ),
    data=corpora.identity(remainder),
  )
