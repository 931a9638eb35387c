"""The graph of a decoder in onnxruntime's operators; weights are named, not held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx import GraphProto, NodeProto, TensorProto, helper

from swquant.formats.onnx_layout import DecoderLayout

CONTRIB = "com.microsoft"
OPSET, IR_VERSION = 21, 10
COS, SIN = "cos_cache", "sin_cache"
EMBEDDING, HEAD, NORM, LAYERS = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers"

HEAD_VALUES = 1 << 28
"""Values of the head per product: onnxruntime converts constants to float32 on loading up to 1 GiB each, and larger
ones again for every token."""


class DecoderGraph:
    """Nodes in the order in which they are computed; each method adds some and returns the name of their output.

    Args:
        layout: The model.
        stored: The tensors that the data file holds, by name.
        shapes: ``(out, in)`` of each quantized module.
        bits: Of its codes.
        accuracy_level: See :data:`swquant.formats.onnx_layout.ACCURACY_LEVEL`.
    """

    def __init__(
        self,
        layout: DecoderLayout,
        stored: Mapping[str, TensorProto],
        shapes: Mapping[str, tuple[int, int]],
        bits: Mapping[str, int],
        accuracy_level: int,
    ) -> None:
        self._layout, self._stored, self._shapes = layout, stored, shapes
        self._bits, self._accuracy_level = bits, accuracy_level
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._floats: dict[str, str] = {}

    def build(self) -> GraphProto:
        """The whole graph: tokens, mask and cache in, logits and cache out."""
        seen, total = self._positions()
        hidden = self._float(self._node("Gather", [EMBEDDING, "input_ids"], "embedding"), EMBEDDING)
        for index, window in enumerate(self._layout.windows):
            hidden = self._layer(index, window, hidden, seen, total)
        self._head(self._norm(hidden, NORM))
        cache = ["batch_size", self._layout.key_value_heads, "past_sequence_length", self._layout.head_dim]
        tokens = ["batch_size", "sequence_length"]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
            *self._cache("past_key_values", cache),
        ]
        logits = [*tokens, self._layout.vocabulary]
        outputs = [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits),
            *self._cache("present", [*cache[:2], "total_sequence_length", cache[3]]),
        ]
        constants = [*self._stored.values(), *self._constants.values()]
        return helper.make_graph(self._nodes, "decoder", inputs, outputs, constants)

    def _cache(self, name: str, shape: list[Any]) -> list[Any]:
        names = [f"{name}.{index}.{part}" for index in range(len(self._layout.windows)) for part in ("key", "value")]
        return [helper.make_tensor_value_info(full, TensorProto.FLOAT, shape) for full in names]

    def _node(self, kind: str, inputs: list[str], name: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [name], name=f"{name}/{kind}", domain=domain, **attributes))
        return name

    def _integers(self, name: str, values: list[int]) -> str:
        self._constants[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return name

    def _float(self, value: str, stored: str) -> str:
        """``value``, of the dtype of the tensor ``stored``, in float32."""
        if self._stored[stored].data_type == TensorProto.FLOAT:
            return value
        if value not in self._floats:
            self._floats[value] = self._node("Cast", [value], f"{value}.float", to=TensorProto.FLOAT)
        return self._floats[value]

    def _positions(self) -> tuple[str, str]:
        """The last position of each text, and the length of the longest."""
        ones = self._node("ReduceSum", ["attention_mask", self._integers("axis", [1])], "lengths", keepdims=0)
        last = self._node("Sub", [ones, self._integers("one", [1])], "last")
        seen = self._node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        sizes = self._node("Shape", ["attention_mask"], "mask_shape", start=1)
        longest = self._node("Squeeze", [sizes], "longest")
        return seen, self._node("Cast", [longest], "total_length", to=TensorProto.INT32)

    def _norm(self, value: str, weight: str) -> str:
        name = weight.removesuffix(".weight")
        inputs = [value, self._float(weight, weight)]
        return self._node("SimplifiedLayerNormalization", inputs, name, axis=-1, epsilon=self._layout.epsilon)

    def _linear(self, module: str, value: str) -> str:
        """A module, quantized or not."""
        if module not in self._shapes:
            return self._plain_linear(module, value)
        scales, zeros, bias = f"{module}.scales", f"{module}.zero_points", f"{module}.bias"
        rows, columns = self._shapes[module]
        inputs = [value, f"{module}.codes", self._float(scales, scales), zeros if zeros in self._stored else ""]
        if bias in self._stored:
            inputs += ["", self._float(bias, bias)]
        codes = self._stored[f"{module}.codes"].dims
        bits = self._bits[module]
        attributes = {"bits": bits, "block_size": codes[2] * 8 // bits, "accuracy_level": self._accuracy_level}
        while not inputs[-1]:
            inputs.pop()
        return self._node("MatMulNBits", inputs, module, CONTRIB, N=rows, K=columns, **attributes)

    def _plain_linear(self, module: str, value: str) -> str:
        """A module that is kept as it is."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        turned = self._node("Transpose", [self._float(weight, weight)], f"{module}.transposed", perm=[1, 0])
        if bias not in self._stored:
            return self._node("MatMul", [value, turned], module)
        return self._node(
            "Add", [self._node("MatMul", [value, turned], f"{module}.product"), self._float(bias, bias)], module
        )

    def _normalized_heads(self, module: str, value: str) -> str:
        """The norm of each head, as Qwen3 has it on queries and keys."""
        width = self._layout.head_dim
        rows = width * (self._layout.heads if module.endswith("q_proj") else self._layout.key_value_heads)
        apart = self._integers(f"{module}.apart", [0, -1, width])
        together = self._integers(f"{module}.together", [0, -1, rows])
        heads = self._node("Reshape", [value, apart], f"{module}.heads")
        normalized = self._norm(heads, f"{module.removesuffix('_proj')}_norm.weight")
        return self._node("Reshape", [normalized, together], f"{module}.normalized")

    def _attention(self, index: int, window: int, value: str, seen: str, total: str) -> str:
        prefix = f"{LAYERS}.{index}.self_attn"
        query, key, states = (self._linear(f"{prefix}.{part}_proj", value) for part in "qkv")
        if self._layout.normalizes_queries:
            query = self._normalized_heads(f"{prefix}.q_proj", query)
            key = self._normalized_heads(f"{prefix}.k_proj", key)
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [query, key, states, *past, seen, total, COS, SIN],
                [prefix, f"present.{index}.key", f"present.{index}.value"],
                name=f"{prefix}/GroupQueryAttention",
                domain=CONTRIB,
                num_heads=self._layout.heads,
                kv_num_heads=self._layout.key_value_heads,
                do_rotary=1,
                local_window_size=window,
            )
        )
        return self._linear(f"{prefix}.o_proj", prefix)

    def _mlp(self, index: int, value: str) -> str:
        prefix = f"{LAYERS}.{index}.mlp"
        gate, up = (self._linear(f"{prefix}.{part}_proj", value) for part in ("gate", "up"))
        open_share = self._node("Sigmoid", [gate], f"{prefix}.sigmoid")
        active = self._node("Mul", [gate, open_share], f"{prefix}.silu")
        return self._linear(f"{prefix}.down_proj", self._node("Mul", [active, up], f"{prefix}.gated"))

    def _layer(self, index: int, window: int, hidden: str, seen: str, total: str) -> str:
        prefix = f"{LAYERS}.{index}"
        attended = self._attention(index, window, self._norm(hidden, f"{prefix}.input_layernorm.weight"), seen, total)
        middle = self._node("Add", [hidden, attended], f"{prefix}.attended")
        computed = self._mlp(index, self._norm(middle, f"{prefix}.post_attention_layernorm.weight"))
        return self._node("Add", [middle, computed], prefix)

    def _head(self, hidden: str) -> None:
        """Logits, from the token embedding where there is no head of its own, some of the tokens at a time."""
        weight = HEAD if HEAD in self._stored else EMBEDDING
        rows, columns = self._stored[weight].dims
        step = max(1, HEAD_VALUES // columns)
        parts: list[str] = []
        for index, start in enumerate(range(0, rows, step)):
            part, name = weight, f"head.{index}"
            if step < rows:
                first = self._integers(f"{name}.from", [start])
                after = self._integers(f"{name}.to", [min(start + step, rows)])
                part = self._node("Slice", [weight, first, after, self._integers("rows", [0])], f"{name}.weight")
            turned = self._node("Transpose", [self._float(part, weight)], f"{name}.transposed", perm=[1, 0])
            parts.append(self._node("MatMul", [hidden, turned], f"{name}.logits"))
        self._node("Concat", parts, "logits", axis=-1)
