"""ONNX, by onnxruntime."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from swquant.quant.spec import QuantSpec

FILE = "model.onnx"
DOMAIN = "com.microsoft"


class Onnx:
    """onnxruntime on processors."""

    package: ClassVar[str | None] = "onnxruntime"
    runtime: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> Tensor | None:
        """What ``GatherBlockQuantized``, which shares the layout, makes of the data of the file's ``MatMulNBits``."""
        onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
        load_external_data = import_module("onnx.external_data_helper").load_external_data_for_tensor
        graph = onnx.load(str(directory / FILE), load_external_data=False).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name.startswith(f"{module}.")}
        casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
        stored = {node.name: [casts.get(name, name) for name in node.input] for node in graph.node}
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        (node,) = [node for node in nodes if tensors.keys() & set(stored[node.name])]
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        arrays: list[Any] = []
        for name in filter(None, stored[node.name][1:4]):  # codes, scales, zero points; then a bias
            load_external_data(tensors[name], str(directory))
            tensors[name].data_location = onnx.TensorProto.DEFAULT
            arrays.append(onnx.numpy_helper.to_array(tensors[name]))
        rows = settings["N"]
        arrays[1] = arrays[1].astype(np.float32)
        data = {f"part{index}": array.reshape(rows, -1) for index, array in enumerate(arrays)}
        names = list(data)
        gather = onnx.helper.make_node(
            "GatherBlockQuantized",
            [names[0], "rows", *names[1:]],
            ["weight"],
            domain=DOMAIN,
            bits=settings["bits"],
            block_size=settings["block_size"],
            gather_axis=0,
            quantize_axis=1,
        )
        ends = [onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.INT64, ["rows"])]
        ends.append(onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, None))
        held = [onnx.numpy_helper.from_array(array, name) for name, array in data.items()]
        alone = onnx.helper.make_graph([gather], module, ends[:1], ends[1:], held)
        imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, 1)]
        model = onnx.helper.make_model(alone, opset_imports=imports, ir_version=10)
        session: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (values,) = session.run(None, {"rows": np.arange(rows)})
        return torch.from_numpy(values)[:, : settings["K"]].contiguous()

    def tolerance(self, spec: QuantSpec) -> float:
        """Bit for bit."""
        return 0.0

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """The decoder's, with an empty cache."""
        onnxruntime = import_module("onnxruntime")
        session: Any = onnxruntime.InferenceSession(directory / FILE, providers=["CPUExecutionProvider"])
        feeds: dict[str, Any] = {}
        for value in session.get_inputs():
            if value.name == "input_ids":
                feeds[value.name] = tokens.numpy()
            elif value.name == "attention_mask":
                feeds[value.name] = np.ones(tuple(tokens.shape), dtype=np.int64)
            else:
                empty = (tokens.shape[0], 0, 0, 0)
                shape = [size if isinstance(size, int) else empty[axis] for axis, size in enumerate(value.shape)]
                feeds[value.name] = np.zeros(shape, dtype=np.float16 if "float16" in value.type else np.float32)
        return torch.from_numpy(session.run(["logits"], feeds)[0]).float()
