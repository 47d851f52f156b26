"""Communication-efficient federated fine-tuning of language models in JAX.

The vocabulary for one's own research code: compressors, the round and the
algorithms composed from them, LoRA models. Experiments with data, metrics and
checkpoints are in `finetuning` and `experiment`.
"""

from fedjax_llm.compression import (
  Compressor,
  cast,
  chain,
  error_feedback,
  identity,
  random_k,
  select,
  top_k,
  transmit,
  uniform,
)
from fedjax_llm.federated.aggregators import uniform_mean, weighted_mean
from fedjax_llm.federated.algorithms.fed_avg import fed_avg
from fedjax_llm.federated.algorithms.flasc import flasc, server_adamw
from fedjax_llm.federated.channels import Channel, Tiers
from fedjax_llm.federated.clients import (
  Cohort,
  local_update,
  map_clients,
  proximal,
)
from fedjax_llm.federated.rounds import (
  FederatedAlgorithm,
  ServerState,
  federated_round,
)
from fedjax_llm.models.decoder import Decoder, DecoderConfig
from fedjax_llm.models.generation import generate
from fedjax_llm.models.heads import Classifier
from fedjax_llm.models.lora import LoRA
