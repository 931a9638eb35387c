"""ONNX, by onnxruntime: a weight is what its node makes of an identity, logits are the whole decoder's."""

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
        """The file's own ``MatMulNBits`` node and data, alone in a graph, without its rounding of activations."""
        onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
        load_external_data = import_module("onnx.external_data_helper").load_external_data_for_tensor
        graph = onnx.load(str(directory / FILE), load_external_data=False).graph
        inputs = {tensor.name: tensor for tensor in graph.initializer if tensor.name.startswith(f"{module}.")}
        casts = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in inputs]
        known = inputs.keys() | {node.output[0] for node in casts}
        (node,) = [node for node in graph.node if node.op_type == "MatMulNBits" and set(node.input) & known]
        for tensor in inputs.values():
            load_external_data(tensor, str(directory))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
        width = next(attribute.i for attribute in kept if attribute.name == "K")
        scale = next(tensor for name, tensor in inputs.items() if name.endswith("scales"))
        dtype = onnx.TensorProto.FLOAT if casts else scale.data_type
        ends = [onnx.helper.make_tensor_value_info(name, dtype, None) for name in (node.input[0], node.output[0])]
        casts = [cast for cast in casts if cast.output[0] in node.input]
        used = {*node.input, *(cast.input[0] for cast in casts)}
        data = [tensor for name, tensor in inputs.items() if name in used]
        alone = onnx.helper.make_graph([*casts, node], "weight", ends[:1], ends[1:], data)
        imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, 1)]
        model = onnx.helper.make_model(alone, opset_imports=imports, ir_version=10)
        session: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        identity = np.eye(width, dtype=onnx.helper.tensor_dtype_to_np_dtype(dtype))
        return torch.from_numpy(session.run(None, {node.input[0]: identity})[0]).float().T.contiguous()

    def tolerance(self, spec: QuantSpec) -> float:
        """Products with ones and zeros are exact, and so is float32; float16 rounds a weight by 2^-12 of itself."""
        return 2.0 ** (spec.bits - 12)

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
