"""The trained tiny model, as package data."""
