"""Files that a user names for what nearfar writes: checked before the work, written whole."""
