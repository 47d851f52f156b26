"""FLASC on tiny Shakespeare: a trained Llama, speakers as clients.

  FEDJAX_LLM_DATA=folder fedjax-llm run flasc_shakespeare

The folder holds `stories260k`, a Llama trained on children's stories, and
`tinyshakespeare/input.txt`, where 105 speakers have 2,000 characters or more.

2 cores of an AMD EPYC: a minute and a half. Seed 0: held-out loss 4.532 to
3.029 with 32.9 MB sent; the record is `benchmarks/results/flasc_shakespeare/`.
"""

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, knobs, runner, tasks
from fedjax_llm.models import decoder


def experiment(
  *,
  model: str = str(knobs.DATA / "stories260k"),
  text: str = str(knobs.DATA / "tinyshakespeare" / "input.txt"),
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=50, clients_per_round=10, batch_size=6, local_steps=4
  ),
  adapter: fl.LoRA = fl.LoRA(alpha=4.0, targets=decoder.LINEAR),
  rates: knobs.Rates = knobs.Rates(1.0),
  densities: knobs.Densities = knobs.Densities(),
  sequence_length: int = 96,
  held_out_rows: int = 2,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Fine-tune a small Llama over the speakers of Shakespeare with FLASC.

  Args:
    model: Hugging Face folder or hub name of the base model.
    text: the plays.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    rates: the learning rates.
    densities: the shares of entries that are sent.
    sequence_length: tokens in a row.
    held_out_rows: rows evaluated of each speaker's held-out speeches.
    compute: how the model is computed.
  """
  task = tasks.language_model(
    records.streams(corpora.shakespeare(text), held_out_rows),
    model=model,
    adapter=adapter,
    sequence_length=sequence_length,
    seed=seed,
    **compute.settings,
  )
  algorithm = densities.flasc(task, rates)
  return finetuning.fine_tuning(task, algorithm, schedule)
