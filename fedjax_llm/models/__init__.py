"""LoRA-parametrised Flax models, with Hugging Face and PEFT files.

These modules know nothing about clients.
"""
