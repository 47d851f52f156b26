"""FLASC on tiny Shakespeare with a pretrained language model, SmolLM2-135M.

  fedjax-llm run smollm2_shakespeare

Clients are the 105 speakers with 2,000 characters or more. The model is
`smollm2-135m` in the folder `FEDJAX_LLM_MODELS`, or the hub's
SmolLM2-135M-Instruct; the plays are in `FEDJAX_LLM_DATA`. Only the projections
to queries and values get factors.
"""

import fedjax_llm as fl
from fedjax_llm.data import corpora, records
from fedjax_llm.experiments import finetuning, knobs, runner, tasks


def experiment(
  *,
  model: str = knobs.SMOLLM2,
  text: str = str(knobs.DATA / "tinyshakespeare" / "input.txt"),
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=20, clients_per_round=5, batch_size=4, local_steps=2
  ),
  adapter: fl.LoRA = fl.LoRA(rank=8, alpha=8.0, targets=("q_proj", "v_proj")),
  rates: knobs.Rates = knobs.Rates(0.02, 5e-3),
  densities: knobs.Densities = knobs.Densities(0.25, 0.25),
  sequence_length: int = 128,
  held_out_rows: int = 1,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Fine-tune SmolLM2 over the speakers of Shakespeare with FLASC.

  Args:
    model: Hugging Face folder or hub name of the base model.
    text: the plays.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    rates: the learning rates.
    densities: the shares of entries that are sent; 1 and 1 for dense LoRA.
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
