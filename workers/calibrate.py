"""Makes a statistics file on the owner's side, so that no sample leaves it: ``python -m workers.calibrate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from service.contract.errors import Failure
from service.contract.plan import Pinned
from service.stores.local import LocalStore
from service.stores.objects import Objects
from workers.forward import check_inputs, load_model, watch_inputs
from workers.hooks import WATCHED_ROLES
from workers.skeleton import read_skeleton
from workers.statistics_file import named_tensors
from workers.tensors import TensorReader

UNPINNED: tuple[Pinned, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the statistics of a checkpoint's inputs over a file of exemplars. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        count = calibrate(options.checkpoint, options.exemplars, options.out, options.batch_size, options.device)
    except (Failure, OSError, SafetensorError) as error:
        print(f"catmerge calibrate: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: statistics of {count} parameters")
    return 0


def calibrate(checkpoint: Path, exemplars: Path, out: Path, batch_size: int, device: str) -> int:
    """Send exemplars through a checkpoint folder's model, and write the file a recipe names under ``statistics``.

    Returns how many parameters it describes. Raises BadInput, InputMissing, UnsupportedArchitecture.
    """
    with TensorReader(_here(checkpoint, exemplars)) as reader:
        opened = reader.open(_address(checkpoint), UNPINNED)
        samples = reader.open(_address(exemplars), UNPINNED)
        inputs = reader.read(samples, samples.tensors)
        weights = reader.read(opened, opened.tensors)
    config = opened.config or {}
    model = load_model(config, weights, device)
    check_inputs(model, inputs)
    skeleton = read_skeleton(config, {name: info.shape for name, info in opened.tensors.items()})
    wanted = {name for name, parameter in skeleton.parameters.items() if parameter.role in WATCHED_ROLES}
    statistics = watch_inputs(model, skeleton, inputs, batch_size, wanted, lambda _done, _of: None)
    # Query, key and value have the same inputs and share one statistic, which the library refuses to write thrice.
    save_file({name: tensor.clone() for name, tensor in named_tensors(statistics).items()}, out)
    return len(statistics)


def _here(*paths: Path) -> Objects:
    """This machine's own files: whoever runs the command may read them anyway."""
    roots = tuple(path.resolve() if path.is_dir() else path.resolve().parent for path in paths)
    return Objects({"file": LocalStore(roots=roots)}, buckets=(), workspace="s3://none/")


def _address(path: Path) -> str:
    return f"file://{path.resolve()}" + ("/" if path.is_dir() else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="catmerge calibrate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with config.json and weights")
    parser.add_argument("--exemplars", type=Path, required=True, help=".safetensors file of the model's inputs")
    parser.add_argument("--out", type=Path, required=True, help="the statistics file to write")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
