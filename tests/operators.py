"""Which operators a piece of code calls, where what they compute does not tell."""

from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """A context whose ``operators`` are those that were called inside, in order."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **kwargs or {})
