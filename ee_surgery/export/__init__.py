"""Deploy: a branched model as one ONNX file whose samples still leave early, each on its own."""
