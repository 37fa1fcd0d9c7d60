# pyright: reportMissingImports=false
"""Serve an exported file with FastAPI; torch is not loaded.

    pip install 'ee-surgery[onnx]' fastapi uvicorn
    python -m recipes.serve_fastapi model.onnx --threads 1
    curl --data-binary @sample.raw 'http://127.0.0.1:8000/predict?point=0'

A request holds float32 samples, prepared as the metadata `preprocessing` says, one after another; the answer has one
entry per sample. `point` is a place on the frontier that `/points` lists, for this request alone.
"""

from __future__ import annotations

import argparse
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request

from ee_surgery.onnx import OnnxError, OnnxModel, OnnxOutput

LIMIT = 64 << 20  # bytes per request


def decoded(body: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Samples (B, *shape), float32, out of the bytes of a request.

    Raises:
        HTTPException: 422, they are no whole number of samples.
    """
    size = 4 * int(np.prod(shape))
    if not body or len(body) % size:
        raise HTTPException(422, f"The body holds {len(body)} bytes; a sample of shape {shape} has {size} (float32).")
    return np.frombuffer(body, "<f4").reshape(-1, *shape)


def described(model: OnnxModel, output: OnnxOutput) -> list[dict[str, Any]]:
    """One entry per sample, as JSON has it."""
    best, labels = output.logits.argmax(1).tolist(), model.labels
    scores = [None if np.isnan(score) else float(score) for score in output.score]
    return [
        {"class": k, "label": labels[k] if labels else None, "exit": model.exits[e], "score": score, "macs": int(macs)}
        for k, e, score, macs in zip(best, output.exit_index, scores, output.macs, strict=True)
    ]


async def bounded(request: Request) -> bytes:
    """The body of a request, up to the limit."""
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > LIMIT:
            raise HTTPException(413, f"More than {LIMIT} bytes.")
    return bytes(read)


def create(path: str, threads: int = 0) -> FastAPI:
    """The application around one file."""
    model, app = OnnxModel(path, threads=threads), FastAPI()
    shape = tuple(model.session.get_inputs()[0].shape[1:])

    @app.get("/points")
    def points() -> list[dict[str, Any]]:
        return [{"accuracy": p.expected_accuracy, "macs_fraction": p.macs_fraction} for p in model.points]

    @app.post("/predict")
    def predict(body: Annotated[bytes, Depends(bounded)], point: int | None = None) -> list[dict[str, Any]]:
        if point is not None and not 0 <= point < len(model.points):
            raise HTTPException(422, f"No point {point}: the file's frontier has {len(model.points)}.")
        thresholds = None if point is None else model.points[point].thresholds
        try:
            return described(model, model.run(decoded(body, shape), thresholds))
        except OnnxError as error:
            raise HTTPException(422, "The file cannot run these samples.") from error

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="an exported file with one input")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; its own choice by default")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(create(options.file, options.threads), port=options.port)


if __name__ == "__main__":
    main()
