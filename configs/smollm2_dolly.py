"""FLASC on Dolly-15k with a pretrained language model, SmolLM2-135M-Instruct.

  fedjax-llm run smollm2_dolly

Ten clients as in Shepherd (FedIT), which differ in their categories of
instructions; the loss is that of the answers. The model is `smollm2-135m` in
the folder `FEDJAX_LLM_MODELS`, or the hub's SmolLM2-135M-Instruct; the records
are in `FEDJAX_LLM_DATA`. Only the projections to queries and values get
factors. Records whose context fills the row are left out.
"""

import fedjax_llm as fl
from fedjax_llm.data import partition, records, sources, templates
from fedjax_llm.experiments import finetuning, knobs, runner, tasks


def experiment(
  *,
  model: str = knobs.SMOLLM2,
  data: str = str(knobs.DATA / "dolly15k_fed10" / "local_training_*.json"),
  held_out: str = str(knobs.DATA / "dolly15k_fed10" / "global_test.json"),
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=20, clients_per_round=5, batch_size=4, local_steps=2
  ),
  adapter: fl.LoRA = fl.LoRA(rank=8, alpha=8.0, targets=("q_proj", "v_proj")),
  rates: knobs.Rates = knobs.Rates(0.02, 5e-3),
  densities: knobs.Densities = knobs.Densities(0.25, 0.25),
  sequence_length: int = 128,
  held_out_rows: int = 80,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Fine-tune SmolLM2 on Dolly's answers with FLASC.

  Args:
    model: Hugging Face folder or hub name of the base model.
    data: the records, by a spec of `data.sources.load`; each file is a client.
    held_out: the held-out records, by such a spec.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    rates: the learning rates.
    densities: the shares of entries that are sent; 1 and 1 for dense LoRA.
    sequence_length: tokens in a row.
    held_out_rows: number of held-out records to evaluate, from the first.
    compute: how the model is computed.
  """
  source = records.instructions(
    sources.load(data),
    templates.dolly(),
    partition.natural(),
    client_column="file",
    label_column="category",
    held_out=sources.load(held_out),
    held_out_rows=held_out_rows,
    seed=seed,
  )
  task = tasks.language_model(
    source,
    model=model,
    adapter=adapter,
    sequence_length=sequence_length,
    seed=seed,
    **compute.settings,
  )
  algorithm = densities.flasc(task, rates)
  return finetuning.fine_tuning(task, algorithm, schedule)
