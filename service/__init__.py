"""The front of the house: the HTTP service. It never imports torch."""
