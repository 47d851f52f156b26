"""Evaluation of models: likelihood, classification and multiple choice."""
