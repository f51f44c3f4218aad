"""One family of models a file: how its config becomes a plan, and what its tensors are called."""
