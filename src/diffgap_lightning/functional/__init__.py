"""Pure functions over embeddings: checks, positive pairs, retrieval ranks and measures of the modality gap."""
