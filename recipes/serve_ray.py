# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Serve an exported file with Ray Serve: requests that wait share a batch, and each sample still leaves on its own.

    pip install 'ee-surgery[onnx]' 'ray[serve]'
    python -m recipes.serve_ray model.onnx
    curl --data-binary @sample.raw http://127.0.0.1:8000/

A request holds one float32 sample, prepared as the file's `preprocessing` says.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from ray import serve

from ee_surgery.onnx import OnnxModel
from recipes.serve_fastapi import bounded, decoded, described


@serve.deployment(max_ongoing_requests=64)
class Classifier:
    """One replica: one file on one thread."""

    def __init__(self, path: str) -> None:
        self.model = OnnxModel(path, threads=1)
        self.shape = tuple(self.model.session.get_inputs()[0].shape[1:])

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def predict(self, samples: list[np.ndarray]) -> list[dict[str, Any]]:
        """Answers of samples of any number of requests."""
        return described(self.model, self.model.run(np.stack(samples)))

    async def __call__(self, request: Request) -> JSONResponse:
        """One request."""
        try:
            samples = decoded(await bounded(request), self.shape)
        except HTTPException as error:
            return JSONResponse({"detail": error.detail}, error.status_code)
        if len(samples) > 1:
            return JSONResponse({"detail": "One sample per request."}, 422)
        return JSONResponse(await self.predict(samples[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="an exported file with one input")
    options = parser.parse_args()
    serve.run(Classifier.bind(os.path.abspath(options.file)), blocking=True)


if __name__ == "__main__":
    main()
