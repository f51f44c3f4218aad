"""The computation of a model: its plan, its layers, its weights."""
