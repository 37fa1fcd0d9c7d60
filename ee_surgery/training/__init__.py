"""Train branches, and record what they answer."""
