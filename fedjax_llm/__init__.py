"""Communication-efficient federated fine-tuning of language models in JAX.

Research code needs only `import fedjax_llm as fl`. Types and main functions are
here. Methods are in `fl.algorithms`, compressors in `fl.compression`, functions
that combine updates in `fl.aggregators`, noise in `fl.privacy`, models with
their data in `fl.tasks`, data sets in `fl.data`.

A name is imported when it is first used, so that the command line starts fast.
`docs/your_own.md` shows how to write a method of your own.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fedjax_llm import compression as compression
  from fedjax_llm import data as data
  from fedjax_llm.compression.base import Compressor as Compressor
  from fedjax_llm.compression.base import Dense as Dense
  from fedjax_llm.compression.base import stateless as stateless
  from fedjax_llm.compression.base import transmit as transmit
  from fedjax_llm.compression.wire import message as message
  from fedjax_llm.experiments import tasks as tasks
  from fedjax_llm.experiments.finetuning import Schedule as Schedule
  from fedjax_llm.experiments.finetuning import fine_tuning as fine_tuning
  from fedjax_llm.experiments.runner import Experiment as Experiment
  from fedjax_llm.experiments.runner import run as run
  from fedjax_llm.experiments.tasks import Task as Task
  from fedjax_llm.federated import aggregators as aggregators
  from fedjax_llm.federated import answers as answers
  from fedjax_llm.federated import catalogue as algorithms
  from fedjax_llm.federated import privacy as privacy
  from fedjax_llm.federated.aggregators import Aggregator as Aggregator
  from fedjax_llm.federated.algorithms.flasc import server_adamw as server_adamw
  from fedjax_llm.federated.channels import Channel as Channel
  from fedjax_llm.federated.channels import Tiers as Tiers
  from fedjax_llm.federated.clients import Cohort as Cohort
  from fedjax_llm.federated.clients import Placement as Placement
  from fedjax_llm.federated.clients import local_update as local_update
  from fedjax_llm.federated.clients import map_clients as map_clients
  from fedjax_llm.federated.clients import proximal as proximal
  from fedjax_llm.federated.draws import Purpose as Purpose
  from fedjax_llm.federated.network import Link as Link
  from fedjax_llm.federated.network import Network as Network
  from fedjax_llm.federated.privacy.guarantees import ClientLevel as ClientLevel
  from fedjax_llm.federated.privacy.guarantees import (
    ExampleLevel as ExampleLevel,
  )
  from fedjax_llm.federated.rounds import (
    FederatedAlgorithm as FederatedAlgorithm,
  )
  from fedjax_llm.federated.rounds import ServerState as ServerState
  from fedjax_llm.federated.rounds import end_round as end_round
  from fedjax_llm.federated.rounds import federated_round as federated_round
  from fedjax_llm.federated.rounds import first_state as first_state
  from fedjax_llm.federated.rounds import server_step as server_step
  from fedjax_llm.models.generation import generate as generate
  from fedjax_llm.models.heads import Classifier as Classifier
  from fedjax_llm.models.lora import LoRA as LoRA

else:  # Hidden from type checkers, so that they reject names not above.

  def __getattr__(name: str) -> Any:
    if name in _MODULES:
      value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _HOMES:
      home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
      value = getattr(home, name)
    else:
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # Found without this function the next time.
    return value


# The module of each name above; a test compares the two lists.
_MODULES = {
  "algorithms": "federated.catalogue",
  "aggregators": "federated.aggregators",
  "answers": "federated.answers",
  "compression": "compression",
  "data": "data",
  "privacy": "federated.privacy",
  "tasks": "experiments.tasks",
}
_NAMES = {
  "compression.base": ("Compressor", "Dense", "stateless", "transmit"),
  "compression.wire": ("message",),
  "experiments.finetuning": ("Schedule", "fine_tuning"),
  "experiments.runner": ("Experiment", "run"),
  "experiments.tasks": ("Task",),
  "federated.aggregators": ("Aggregator",),
  "federated.algorithms.flasc": ("server_adamw",),
  "federated.channels": ("Channel", "Tiers"),
  "federated.clients": (
    *("Cohort", "Placement", "local_update", "map_clients", "proximal"),
  ),
  "federated.draws": ("Purpose",),
  "federated.network": ("Link", "Network"),
  "federated.privacy.guarantees": ("ClientLevel", "ExampleLevel"),
  "federated.rounds": (
    *("FederatedAlgorithm", "ServerState", "end_round", "federated_round"),
    *("first_state", "server_step"),
  ),
  "models.generation": ("generate",),
  "models.heads": ("Classifier",),
  "models.lora": ("LoRA",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __dir__() -> list[str]:
  return sorted([*_MODULES, *_HOMES])
