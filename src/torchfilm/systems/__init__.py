"""The systems built with torchfilm, one room each."""
