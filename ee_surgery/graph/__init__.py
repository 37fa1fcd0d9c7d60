"""Read a model as a graph: capture, liveness, cost, exit points, stages."""
