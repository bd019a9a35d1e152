"""ControlNets and T2I adapters are pruned through the denoiser that takes what they add."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from client_calls import in_plain_diffusers
from conftest import ONE_SHOT, Gfprune
from diffusers import DiffusionPipeline
from image_pipelines import PIPELINES

import gfprune_cli
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.families.family import Sizes
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.structure.tracing import outputs_of
