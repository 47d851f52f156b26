"""Every published method by its name: `fl.algorithms`.

Most modules of the package `algorithms` have the name of their function, so the
package cannot export both under that name. The functions are here.
"""

from fedjax_llm.federated.algorithms.cg_fed_llm import cg_fed_llm as cg_fed_llm
from fedjax_llm.federated.algorithms.cg_fed_llm import (
  cg_fed_llm_products as cg_fed_llm_products,
)
from fedjax_llm.federated.algorithms.delta_downloads import (
  delta_downloads as delta_downloads,
)
from fedjax_llm.federated.algorithms.eco_lora import eco_lora as eco_lora
from fedjax_llm.federated.algorithms.ef21 import ef21 as ef21
from fedjax_llm.federated.algorithms.fed_avg import fed_adagrad as fed_adagrad
from fedjax_llm.federated.algorithms.fed_avg import fed_adam as fed_adam
from fedjax_llm.federated.algorithms.fed_avg import fed_avg as fed_avg
from fedjax_llm.federated.algorithms.fed_avg import fed_avg_m as fed_avg_m
from fedjax_llm.federated.algorithms.fed_avg import fed_yogi as fed_yogi
from fedjax_llm.federated.algorithms.fed_ex_lora import (
  fed_ex_lora as fed_ex_lora,
)
from fedjax_llm.federated.algorithms.fed_sa_lora import (
  fed_sa_lora as fed_sa_lora,
)
from fedjax_llm.federated.algorithms.fed_sb import fed_sb as fed_sb
from fedjax_llm.federated.algorithms.fed_sb import (
  gradient_bases as gradient_bases,
)
from fedjax_llm.federated.algorithms.fed_sb import random_bases as random_bases
from fedjax_llm.federated.algorithms.fed_srd import fed_srd as fed_srd
from fedjax_llm.federated.algorithms.federated_select import (
  federated_select as federated_select,
)
from fedjax_llm.federated.algorithms.federated_select import (
  federated_select_ranks as federated_select_ranks,
)
from fedjax_llm.federated.algorithms.fetch_sgd import fetch_sgd as fetch_sgd
from fedjax_llm.federated.algorithms.flasc import flasc as flasc
from fedjax_llm.federated.algorithms.flasc import flasc_tiers as flasc_tiers
from fedjax_llm.federated.algorithms.flasc import server_adamw as server_adamw
from fedjax_llm.federated.algorithms.flasc_search import (
  flasc_search as flasc_search,
)
from fedjax_llm.federated.algorithms.flex_lora import flex_lora as flex_lora
from fedjax_llm.federated.algorithms.flora import flora as flora
from fedjax_llm.federated.algorithms.freezing import ffa_lora as ffa_lora
from fedjax_llm.federated.algorithms.freezing import (
  linear_probe as linear_probe,
)
from fedjax_llm.federated.algorithms.freezing import ro_lora as ro_lora
from fedjax_llm.federated.algorithms.het_lora import het_lora as het_lora
from fedjax_llm.federated.algorithms.het_lora import (
  zero_padded_lora as zero_padded_lora,
)
from fedjax_llm.federated.algorithms.pruning import adapter_lth as adapter_lth
from fedjax_llm.federated.algorithms.pruning import (
  sparse_adapter as sparse_adapter,
)
from fedjax_llm.federated.algorithms.scaffold import scaffold as scaffold
from fedjax_llm.federated.algorithms.tgap import (
  federated_pretraining as federated_pretraining,
)
from fedjax_llm.federated.algorithms.tgap import (
  local_pretraining as local_pretraining,
)
from fedjax_llm.federated.schedules import alternating as alternating
from fedjax_llm.federated.schedules import staged as staged
