"""A tiny ONNX network with the twelve heads of YuNet: a colored spot is the middle of a face.

Each of the strides 8, 16 and 32 answers to a spot of one color that fills a cell of that stride:
red, green, blue. The score is how pure the color is; the box and the five points are constants
around the middle of the cell, so a test knows them in closed form.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STRIDES = (8, 16, 32)
BOX = np.array([5.0, 6.0])  # width and height of every box, in strides
POINTS = np.array([[-1, -1], [1, -1], [0, 0.25], [-0.75, 1.5], [0.75, 1.5]])  # around, in strides


def write_yunet(path: Path) -> Path:
    nodes, constants, outputs = [], [], []

    def head(name: str, stride: int, weight: np.ndarray, bias: np.ndarray, *, clip: bool) -> None:
        """A convolution over whole cells, turned into (1, cells, channels)."""
        own = f"{name}_{stride}"
        shape = np.array([1, -1, len(bias)], np.int64)
        for part, value in (("w", weight), ("b", bias), ("shape", shape)):
            constants.append(numpy_helper.from_array(value, f"{own}_{part}"))
        inner = f"{own}_map"
        nodes.append(
            helper.make_node(
                "Conv", ["input", f"{own}_w", f"{own}_b"], [inner],
                kernel_shape=[stride, stride], strides=[stride, stride],
            )
        )  # fmt: skip
        if clip:
            nodes.append(helper.make_node("Relu", [inner], [f"{own}_relu"]))
            inner = f"{own}_relu"
        nodes.append(helper.make_node("Transpose", [inner], [f"{own}_last"], perm=[0, 2, 3, 1]))
        nodes.append(helper.make_node("Reshape", [f"{own}_last", f"{own}_shape"], [own]))
        outputs.append(helper.make_tensor_value_info(own, TensorProto.FLOAT, [1, None, len(bias)]))

    for kind in ("cls", "obj", "bbox", "kps"):
        for number, stride in enumerate(STRIDES):
            channels = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}[kind]
            weight = np.zeros((channels, 3, stride, stride), np.float32)
            bias = np.ones(channels, np.float32)
            if kind == "cls":  # pixels are BGR, 0-255
                weight[:] = -1 / (255 * stride * stride)
                weight[:, 2 - number] *= -1
                bias[:] = 0
            elif kind == "bbox":
                bias[:] = [0.5, 0.5, *np.log(BOX)]
            elif kind == "kps":
                bias[:] = (POINTS + 0.5).ravel()
            head(kind, stride, weight, bias, clip=kind == "cls")
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "h", "w"])
    graph = helper.make_graph(nodes, "yunet", [picture], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
