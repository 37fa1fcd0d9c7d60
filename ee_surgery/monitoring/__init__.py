"""Models in service: whether the promise of their operating point is kept."""
