"""The base model that the package ships: a 1.4 M parameter Llama of Python.

  fedjax-llm pretrain pretrain --out runs/pretrain

Trained on the part of the standard library that no client of the default
corpus holds. 2 cores of an AMD EPYC, shared: 66 minutes. Seed 0: held-out loss
3.020; the record of the run that made the shipped weights is
`benchmarks/results/pretrain/`. (That run averaged the mean losses of parts of a
batch. The command now divides their sum by all tokens of the batch. So its
weights are close to the shipped ones, but not equal.)
"""

from fedjax_llm.data import corpora
from fedjax_llm.experiments import pretraining, runner
from fedjax_llm.models import decoder


def experiment(
  *,
  schedule: pretraining.Schedule = pretraining.Schedule(
    steps=2500,
    steps_per_round=50,
    batch_size=16,
    rows_at_once=4,
    learning_rate=3e-3,
    warmup=100,
  ),
  sequence_length: int = 256,
  vocabulary: int = 2048,
  hidden_size: int = 128,
  layers: int = 6,
) -> runner.Experiment:
  """Pre-train the small Llama that the package ships.

  Args:
    schedule: how long and how fast to train.
    sequence_length: tokens in a row, and the model's context.
    vocabulary: tokens of the byte-level BPE.
    hidden_size: width of the model, a multiple of 64.
    layers: number of the model's layers.
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
    schedule=schedule,
    data=corpora.identity(remainder),
  )
