"""Privacy: mechanisms that add noise, their guarantees and accounting."""

from fedjax_llm.federated.privacy import dp_sgd as dp_sgd
from fedjax_llm.federated.privacy.mechanisms import (
  adaptive_private_mean as adaptive_private_mean,
)
from fedjax_llm.federated.privacy.mechanisms import private_mean as private_mean
from fedjax_llm.federated.privacy.messages import (
  gaussian_mechanism as gaussian_mechanism,
)
