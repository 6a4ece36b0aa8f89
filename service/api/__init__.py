"""The doors: everything that speaks HTTP, and nothing else does."""
