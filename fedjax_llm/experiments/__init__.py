"""Tasks, federated fine-tuning of them, and runs that resume."""
