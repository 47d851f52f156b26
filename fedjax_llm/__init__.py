"""Communication-efficient federated fine-tuning of language models in JAX.

The vocabulary for one's own research code: compressors, the round and the
algorithms composed from them, LoRA models. Experiments with data, metrics and
checkpoints are in `finetuning` and `experiment`.
"""

from fedjax_llm.compression import (
  Compressor,
  cast,
  chain,
  count_sketch,
  deep_gradient_compression,
  drive,
  eden,
  ef_sign_sgd,
  error_feedback,
  identity,
  lloyd_max,
  natural,
  power_sgd,
  qsgd,
  random_k,
  relative_to,
  rotate,
  select,
  sign,
  stc,
  stochastic_uniform,
  tern_grad,
  top_k,
  top_k_per_group,
  transmit,
  trellis,
)
from fedjax_llm.federated.aggregators import (
  mean_over_senders,
  sum_updates,
  uniform_mean,
  weighted_mean,
)
from fedjax_llm.federated.algorithms.cg_fed_llm import (
  cg_fed_llm,
  cg_fed_llm_products,
)
from fedjax_llm.federated.algorithms.delta_downloads import delta_downloads
from fedjax_llm.federated.algorithms.eco_lora import eco_lora
from fedjax_llm.federated.algorithms.ef21 import ef21
from fedjax_llm.federated.algorithms.fed_avg import (
  fed_adagrad,
  fed_adam,
  fed_avg,
  fed_avg_m,
  fed_yogi,
)
from fedjax_llm.federated.algorithms.fed_ex_lora import fed_ex_lora
from fedjax_llm.federated.algorithms.fed_sa_lora import fed_sa_lora
from fedjax_llm.federated.algorithms.fed_sb import fed_sb
from fedjax_llm.federated.algorithms.fed_srd import fed_srd
from fedjax_llm.federated.algorithms.federated_select import (
  federated_select,
  federated_select_ranks,
)
from fedjax_llm.federated.algorithms.fetch_sgd import fetch_sgd
from fedjax_llm.federated.algorithms.flasc import (
  flasc,
  flasc_tiers,
  server_adamw,
)
from fedjax_llm.federated.algorithms.flex_lora import flex_lora
from fedjax_llm.federated.algorithms.flora import flora
from fedjax_llm.federated.algorithms.freezing import (
  ffa_lora,
  linear_probe,
  ro_lora,
)
from fedjax_llm.federated.algorithms.het_lora import het_lora, zero_padded_lora
from fedjax_llm.federated.algorithms.pruning import adapter_lth, sparse_adapter
from fedjax_llm.federated.algorithms.scaffold import scaffold
from fedjax_llm.federated.channels import Channel, Tiers
from fedjax_llm.federated.clients import (
  Cohort,
  Placement,
  local_update,
  map_clients,
  proximal,
)
from fedjax_llm.federated.network import Link, Network
from fedjax_llm.federated.privacy.guarantees import ClientLevel, ExampleLevel
from fedjax_llm.federated.privacy.mechanisms import (
  adaptive_private_mean,
  private_mean,
)
from fedjax_llm.federated.privacy.messages import gaussian_mechanism
from fedjax_llm.federated.rounds import (
  FederatedAlgorithm,
  ServerState,
  federated_round,
)
from fedjax_llm.federated.schedules import alternating, staged
from fedjax_llm.models.decoder import Decoder, DecoderConfig
from fedjax_llm.models.generation import generate
from fedjax_llm.models.heads import Classifier
from fedjax_llm.models.lora import LoRA
