"""What is trained: LoRA-parametrised Flax models that know of no clients."""
