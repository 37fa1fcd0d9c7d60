"""Search: number, positions and kinds of exits."""
