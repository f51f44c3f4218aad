"""Models on disk: finding them, reading their files, and checking that every part is used."""
