"""Running tasks under policies, and keeping what came out."""
