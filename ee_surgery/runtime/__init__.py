"""Run: stages, branches and a policy together, and how long that takes."""
