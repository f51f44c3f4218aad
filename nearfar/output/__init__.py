"""Output files that a user names: checked before the work, written completely or not at all."""
