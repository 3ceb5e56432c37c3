"""FiLM for visual reasoning: a network that answers questions about pictures (Perez et al. 2018)."""
