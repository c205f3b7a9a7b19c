"""The networks: the GPT from scratch, sampling, optimizers, and opening any model of transformers."""
