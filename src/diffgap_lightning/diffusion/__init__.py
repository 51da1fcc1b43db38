"""Diffusion in an embedding space, one idea a file: schedule, prediction, guidance, samplers. Needs torch alone."""
