"""Models on disk: where they come from, what their files hold, and whether all of it is used."""
