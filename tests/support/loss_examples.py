"""Small examples of a loss, and what is multiplied on the way to it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUM_ROWS, HIDDEN, VOCAB = 23, 12, 37


def example(dtype=torch.float64, seed=0, ignore=0.3):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(NUM_ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_N = torch.randint(VOCAB, (NUM_ROWS,), generator=generator)
    labels_N[torch.rand(NUM_ROWS, generator=generator) < ignore] = -100
    return hidden_ND, weight_VD, labels_N


class Products(TorchDispatchMode):
    """Records the most rows of a tensor over the vocabulary, and how many matrix products, of what shapes, were run."""

    def __init__(self):
        super().__init__()
        self.most_rows = self.num_products = 0
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.num_products += 1
            self.shapes.add(tuple(result.shape))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and VOCAB in tensor.shape:
                other = tensor.shape[0] if tensor.shape[1] == VOCAB else tensor.shape[1]
                if other != HIDDEN:
                    self.most_rows = max(self.most_rows, other)
        return result
