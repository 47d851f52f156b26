"""Learned compression: CG-FedLLM's autoencoder and what it is measured by."""
