"""Share: branches as an adapter folder of safetensors and JSON."""
