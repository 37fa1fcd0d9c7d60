"""A common interface to timm, transformers and plain torch models: inputs, outputs, preprocessing, change detection."""
