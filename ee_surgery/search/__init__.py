"""Search: which exits are worth having."""
