"""Single layers as ONNX graphs, with random weights, for runtimes that take graphs."""

from typing import Any

import numpy as np

from gfprune_cli.deploy.onnx import DEFAULT_OPSET, SEVERE
from gfprune_cli.deploy.openvino import EXACT
from gfprune_cli.timing.kinds import ATTENTION, Kind
from gfprune_cli.timing.stopwatch import Call

IR_VERSION = 10
Feed = dict[str, Any]


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def layer_graph(kind: Kind, out: int, into: int) -> tuple[bytes, Feed]:
    """(a model, what it is given): one layer, or one attention product as networks are exported."""
    from onnx import helper

    def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
        return helper.make_node(operator, inputs.split(), [output], **attributes)

    if kind.operator == ATTENTION:
        batch, queries = kind.shape
        heads = kind.heads(out)
        feed = {
            "q": noise(batch, heads, queries, out // heads),
            "k": noise(batch, heads, out // heads, kind.keys),
            "v": noise(batch, heads, kind.keys, out // heads),
        }
        nodes = [node("MatMul", "q k", "a"), node("Softmax", "a", "b", axis=-1), node("MatMul", "b v", "y")]
        return serialized(nodes, feed, {}), feed
    shape, attributes = kind.weight_shape(out, into), {}
    if kind.operator == "linear":
        operator, shape, feed = "Gemm", shape[::-1], {"x": noise(*kind.shape, into)}
    else:
        operator, depthwise = "Conv", kind.operator == "depthwise"
        feed = {"x": noise(kind.shape[0], out if depthwise else into, *kind.shape[1:])}
        groups = out if depthwise else kind.groups
        attributes = dict(group=groups, strides=kind.stride, pads=kind.padding * 2, dilations=kind.dilation)
    weights = {"w": noise(*shape), "b": noise(out)}
    return serialized([node(operator, "x w b", "y", **attributes)], feed, weights), feed


def serialized(nodes: list[Any], feed: Feed, weights: Feed) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, kind, x.shape) for name, x in feed.items()]
    result = helper.make_tensor_value_info("y", kind, None)
    constants = [numpy_helper.from_array(x, name) for name, x in weights.items()]
    graph = helper.make_graph(nodes, "layer", inputs, [result], constants)
    opsets = [helper.make_opsetid("", DEFAULT_OPSET)]
    found: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return found


def in_onnx_runtime(model: bytes, feed: Feed, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = SEVERE, threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)


def in_openvino(model: bytes, feed: Feed, threads: int) -> Call:
    import openvino

    core = openvino.Core()
    settings = {**EXACT, "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    return lambda: compiled(feed)
