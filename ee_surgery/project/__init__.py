"""A whole project from one YAML file: model, data, training, operating point, where to save."""
