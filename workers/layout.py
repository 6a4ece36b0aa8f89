"""A parameter as the matrix [out, in] that the mathematics speaks of, and back."""

from __future__ import annotations

from torch import Tensor

from service.contract.errors import BadInput
from service.contract.treatments import Role


def as_matrix(tensor: Tensor, role: Role, transposed: bool) -> Tensor:
    """A view of ``tensor`` as ``[out, in]``.

    A convolution ``[out, in / groups, *kernel]`` becomes ``[out, in / groups * prod(kernel)]``; leading dimensions of
    size one (bare position embeddings ``[1, positions, d]``) are dropped; ``transposed`` turns ``[in, out]`` around.

    Raises:
        BadInput: the tensor has no such view: a vector, or a stack of matrices.
    """
    if role is Role.CONVOLUTION and tensor.dim() > 2:
        return tensor.flatten(1)
    if tensor.dim() < 2 or any(size != 1 for size in tensor.shape[:-2]):
        raise BadInput(
            f"a tensor of shape {list(tensor.shape)} with the role {role} is no matrix and can't be projected"
        )
    matrix = tensor.reshape(tensor.shape[-2:])
    return matrix.T if transposed else matrix


def as_blocks(tensor: Tensor, role: Role, blocks: int, transposed: bool) -> Tensor:
    """A view of a stack of matrices as ``[blocks, out, in]``.

    Experts are stacked so already, or as ``[blocks, in, out]`` where ``transposed``; a convolution of several groups
    ``[out, in / groups, *kernel]`` has its groups' filters one after the other.
    """
    stacked = tensor if role is Role.EXPERTS else tensor.reshape(blocks, -1, tensor[0].numel())
    return stacked.mT if transposed else stacked


def from_blocks(stacked: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """The inverse of ``as_blocks``: ``[blocks, out, in]`` in the ``shape`` the checkpoint has."""
    return (stacked.mT if transposed else stacked).reshape(shape)


def from_matrix(matrix: Tensor, shape: tuple[int, ...], role: Role, transposed: bool) -> Tensor:
    """The inverse of ``as_matrix``: ``[out, in]`` in the ``shape`` the checkpoint has."""
    is_turned = transposed and not (role is Role.CONVOLUTION and len(shape) > 2)
    return (matrix.T if is_turned else matrix).reshape(shape)
