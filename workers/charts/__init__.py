"""Draws what a merge did: charts in Vega-Lite by subject, each with a table that says the same."""
