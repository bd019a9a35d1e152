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
    """(a model, what it is given): a convolution, a linear layer, or attention as networks are exported."""
    from onnx import helper

    def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
        return helper.make_node(operator, inputs.split(), [output], **attributes)

    weights: Feed
    if kind.operator == ATTENTION:
        batch, queries = kind.shape
        heads = max(1, out // kind.head) if kind.head else 1
        feed = {
            "q": noise(batch, heads, queries, out // heads),
            "k": noise(batch, heads, out // heads, kind.keys),
            "v": noise(batch, heads, kind.keys, out // heads),
        }
        nodes = [node("MatMul", "q k", "a"), node("Softmax", "a", "b", axis=-1), node("MatMul", "b v", "y")]
        return one_layer(nodes, feed, {}), feed
    if kind.operator == "linear":
        feed, weights = {"x": noise(*kind.shape, into)}, {"w": noise(into, out), "b": noise(out)}
        return one_layer([node("Gemm", "x w b", "y")], feed, weights), feed
    depthwise = kind.operator == "depthwise"
    groups = out if depthwise else kind.groups
    feed = {"x": noise(kind.shape[0], out if depthwise else into, *kind.shape[1:])}
    weights = {"w": noise(out, feed["x"].shape[1] // groups, *kind.kernel), "b": noise(out)}
    attributes = dict(group=groups, strides=kind.stride, pads=kind.padding * 2, dilations=kind.dilation)
    return one_layer([node("Conv", "x w b", "y", **attributes)], feed, weights), feed


def one_layer(nodes: list[Any], feed: Feed, weights: Feed) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in feed.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(x, name) for name, x in weights.items()]
    graph = helper.make_graph(nodes, "layer", inputs, [output], constants)
    opsets = [helper.make_opsetid("", DEFAULT_OPSET)]
    found: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return found


def in_onnx_runtime(model: bytes, feed: Feed, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = SEVERE, threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(["y"], feed)


def in_openvino(model: bytes, feed: Feed, threads: int) -> Call:
    import openvino

    core = openvino.Core()
    settings = {**EXACT, "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    return lambda: compiled(feed)
