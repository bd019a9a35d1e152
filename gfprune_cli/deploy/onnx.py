"""ONNX: written through the torch.export-based exporter, checked, run in ONNX Runtime."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.deploy.format import Format
from gfprune_cli.deploy.graph import Graph
from gfprune_cli.deploy.parity import Inputs, Outputs, Runner
from gfprune_cli.errors import GfpruneError
from gfprune_cli.recipes.export import ExportRecipe

FILE = "model.onnx"
DATA = "model.onnx.data"
DEFAULT_OPSET = 20  # from 21 on group norms become one operator, which ONNX Runtime's CPU runs slower
EXTERNAL_BYTES = 2 * 10**9  # protobuf ends at 2 GiB: larger weights go to a file beside the model
SEVERE = 3  # ONNX Runtime logs errors only
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter logs and warns of what it tries and skips; what fails raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def to_onnx(graph: Graph, opset: int) -> torch.onnx.ONNXProgram:
    """A traced network in ONNX operators.

    Raises:
        GfpruneError: an operator has no translation in this operator set.
    """
    try:
        with quiet_exporter():
            found = torch.onnx.export(
                graph.program,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong, in several layers
        raise GfpruneError(
            f"the network cannot be expressed in ONNX at opset {opset}: {root_cause(error)}; "
            "try another --opset, or --format torch-export"
        ) from error
    assert found is not None
    return found


def root_cause(error: BaseException) -> str:
    """The innermost reason in one line: the outer layers of the exporter are pages long."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error) if isinstance(error, Exception) else type(error).__name__


def values_of(model: Any) -> list[Any]:
    """The tensors of an ONNX model."""
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    return values + [value for node in model.graph for value in node.outputs]


def clear(model: Any) -> None:
    """Drop names of source files, classes and shapes from tracing: equal networks, equal bytes."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for value in values_of(model):
        value.metadata_props.clear()
        value.doc_string = None


def name_axes(model: Any, graph: Graph) -> None:
    """Give free dimensions the names of `graph`, wherever one of their size appears."""
    from onnx_ir import SymbolicDim

    named = [*zip(model.graph.inputs, graph.inputs.values(), strict=True)]
    named += zip(model.graph.outputs, graph.outputs.values(), strict=True)
    names = {str(value.shape[axis]): name for value, axes in named for axis, name in axes.items()}
    for value in values_of(model):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and str(size) in names:
                value.shape[axis] = SymbolicDim(names[str(size)])


def write_onnx(folder: Path, graph: Graph, opset: int) -> torch.onnx.ONNXProgram:
    """Write model.onnx (and model.onnx.data, where the weights need a file of their own) and check it.

    Raises:
        GfpruneError: an operator has no translation, or the result is no valid ONNX.
    """
    import onnx

    found = to_onnx(graph, opset)
    clear(found.model)
    name_axes(found.model, graph)
    needed = sum(tensor.nbytes for tensor in graph.program.state_dict.values())
    with quiet_exporter():
        found.save(folder / FILE, external_data=needed > EXTERNAL_BYTES)
    try:
        onnx.checker.check_model(folder / FILE, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GfpruneError(f"the ONNX checker refuses the model: {first_line(error)}") from error
    return found


def run_onnx(path: Path, threads: int | None = None) -> Runner:
    """A model file in ONNX Runtime on the CPU.

    Args:
        threads: None leaves it to ONNX Runtime.

    Raises:
        GfpruneError: ONNX Runtime has no kernel for something in it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = SEVERE
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise GfpruneError(
            f"ONNX Runtime cannot run the model on the CPU: {first_line(error)}; "
            "try another --dtype or --opset"
        ) from error

    def run(inputs: Inputs) -> Outputs:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        return tuple(torch.from_numpy(found) for found in session.run(None, feed))

    return run


def write_onnx_graph(folder: Path, graph: Graph, recipe: ExportRecipe) -> Runner:
    """Write a graph, and load it in ONNX Runtime."""
    write_onnx(folder, graph, recipe.opset or DEFAULT_OPSET)
    return run_onnx(folder / FILE)


FORMAT = Format(
    files=lambda weights: {FILE: 0, DATA: weights} if weights > EXTERNAL_BYTES else {FILE: weights},
    loading=lambda job, name: f'import onnxruntime\nsession = onnxruntime.InferenceSession("{name}/{FILE}")',
    packages=PACKAGES,
    graph=write_onnx_graph,
    optimum=("optimum.onnxruntime", "ORTDiffusionPipeline"),
    library="onnx",
    refuses={
        "bf16": "ONNX Runtime has no bfloat16 convolution on the CPU, so that nothing could be verified"
    },
)
