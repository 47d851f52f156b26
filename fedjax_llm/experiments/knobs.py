"""Groups of knobs that many configs share.

Each field becomes an option of the command line: a config with
`rates: knobs.Rates` has `--client-learning-rate`.
"""

import dataclasses
import os
import pathlib
from typing import Any

import optax

from fedjax_llm.experiments import base_models, tasks
from fedjax_llm.federated import clients, rounds
from fedjax_llm.federated.algorithms import flasc

# The folder of the data sets that configs name.
DATA = pathlib.Path(os.environ.get("FEDJAX_LLM_DATA", "../shared/data"))


def _model(folder: str, hub_name: str) -> str:
  """A model's folder in `FEDJAX_LLM_MODELS`, or else its name on the hub."""
  models = os.environ.get("FEDJAX_LLM_MODELS")
  local = models and pathlib.Path(models) / folder
  return str(local) if local and local.exists() else hub_name


# The pretrained models that configs name.
MINILM = _model("minilm-l6", "sentence-transformers/all-MiniLM-L6-v2")
SMOLLM2 = _model("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct")


@dataclasses.dataclass(frozen=True)
class Rates:
  """The learning rates of FLASC's optimizers.

  Attributes:
    client_learning_rate: learning rate of the clients' SGD with momentum 0.9.
    server_learning_rate: learning rate of the server's AdamW with weight decay
      0.01.
  """

  client_learning_rate: float
  server_learning_rate: float = 1e-2

  @property
  def client(self) -> optax.GradientTransformation:
    """The clients' optimizer."""
    return optax.sgd(self.client_learning_rate, momentum=0.9)

  @property
  def server(self) -> optax.GradientTransformation:
    """The server's optimizer."""
    return flasc.server_adamw(self.server_learning_rate)


@dataclasses.dataclass(frozen=True)
class Densities:
  """The shares of the entries that FLASC sends.

  Attributes:
    download_density: share of the parameters' entries that the server sends.
    upload_density: share of an update's entries that a client sends.
  """

  download_density: float = 0.25
  upload_density: float = 0.0625

  def flasc(self, task: tasks.Task, rates: Rates) -> rounds.FederatedAlgorithm:
    """FLASC with these densities, on the devices of `task`."""
    return flasc.flasc(
      task.loss_fn,
      rates.client,
      rates.server,
      download_density=self.download_density,
      upload_density=self.upload_density,
      placement=task.placement,
    )


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the model is stored and computed.

  Attributes:
    dtype: dtype of the base model and its activations.
    quantize: format of the base model's layers: "int8", about 8 bits a weight,
      or "nf4", about 4.5; None to store them as `dtype`.
    clients_per_step: clients trained at once on a device; None for 1 on a CPU
      and 4 elsewhere.
  """

  dtype: base_models.Dtype = "float32"
  quantize: base_models.Quantize | None = None
  clients_per_step: int | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """The arguments of `tasks.language_model` for these knobs."""
    return {
      "dtype": self.dtype,
      "quantize": self.quantize,
      "placement": clients.Placement(clients_per_step=self.clients_per_step),
    }
