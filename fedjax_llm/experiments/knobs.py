"""Knobs that many configs share, as values.

A config's command line has an option for every field of such a value: with
`rates: knobs.Rates` it has `--client-learning-rate`.
"""

import dataclasses

import optax

from fedjax_llm.experiments import base_models
from fedjax_llm.federated import clients
from fedjax_llm.federated.algorithms import flasc


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
  """The share of the entries that FLASC sends.

  Attributes:
    download_density: share of the parameters' entries that the server sends.
    upload_density: share of an update's entries that a client sends.
  """

  download_density: float = 0.25
  upload_density: float = 0.0625


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the model is held and computed.

  Attributes:
    dtype: dtype of the base model and its activations.
    quantize: format of the base model's layers, 8 or about 4.5 bits a weight;
      None for `dtype`.
    clients_per_step: clients trained at once on a device; None for 1 on a CPU
      and 4 elsewhere.
  """

  dtype: base_models.Dtype = "float32"
  quantize: base_models.Quantize | None = None
  clients_per_step: int | None = None

  @property
  def placement(self) -> clients.Placement:
    """All devices, with so many clients at once on each."""
    return clients.Placement(clients_per_step=self.clients_per_step)
