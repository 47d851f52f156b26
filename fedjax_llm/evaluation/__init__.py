"""How good a model is: likelihood, classification, multiple choice."""
