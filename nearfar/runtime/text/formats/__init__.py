"""What is inside files of different kinds: text out of bytes. Knows no paths and no models."""
