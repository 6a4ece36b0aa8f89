"""The workshop: the only package that knows torch."""
