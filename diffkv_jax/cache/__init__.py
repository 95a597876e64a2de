"""The compressed cache: one immutable pytree."""
