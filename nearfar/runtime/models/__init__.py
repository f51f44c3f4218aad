"""What a model computes: its plan, its layers, its weights."""
