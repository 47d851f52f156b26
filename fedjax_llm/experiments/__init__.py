"""Tasks, federated fine-tuning, and runs that can resume."""
