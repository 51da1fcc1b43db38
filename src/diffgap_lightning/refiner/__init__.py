"""The refiner, the waist of the package: training makes one, generators, the evaluation and users take one.

refiner.py         DiffGAPRefiner: refine, score, measure, uncertainty, novelty
base.py            what it consists of; the folder that it is saved in, and nothing in it executes
config.py          RefinerConfig, the folder's config.json; checks.py says what its values may be

measuring.py       everything that needs no training, from rows and ids
closed_forms.py    Gaussian and mixture denoisers, bridges and hub corrections, and how they are kept
calibration.py     restored variance of the start, and weights of the score, on held-out rows
scoring.py         the fused score's components; fusion.py fits their weights, hubness.py corrects for hubs

product.py         several source modalities at once, as a product of posteriors; together.py samples from it
prepared.py        refining with fixed shapes: one graph for all steps, what depends on the step only done once
uncertainty.py     how sure a refined row is; novelty.py, how unlike all training rows a source is
"""

from diffgap_lightning.refiner.config import Direction, RefinerConfig, Start
from diffgap_lightning.refiner.refiner import DiffGAPRefiner

__all__ = ["DiffGAPRefiner", "Direction", "RefinerConfig", "Start"]
