"""FLASC on 20 Newsgroups with a pretrained encoder, MiniLM-L6.

  fedjax-llm run minilm_newsgroups
  fedjax-llm run minilm_newsgroups --download-density 1 --upload-density 1

The second command is dense LoRA. The setting is FLASC's (Kuo et al., 2024): 350
clients by Dirichlet shares of concentration 0.1, whose posts are of few groups.
The model has 22.7 M parameters and reads the subject and the first words of a
post. It is `minilm-l6` in the folder `FEDJAX_LLM_MODELS`, or the hub's
all-MiniLM-L6-v2; the posts are in `FEDJAX_LLM_DATA`. Test posts are later than
all others.
"""

from typing import Any

import fedjax_llm as fl
from fedjax_llm.data import partition, records, sources, templates
from fedjax_llm.experiments import finetuning, knobs, runner, tasks


def experiment(
  *,
  model: str = knobs.MINILM,
  data: str = str(knobs.DATA / "20news_bydate" / "20news-bydate.tar.gz"),
  clients: int = 350,
  dirichlet_alpha: float = 0.1,
  seed: int = 0,
  schedule: finetuning.Schedule = finetuning.Schedule(
    rounds=30, clients_per_round=10, batch_size=16, local_steps=2
  ),
  adapter: fl.LoRA = fl.LoRA(
    rank=16, alpha=16.0, targets=("query", "key", "value", "dense")
  ),
  rates: knobs.Rates = knobs.Rates(0.02, 5e-3),
  densities: knobs.Densities = knobs.Densities(0.25, 0.25),
  sequence_length: int = 48,
  held_out_rows: int = 1000,
  compute: knobs.Compute = knobs.Compute(),
) -> runner.Experiment:
  """Classify posts by newsgroup with MiniLM and FLASC.

  Args:
    model: Hugging Face folder or hub name of the encoder.
    data: `20news-bydate.tar.gz`.
    clients: the number of clients.
    dirichlet_alpha: concentration of the clients' mixes of groups. A low value
      gives a client few groups.
    seed: seed of every random draw.
    schedule: the rounds and what happens in each.
    adapter: the LoRA factors.
    rates: the learning rates.
    densities: the shares of entries that are sent; 1 and 1 for dense LoRA.
    sequence_length: tokens in a row.
    held_out_rows: number of test posts to evaluate, drawn at random.
    compute: how the model is computed.
  """
  test: Any = sources.newsgroups(data, "test", subject=True)
  source = records.classified(
    sources.newsgroups(data, "train", subject=True),
    templates.plain("text"),
    partition.dirichlet_by_client(
      clients=clients, alpha=dirichlet_alpha, seed=seed
    ),
    held_out=test.shuffle(seed=seed),
    held_out_rows=held_out_rows,
    seed=seed,
  )
  task = tasks.classifier(
    source,
    model=model,
    adapter=adapter,
    sequence_length=sequence_length,
    pooling="mean",
    seed=seed,
    **compute.settings,
  )
  algorithm = densities.flasc(task, rates)
  return finetuning.fine_tuning(task, algorithm, schedule)
