"""Which policy a user means: one given, one fitted before, or "auto"."""
