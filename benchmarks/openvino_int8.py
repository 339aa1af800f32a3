"""A dense encoder in OpenVINO with weights and activations in int8, without training.

There are two ways, and which one is faster depends on the processor; both need onnxruntime only:

- static: the scales of activations are found beforehand, on random ids, and written into the graph
  by onnxruntime's quantizer, as OpenVINO's own (nncf, which is not needed here) does;
- dynamic: only weights are stored in int8, and OpenVINO rounds activations as they come, if it has
  kernels for that on this processor (it has with AVX-512 VNNI); otherwise it computes in float32.

What is not a product with a weight stays float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Feeds = Mapping[str, np.ndarray]


def versions(
    file: Path, calibration: Sequence[Feeds], threads: int
) -> dict[str, Callable[[Feeds], Any]]:
    """Both, from a float32 ONNX file; each takes at least the graph's inputs, by name."""
    made = {"static": static(file, calibration), "dynamic": dynamic(file)}
    return {name: opened(model, threads) for name, model in made.items()}


def static(file: Path, calibration: Sequence[Feeds]) -> Any:
    import openvino
    from onnxruntime import InferenceSession, quantization

    names = {put.name for put in InferenceSession(file).get_inputs()}

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{name: feeds[name] for name in names} for feeds in calibration])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantised = file.with_name("static.onnx")
    options = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    logging.disable(logging.WARNING)  # advice to fuse nodes first, which OpenVINO does
    try:
        quantization.quantize_static(
            file, quantised, Reader(), use_external_data_format=True, **options
        )
    finally:
        logging.disable(logging.NOTSET)
    return openvino.Core().read_model(quantised)


def dynamic(file: Path) -> Any:
    """Each weight as int8 times a scale for each output."""
    import openvino
    from openvino import opset13 as operators

    model = openvino.Core().read_model(file)
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        constant = product.input_value(1).get_node()
        if constant.get_type_name() != "Constant":
            continue
        weight = constant.get_data()  # (n, m), or (m, n) if it is transposed
        inputs = 1 if product.get_attributes()["transpose_b"] else 0
        scale = np.abs(weight).max(inputs, keepdims=True) / 127
        rounded = operators.constant(np.round(weight / scale).astype(np.int8))
        stored = operators.multiply(operators.convert(rounded, "f32"), operators.constant(scale))
        product.input(1).replace_source_output(stored.output(0))
    model.validate_nodes_and_infer_types()
    return model


def opened(model: Any, threads: int) -> Callable[[Feeds], Any]:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # of the rest, as in the other contenders
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(2**64 - 1),  # one scale for a token
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    names = [put.get_any_name() for put in model.inputs]
    return partial(infer, compiled.create_infer_request(), names)


def infer(request: Any, names: Sequence[str], feeds: Feeds) -> Any:
    results = request.infer({name: feeds[name] for name in names}, share_inputs=True)
    return results[0]
