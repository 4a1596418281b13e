"""A diagonal block of an operator: its rows and columns of some of the parameters.

Shapes: D = size of the operator, B = size of the block.
"""

from torch import Tensor

from instruments.operators.blocks import Block
from instruments.operators.operator import Operator


class BlockOperator(Operator):
    """P A P' for the B x D selection P of `block`: a product costs one product of A, however small the block.

    Its eigenvalues interlace with those of A: the largest is never above the largest of A (Horn and Johnson 2013,
    "Matrix analysis", 4.3.28). The trace of A is the sum of the traces of blocks that make up the whole.
    """

    def __init__(self, operator: Operator, block: Block) -> None:
        if block.whole != operator.size:
            raise ValueError(
                f"expected a block of {operator.size} coordinates, the size of the operator, got one of {block.whole}; "
                "make both from the same layout."
            )
        self._operator, self._block = operator, block
        self.size, self.dtype, self.device = block.size, operator.dtype, operator.device
        self.price, self.route = operator.price, f"{operator.route}, block '{block.name}'"

    def matvec(self, v_D: Tensor) -> Tensor:
        """The product with a vector over the block, shape (B,)."""
        return self._block.cut(self._operator.matvec(self._block.pad(v_D)))
