"""Communication-efficient federated fine-tuning of language models in JAX."""
