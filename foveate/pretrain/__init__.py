"""Pre-training by masked image modelling: MAE and SimMIM, with masked token optimisation."""
