"""Taking a model out of the project: a stock folder with a card, a GGUF file, a repository on the hub."""
