"""`lit-symopt bench`: what a step of the optimizer costs on the shapes of a model, against other optimizers."""
