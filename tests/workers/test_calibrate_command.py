"""The command that makes a statistics file where the data is."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from service.contract.checkpoint import TensorInfo
from service.contract.samples import statistics_faults
from tests.workers.architectures import CASES
from tests.workers.tiny_models import build, configuration
from workers.calibrate import main


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "GptOssForCausalLM"])
def test_a_file_that_the_service_takes(architecture: str, tmp_path: Path) -> None:
    case = CASES[architecture]
    build(architecture, configuration(case.model_type, **case.values)).save_pretrained(tmp_path / "task")
    save_file(case.inputs, tmp_path / "exemplars.safetensors")
    paths = {"checkpoint": tmp_path / "task", "exemplars": tmp_path / "exemplars.safetensors", "out": tmp_path / "out"}
    assert main([word for name, path in paths.items() for word in (f"--{name}", str(path))]) == 0
    written, weights = load_file(tmp_path / "out"), load_file(tmp_path / "task" / "model.safetensors")
    assert any(name.endswith(".factor") for name in written)
    infos = {name: TensorInfo(name, "F32", tuple(tensor.shape), 0, 0, "out") for name, tensor in written.items()}
    rows = {name: TensorInfo(name, "I64", info.shape, 0, 0, "out") for name, info in infos.items() if ".rows" in name}
    parameters = {name: TensorInfo(name, "F32", tuple(tensor.shape), 0, 0, "task") for name, tensor in weights.items()}
    assert statistics_faults({**infos, **rows}, parameters) == []
