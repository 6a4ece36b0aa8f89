"""Parameters as matrices, and back."""

import pytest
import torch
from torch.nn import functional

from service.contract.errors import BadInput
from service.contract.treatments import Role
from workers.layout import as_matrix, from_matrix


@pytest.mark.parametrize(
    ("shape", "role", "transposed", "matrix"),
    [
        ((4, 3), Role.LINEAR, False, (4, 3)),
        ((3, 4), Role.LINEAR, True, (4, 3)),
        ((50, 4), Role.EMBEDDING, True, (4, 50)),
        ((1, 5, 4), Role.EMBEDDING, True, (4, 5)),
        ((6, 2, 3, 3), Role.CONVOLUTION, False, (6, 18)),
        ((6, 2, 3), Role.CONVOLUTION, False, (6, 6)),
        ((6, 2, 1, 2, 3), Role.CONVOLUTION, False, (6, 12)),
        ((4, 3), Role.OTHER, False, (4, 3)),
    ],
)
def test_there_and_back(shape: tuple[int, ...], role: Role, transposed: bool, matrix: tuple[int, int]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    there = as_matrix(tensor, role, transposed)
    assert there.shape == matrix
    assert there.data_ptr() == tensor.data_ptr()
    assert torch.equal(from_matrix(there, shape, role, transposed), tensor)


def test_the_matrix_of_a_table_maps_one_hot_rows() -> None:
    table = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    one_hot = functional.one_hot(torch.tensor([2, 5]), 7).float()
    assert torch.equal(one_hot @ as_matrix(table, Role.EMBEDDING, True).T, table[[2, 5]])


@pytest.mark.parametrize("shape", [(4,), (), (2, 4, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="no matrix"):
        as_matrix(torch.zeros(shape), Role.OTHER, False)
