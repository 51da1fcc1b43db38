"""Measuring: refiners beside the closed-form rivals (comparison, report), and generated sound (generation metrics)."""
