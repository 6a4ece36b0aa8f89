"""Adapters to where things are kept: objects and jobs."""
