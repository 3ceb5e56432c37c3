"""FiLM for PyTorch."""
