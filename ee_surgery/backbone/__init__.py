"""One face for timm, transformers and plain torch models, and everything that is known about them from outside."""
